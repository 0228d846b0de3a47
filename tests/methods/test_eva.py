"""EVA on an NF4 base: A spans the principal directions of what the layers read at supervised positions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora_train.adapters.attach import attach_adapter, load_adapter
from qlora_train.adapters.fold import read_updates
from qlora_train.adapters.inits.informed import redistribute
from qlora_train.adapters.layers import delta_weight, lora_layers
from qlora_train.adapters.state import save_adapter
from qlora_train.data.loader import MicroBatch, collate
from qlora_train.model.causal import CausalModel
from qlora_train.model.probe import probe_inputs
from qlora_train.model.start import parameter_of, probe_batches, start_again, start_from_inputs
from qlora_train.names import IGNORE_INDEX
from qlora_train.recipe.load import load_recipe
from qlora_train.recipe.schema import AdapterSection
from tests.commandline import write_recipe
from tests.loading import CPU, tiny_base
from tests.packs import table_of
from tests.tiny import build_tiny_llama

IDS = torch.arange(3, 19)[None]
SECTION = AdapterSection(method="eva", r=4, alpha=8.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_llama(tmp_path_factory.mktemp("eva"), num_hidden_layers=1)


def batches() -> list[MicroBatch]:
    """Two padded micro-batches: padding and the prompt must not count."""
    table = table_of([120, 40, 90, 110])
    return [collate(table, [[0], [1]], 0), collate(table, [[2], [3]], 0)]


def inputs_seen(causal: CausalModel) -> dict[str, Tensor]:
    """Every supervised row of every adapted layer's input, stacked."""
    rows: dict[str, list[Tensor]] = {}
    for batch in batches():
        mask = (batch.labels != IGNORE_INDEX).reshape(-1)

        def keep(name: str, mask: Tensor = mask) -> Any:
            return lambda module, args: rows.setdefault(name, []).append(args[0].flatten(0, 1)[mask])

        hooks = [layer.register_forward_pre_hook(keep(name)) for name, layer in lora_layers(causal.model).items()]
        with torch.no_grad():
            causal.hidden(batch)
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(found).double() for name, found in rows.items()}


def test_a_starts_as_the_principal_components_of_the_inputs(folder: Path) -> None:
    base = tiny_base(folder)
    with torch.no_grad():
        plain = base.model(input_ids=IDS).logits
    model = attach_adapter(base.model, SECTION, 0, base_name="tiny").train()
    causal = CausalModel(model)
    spectra = probe_inputs(causal, batches(), 4)
    assert model.training, "left as it was found"
    rows = inputs_seen(causal)
    assert spectra.keys() == rows.keys() and len(rows) == 7
    for name, spectrum in spectra.items():
        centred = rows[name] - rows[name].mean(dim=0)
        values = torch.linalg.svdvals(centred).square()
        share = values / values.sum()
        # In the space of the found directions lies nearly as much variance as in any other of 4 dimensions.
        held = (centred @ spectrum.directions.double().t()).square().sum(dim=0) / values.sum()
        assert float(held.sum()) > 0.95 * float(share[:4].sum()), name
        assert torch.allclose(held, spectrum.variance_frac, rtol=1e-3), name
        assert torch.allclose(
            spectrum.directions @ spectrum.directions.t(), torch.eye(4, dtype=torch.float64), atol=1e-5
        )
        chance = torch.linalg.qr(torch.randn(centred.shape[1], 4, generator=torch.Generator().manual_seed(0))).Q
        at_random = float((centred @ chance.double()).square().sum() / values.sum())
        assert float(held.sum()) > 1.5 * at_random, f"{name}: negative control"
    start_from_inputs(causal, SECTION, batches())
    layers = lora_layers(model)
    for name, layer in layers.items():
        assert torch.allclose(layer.lora_A["default"].weight, spectra[name].directions.float(), atol=1e-5)
        assert not layer.lora_B["default"].weight.any()
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, plain)
    q, k, v = (
        layers[f"base_model.model.model.layers.0.self_attn.{one}_proj"].lora_A["default"].weight for one in "qkv"
    )
    assert torch.equal(q, k) and torch.equal(k, v), "layers that read the same start the same"


def test_rho_moves_rank_to_where_the_variance_is_and_the_folder_keeps_it(folder: Path, tmp_path: Path) -> None:
    section = SECTION.model_copy(update={"rho": 2.0})
    base = tiny_base(folder)
    model = attach_adapter(base.model, section, 0, base_name="tiny").train()
    causal = CausalModel(model)
    start_from_inputs(causal, section, batches())
    layers = lora_layers(model)
    ranks = {name: layer.r["default"] for name, layer in layers.items()}
    assert len(set(ranks.values())) > 1 and max(ranks.values()) <= 8 and min(ranks.values()) >= 1
    assert 28 <= sum(ranks.values()) <= 28 + 7, "as many as before, and one for each layer that would have none"
    assert ranks == redistribute(probe_inputs(causal, batches(), 8), 4, 2.0)
    for name, layer in layers.items():
        assert layer.lora_A["default"].weight.shape[0] == ranks[name] and layer.scaling["default"] == 2.0
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.02)
    save_adapter(model, tmp_path)
    updates = read_updates(tmp_path)
    for name, layer in layers.items():
        update = updates[parameter_of(name)]
        assert torch.equal(update.dense(CPU), delta_weight(layer, "default"))  # type: ignore[attr-defined]
    again = load_adapter(tiny_base(folder).model, tmp_path)
    fresh = attach_adapter(tiny_base(folder).model, section, 0, base_name="tiny")
    start_again(tiny_base(folder), fresh, tmp_path)
    with torch.no_grad():
        wanted = model.eval()(input_ids=IDS).logits
        assert torch.equal(again.eval()(input_ids=IDS).logits, wanted)
        assert torch.equal(fresh.eval()(input_ids=IDS).logits, wanted)


class FewSteps:
    """A loader of three steps with two micro-batches each."""

    def num_steps(self, epochs: float, max_steps: int | None) -> int:
        return 3

    def step(self, step: int) -> list[str]:
        return [f"{step}.0", f"{step}.1"]


@pytest.mark.parametrize(("count", "expected"), [(1, ["0.0"]), (3, ["0.0", "0.1", "1.0"]), (99, 6)])
def test_the_first_micro_batches_of_training_are_looked_at(tmp_path: Path, count: int, expected: Any) -> None:
    changes = {"adapter__method": "eva", "adapter__probe_batches": count}
    recipe = load_recipe(write_recipe(tmp_path, tmp_path, **changes), ()).recipe
    found: Any = probe_batches(recipe, FewSteps())  # type: ignore[arg-type]
    assert found == expected if isinstance(expected, list) else len(found) == expected
    plain = recipe.model_copy(update={"adapter": recipe.adapter.model_copy(update={"method": "lora"})})
    assert probe_batches(plain, FewSteps()) == []  # type: ignore[arg-type]
