"""What training did to a weight, whatever method did it: added factors, rescaled rows, single rows, a difference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Shape = tuple[int, ...]


class Update(Protocol):
    """What training did to one parameter of the base."""

    def shape_from(self, shape: Shape) -> Shape | None:
        """Of the trained parameter, from that of the base's; None where the update belongs to another."""

    def applied(self, weight: Tensor) -> Tensor:
        """The float32 parameter that was trained, from the float32 parameter of the base."""


class _SameShape:
    """An update that leaves a parameter the shape it has."""

    @property
    def shape(self) -> Shape:
        """Of the parameter it belongs to."""
        raise NotImplementedError

    def shape_from(self, shape: Shape) -> Shape | None:
        """As `Update` says."""
        return shape if shape == self.shape else None


@dataclass(frozen=True)
class Delta(_SameShape):
    """The low-rank update of one weight: `scaling * B A`, with lora_A (r, in) and lora_B (out, r)."""

    lora_A: Tensor
    lora_B: Tensor
    scaling: float

    @property
    def shape(self) -> Shape:
        """(out, in)."""
        return (self.lora_B.shape[0], self.lora_A.shape[1])

    def dense(self, device: torch.device) -> Tensor:
        """The update (O, I) in float32."""
        return (self.lora_B.to(device).float() @ self.lora_A.to(device).float()) * self.scaling

    def applied(self, weight: Tensor) -> Tensor:
        """`weight + scaling * B A`."""
        return weight + self.dense(weight.device)


@dataclass(frozen=True)
class RowDelta(_SameShape):
    """The low-rank update of an embedding (vocabulary, width): `scaling * (B A)^T`, in PEFT's shapes."""

    embedding_A: Tensor  # (r, vocabulary)
    embedding_B: Tensor  # (width, r)
    scaling: float

    @property
    def shape(self) -> Shape:
        """(vocabulary, width)."""
        return (self.embedding_A.shape[1], self.embedding_B.shape[0])

    def applied(self, weight: Tensor) -> Tensor:
        """`weight + scaling * (B A)^T`."""
        factor_A, factor_B = (factor.to(weight.device).float() for factor in (self.embedding_A, self.embedding_B))
        return weight + (factor_A.T @ factor_B.T) * self.scaling


@dataclass(frozen=True)
class RescaledRows(_SameShape):
    """DoRA's update: the rows of `weight + delta`, each brought to a trained length. Of full rank: it does not fold."""

    delta: Delta
    magnitude: Tensor  # (out,): the trained length of each row

    @property
    def shape(self) -> Shape:
        """(out, in)."""
        return self.delta.shape

    def applied(self, weight: Tensor) -> Tensor:
        """`magnitude * (weight + delta) / ||weight + delta||`, row by row."""
        moved = self.delta.applied(weight)
        return moved * (self.magnitude.to(moved.device).float() / moved.norm(dim=1))[:, None]


@dataclass(frozen=True)
class Difference(_SameShape):
    """What was added to a parameter that is not quantised: a norm's weight, a bias."""

    values: Tensor

    @property
    def shape(self) -> Shape:
        """Of the parameter."""
        return tuple(self.values.shape)

    def applied(self, weight: Tensor) -> Tensor:
        """`weight + values`."""
        return weight + self.values.to(weight.device).float()


@dataclass(frozen=True)
class VocabularyRows:
    """Rows of an embedding or an output head (vocabulary, width) that were trained by themselves; the others stay.

    Ids from the vocabulary's size on are rows that the base lacks: they follow its last one, without a gap.
    """

    ids: tuple[int, ...]  # ascending
    rows: Tensor  # (len(ids), width)

    def shape_from(self, shape: Shape) -> Shape | None:
        """With a row more for each id that the table lacks; None for a table of another width, or with a gap."""
        new = [number for number in self.ids if number >= shape[0]]
        if len(shape) != 2 or shape[1] != self.rows.shape[1] or new != list(range(shape[0], shape[0] + len(new))):
            return None
        return (shape[0] + len(new), shape[1])

    def applied(self, weight: Tensor) -> Tensor:
        """The table with these rows in place of its own, and after them."""
        shape = self.shape_from(tuple(weight.shape))
        assert shape is not None, "checked before"
        return self.applied_between(0, shape[0], weight, weight.dtype)

    def applied_between(self, start: int, stop: int, held: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows start to stop of that table in a dtype, from those among them that the base has. No other copy."""
        here = [at for at, number in enumerate(self.ids) if start <= number < stop]
        places = [self.ids[at] - start for at in here]
        assert len(held) + sum(place >= len(held) for place in places) == stop - start, "each row is in one of the two"
        made = held.new_empty((stop - start, held.shape[1]), dtype=dtype)
        made[: len(held)] = held
        made[places] = self.rows[here].to(made)
        return made
