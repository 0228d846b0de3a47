"""An adapter with another rank: fixed, by a share of each update's energy, or within an error of the whole.

Truncation is the nearest there is (Eckart and Young), and its error is known beforehand from the singular values.
tests/numerics/test_arithmetic.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from qlora_train.adapters.arithmetic import (
    FactoredSvd,
    concatenated,
    delta_svd,
    energy_rank,
    folded,
    grown,
    norm,
    ranks_within,
    uniform_rank_within,
)
from qlora_train.adapters.fold import Delta
from qlora_train.seeds import derive_seed


@dataclass(frozen=True)
class Ask:
    """What is asked for: exactly one of the three."""

    r: int | None = None
    energy: float | None = None  # share of ||delta||_F^2 that every module keeps
    error: float | None = None  # of all modules together: ||all - resized||_F <= error * ||all||_F


@dataclass(frozen=True)
class ResizedModule:
    """One module's update before and after."""

    module: str
    old_r: int
    r: int
    norm: float  # ||delta||_F
    expected_error: float  # ||delta - resized||_F by the singular values that are dropped
    error: float  # the same, measured on the float32 factors that are written


@dataclass(frozen=True)
class Resized:
    """The new factors and what they lost."""

    deltas: dict[str, Delta]
    modules: tuple[ResizedModule, ...]

    @property
    def error_frac(self) -> float:
        """||all - resized||_F / ||all||_F, measured."""
        return _share([row.error for row in self.modules], [row.norm for row in self.modules])

    @property
    def expected_error_frac(self) -> float:
        """The same by the dropped singular values."""
        return _share([row.expected_error for row in self.modules], [row.norm for row in self.modules])


def resized(deltas: Mapping[str, Delta], ask: Ask, *, per_module: bool = False, seed: int = 0) -> Resized:
    """The updates with other ranks, scaling 1.

    All modules get one rank, the smallest that does what is asked; with `per_module` each its own, which makes a
    smaller file. Directions beyond an update's own have B = 0 and a fresh A from `seed`: nothing changes, and they can
    train.
    """
    svds = {module: delta_svd(delta) for module, delta in deltas.items()}
    ranks = _ranks(svds, ask, per_module=per_module)
    generator = torch.Generator().manual_seed(derive_seed(seed, "resize"))
    made, rows = {}, []
    for module, delta in deltas.items():
        svd, r = svds[module], ranks[module]
        made[module] = _fitted(delta, svd, r, generator)
        rows.append(
            ResizedModule(
                module,
                old_r=delta.lora_A.shape[0],
                r=r,
                norm=svd.norm,
                expected_error=svd.dropped_norm(r),
                error=norm(concatenated([delta, made[module]], [1, -1])),
            )
        )
    return Resized(made, tuple(rows))


def _ranks(svds: Mapping[str, FactoredSvd], ask: Ask, *, per_module: bool) -> dict[str, int]:
    values = {module: svd.values_K for module, svd in svds.items()}
    if ask.r is not None:
        return dict.fromkeys(svds, ask.r)
    if ask.energy is not None:
        ranks = {module: max(1, energy_rank(v, ask.energy)) for module, v in values.items()}
        return ranks if per_module else dict.fromkeys(ranks, max(ranks.values()))
    assert ask.error is not None
    return (
        ranks_within(values, ask.error) if per_module else dict.fromkeys(svds, uniform_rank_within(values, ask.error))
    )


def _fitted(delta: Delta, svd: FactoredSvd, r: int, generator: torch.Generator) -> Delta:
    """An update of exactly r directions; the factors stay as they are where there is room for them."""
    if delta.lora_A.shape[0] <= r:
        return grown(folded(delta), r, generator)
    return grown(svd.truncated(min(r, svd.numerical_rank)), r, generator)


def _share(parts: list[float], wholes: list[float]) -> float:
    whole = math.hypot(*wholes)
    return math.hypot(*parts) / whole if whole > 0 else 0.0
