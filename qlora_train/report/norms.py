"""How large the update of each adapted module is, from the adapter's file alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from qlora_train.adapters.fold import read_updates
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
        """The first number in the module's name; None outside the layers.

        >>> ModuleNorm("model.layers.12.mlp.experts.3.up_proj", 1, 1, 1).layer, ModuleNorm("lm_head", 1, 1, 1).layer
        (12, None)
        """
        return next((int(part) for part in self.module.split(".") if part.isdecimal()), None)

    @property
    def name(self) -> str:
        """The last part of the module's name."""
        return self.module.rpartition(".")[2]


@dataclass(frozen=True)
class NormGrid:
    """`delta_weight` by layer and name. Modules of one name in one layer (experts) are one: the root of their squares.

    `values[row][column]` belongs to `names[row]` and `layers[column]`; None where that layer has no such module.
    """

    names: tuple[str, ...]
    layers: tuple[int, ...]
    values: tuple[tuple[float | None, ...], ...]


def delta_norm(lora_A: Tensor, lora_B: Tensor, scaling: float) -> float:
    """||scaling * B A|| of A (r, in) and B (out, r), without the product: |scaling| * sqrt(tr(B^T B  A A^T)).

    In float64; r^2 (in + out) multiplications, and two r x r matrices of memory. Held against the dense product by
    tests/unit/report/test_norms.py.
    """
    wide_A, wide_B = lora_A.double(), lora_B.double()
    # Both Gram matrices are symmetric, so the trace of their product is the sum of their elementwise product.
    squared = float(((wide_B.T @ wide_B) * (wide_A @ wide_A.T)).sum())
    return abs(scaling) * math.sqrt(max(squared, 0.0))


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
        delta_weight = delta_norm(delta.lora_A, delta.lora_B, delta.scaling)
        norms.append(ModuleNorm(name.removesuffix(".weight"), norm_A, norm_B, delta_weight))
    return tuple(sorted(norms, key=lambda norm: (norm.layer is None, norm.layer or 0, norm.module)))


def norm_grid(norms: Sequence[ModuleNorm], factor: str = "delta_weight") -> NormGrid:
    """One of the norms (`lora_A`, `lora_B`, `delta_weight`) by layer and name, of the modules inside the layers."""
    cells: dict[tuple[str, int], float] = {}
    for norm in norms:
        if norm.layer is not None:
            key = (norm.name, norm.layer)
            cells[key] = math.hypot(cells.get(key, 0.0), getattr(norm, factor))
    names = tuple(dict.fromkeys(name for name, _ in cells))
    layers = tuple(sorted({layer for _, layer in cells}))
    return NormGrid(names, layers, tuple(tuple(cells.get((name, layer)) for layer in layers) for name in names))
