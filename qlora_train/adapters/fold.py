"""What an adapter folder does to each weight of the base, as one kind of object for merging, export and analysis."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from qlora_train.adapters.state import load_adapter_config, read_adapter_tensors, split_name
from qlora_train.adapters.updates import Delta as Delta
from qlora_train.adapters.updates import RowDelta, VocabularyRows
from qlora_train.adapters.updates import Update as Update
from qlora_train.errors import ModelError
from qlora_train.names import PEFT_PREFIX, TOKEN_ROWS


def read_updates(adapter: Path) -> dict[str, Update]:
    """The updates of an adapter folder, whatever its method, by the base's parameter name.

    Most are a `Delta`; DoRA's is a rescaling of rows, and new tokens have rows of their own. ModelError where no weight
    does what the adapter does.
    """
    config = load_adapter_config(adapter)
    modules: dict[str, dict[str, Tensor]] = {}
    tables: dict[str, Update] = {}
    for name, tensor in read_adapter_tensors(adapter).items():
        module, attribute = split_name(name)
        if attribute == TOKEN_ROWS:
            ids = config.token_ids_of(module)
            tables[f"{module.removeprefix(PEFT_PREFIX)}.weight"] = VocabularyRows(tuple(ids), tensor)
        else:
            modules.setdefault(module, {})[attribute] = tensor
    return tables | {
        f"{module.removeprefix(PEFT_PREFIX)}.{parameter}": update
        for module in sorted(modules)
        for parameter, update in config.form.updates(modules[module], config.scaling_of(module)).items()
    }


def read_deltas(adapter: Path) -> dict[str, Delta]:
    """The updates of an adapter folder as two factors and a number each, which is what every program can load.

    ModelError for a method whose updates are no such product.
    """
    updates = read_updates(adapter)
    deltas = {name: update for name, update in updates.items() if isinstance(update, Delta)}
    if tables := [name for name, update in updates.items() if isinstance(update, RowDelta)]:
        raise ModelError(
            f"{adapter}: it adapts the token embedding ({tables[0]}), which this format has no factors for",
            fix="serve the run's own adapter folder, which PEFT loads, or merge it: qlora-train export",
        )
    if rows := [update for update in updates.values() if isinstance(update, VocabularyRows)]:
        raise ModelError(
            f"{adapter}: it trains the rows of {len(rows[0].ids)} tokens (adapter.new_tokens), which plain LoRA has no "
            "place for",
            fix="merge it: qlora-train export, as safetensors or GGUF; PEFT itself loads the run's own adapter folder",
        )
    if other := sorted(updates.keys() - deltas.keys()):
        method = load_adapter_config(adapter).method
        raise ModelError(
            f"{adapter}: {method.title} changes {len(other)} weights by no product of two factors, first {other[0]}: "
            "it cannot be plain LoRA",
            fix="merge it into a plain weight: qlora-train export",
        )
    return deltas
