"""How large the update of each adapted module is, from the adapter's file alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_train.adapters.arithmetic import norm
from qlora_train.adapters.fold import read_updates
from qlora_train.adapters.module_names import layer_of, name_of
from qlora_train.adapters.state import load_adapter_config
from qlora_train.adapters.updates import Delta


@dataclass(frozen=True)
class ModuleNorm:
    """Frobenius norms of one adapted module."""

    module: str  # as the model calls it: model.layers.0.self_attn.q_proj
    lora_A: float
    lora_B: float
    delta_weight: float  # ||scaling * B A||

    @property
    def layer(self) -> int | None:
        """The layer that the module lies in; None outside of the layers."""
        return layer_of(self.module)

    @property
    def name(self) -> str:
        """The last part of the module's name."""
        return name_of(self.module)


@dataclass(frozen=True)
class NormGrid:
    """`delta_weight` by layer and name. Modules of one name in one layer (experts) are one: the root of their squares.

    `values[row][column]` belongs to `names[row]` and `layers[column]`; None where that layer has no such module.
    """

    names: tuple[str, ...]
    layers: tuple[int, ...]
    values: tuple[tuple[float | None, ...], ...]


def module_norms(adapter: Path) -> tuple[ModuleNorm, ...]:
    """The norms of all modules of an adapter folder, in the order of the model's layers; none where a method's updates
    are no product of two factors.

    Raises ModelError where the folder is no adapter of ours or PEFT's, or is damaged. Holds the adapter's tensors at
    once.
    """
    if load_adapter_config(adapter).method.merges != "fold":
        return ()
    norms = []
    for name, delta in read_updates(adapter).items():
        if not isinstance(delta, Delta):  # a table of the vocabulary
            continue
        norm_A, norm_B = (float(factor.double().norm()) for factor in (delta.lora_A, delta.lora_B))
        norms.append(ModuleNorm(name.removesuffix(".weight"), norm_A, norm_B, norm(delta)))
    return tuple(sorted(norms, key=lambda one: (one.layer is None, one.layer or 0, one.module)))


def norm_grid(norms: Sequence[ModuleNorm], factor: str = "delta_weight") -> NormGrid:
    """One of the norms (`lora_A`, `lora_B`, `delta_weight`) by layer and name, of the modules inside the layers."""
    cells: dict[tuple[str, int], float] = {}
    for one in norms:
        if one.layer is not None:
            key = (one.name, one.layer)
            cells[key] = math.hypot(cells.get(key, 0.0), getattr(one, factor))
    names = tuple(dict.fromkeys(name for name, _ in cells))
    layers = tuple(sorted({layer for _, layer in cells}))
    return NormGrid(names, layers, tuple(tuple(cells.get((name, layer)) for layer in layers) for name in names))
