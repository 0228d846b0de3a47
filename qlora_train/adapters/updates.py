"""What training did to a weight, whatever method did it: added factors, rescaled rows, or a plain difference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Update(Protocol):
    """What training did to one parameter of the base."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the parameter it belongs to."""

    def applied(self, weight: Tensor) -> Tensor:
        """The float32 parameter that was trained, from the float32 parameter of the base."""


@dataclass(frozen=True)
class Delta:
    """The low-rank update of one weight: `scaling * B A`, with lora_A (r, in) and lora_B (out, r)."""

    lora_A: Tensor
    lora_B: Tensor
    scaling: float

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in)."""
        return (self.lora_B.shape[0], self.lora_A.shape[1])

    def dense(self, device: torch.device) -> Tensor:
        """The update (O, I) in float32."""
        return (self.lora_B.to(device).float() @ self.lora_A.to(device).float()) * self.scaling

    def applied(self, weight: Tensor) -> Tensor:
        """`weight + scaling * B A`."""
        return weight + self.dense(weight.device)


@dataclass(frozen=True)
class RowDelta:
    """The low-rank update of an embedding (vocabulary, width): `scaling * (B A)^T`, in PEFT's shapes."""

    embedding_A: Tensor  # (r, vocabulary)
    embedding_B: Tensor  # (width, r)
    scaling: float

    @property
    def shape(self) -> tuple[int, ...]:
        """(vocabulary, width)."""
        return (self.embedding_A.shape[1], self.embedding_B.shape[0])

    def applied(self, weight: Tensor) -> Tensor:
        """`weight + scaling * (B A)^T`."""
        factor_A, factor_B = (factor.to(weight.device).float() for factor in (self.embedding_A, self.embedding_B))
        return weight + (factor_A.T @ factor_B.T) * self.scaling


@dataclass(frozen=True)
class RescaledRows:
    """DoRA's update: the rows of `weight + delta`, each brought to a trained length. Of full rank: it does not fold."""

    delta: Delta
    magnitude: Tensor  # (out,): the trained length of each row

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in)."""
        return self.delta.shape

    def applied(self, weight: Tensor) -> Tensor:
        """`magnitude * (weight + delta) / ||weight + delta||`, row by row."""
        moved = self.delta.applied(weight)
        return moved * (self.magnitude.to(moved.device).float() / moved.norm(dim=1))[:, None]


@dataclass(frozen=True)
class Difference:
    """What was added to a parameter that is not quantised: a norm's weight, a bias."""

    values: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the parameter."""
        return tuple(self.values.shape)

    def applied(self, weight: Tensor) -> Tensor:
        """`weight + values`."""
        return weight + self.values.to(weight.device).float()
