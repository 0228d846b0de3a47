"""How many directions an update really has: singular values and four counts of them, from the factors alone.

Sources: stable rank, Rudelson and Vershynin 2007; effective rank, Roy and Vetterli 2007, definition 1; participation
ratio of the squared singular values; energy rank, the usual share of variance. tests/numerics/test_spectrum.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from qlora_train.adapters.arithmetic import FactoredSvd, energy_rank
from qlora_train.adapters.module_names import layer_of, name_of

_ORDER = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj")


@dataclass(frozen=True)
class Spectrum:
    """The singular values of one module's update, scaling included, and what they count up to."""

    module: str  # as the model calls it: model.layers.0.self_attn.q_proj
    shape: tuple[int, int]  # (out, in)
    values: tuple[float, ...]  # descending

    @property
    def layer(self) -> int | None:
        """The layer that the module lies in; None outside of the layers."""
        return layer_of(self.module)

    @property
    def norm(self) -> float:
        """Frobenius norm of the update."""
        return math.hypot(*self.values)

    @property
    def stable_rank(self) -> float:
        """||X||_F^2 / sigma_1^2; 0 for no update."""
        return (self.norm / self.values[0]) ** 2 if self.values[0] > 0 else 0.0

    @property
    def effective_rank(self) -> float:
        """exp(entropy of sigma / sum of sigma); 0 for no update."""
        total = sum(self.values)
        if total == 0:
            return 0.0
        shares = [value / total for value in self.values if value > 0]
        return math.exp(-sum(share * math.log(share) for share in shares))

    @property
    def participation(self) -> float:
        """(sum of sigma^2)^2 / sum of sigma^4; 0 for no update."""
        if self.values[0] == 0:
            return 0.0
        squares = [(value / self.values[0]) ** 2 for value in self.values]
        return sum(squares) ** 2 / sum(square**2 for square in squares)

    @property
    def energy_rank_90(self) -> int:
        """Directions that hold 90 % of ||X||_F^2."""
        return self.energy_rank(0.90)

    @property
    def energy_rank_95(self) -> int:
        """Directions that hold 95 % of ||X||_F^2."""
        return self.energy_rank(0.95)

    @property
    def energy_rank_99(self) -> int:
        """Directions that hold 99 % of ||X||_F^2."""
        return self.energy_rank(0.99)

    def energy_rank(self, frac: float) -> int:
        """Directions that hold `frac` of ||X||_F^2."""
        return energy_rank(torch.tensor(self.values, dtype=torch.float64), frac)


def in_model_order(modules: Mapping[str, object]) -> list[str]:
    """Layer by layer, in the order in which most models compute; what lies outside of the layers comes last."""

    def place(module: str) -> tuple[bool, int, int, str]:
        name, layer = name_of(module), layer_of(module)
        return layer is None, layer or 0, _ORDER.index(name) if name in _ORDER else len(_ORDER), module

    return sorted(modules, key=place)


def spectra(svds: Mapping[str, FactoredSvd]) -> tuple[Spectrum, ...]:
    """A spectrum for each module, in the model's order."""
    return tuple(
        Spectrum(
            module,
            (svds[module].left_OK.shape[0], svds[module].right_IK.shape[0]),
            tuple(svds[module].values_K.tolist()),
        )
        for module in in_model_order(svds)
    )
