"""Exact arithmetic on low-rank updates that never forms them: singular values, truncation, sums, distances, growth.

Everything is computed in float64 on the CPU. An update of r directions costs O((in + out) r^2), a dense one would cost
O(in out min(in, out)). Results have scaling 1: the scaling is in lora_B. Held by tests/numerics/test_arithmetic.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_train.adapters.fold import Delta


@dataclass(frozen=True)
class FactoredSvd:
    """`left diag(values) right^T` of an update: k = min(out, in, r) directions, the strongest first."""

    left_OK: Tensor  # orthonormal columns
    values_K: Tensor  # singular values, descending
    right_IK: Tensor  # orthonormal columns

    @property
    def norm(self) -> float:
        """The Frobenius norm of the update."""
        return float(self.values_K.norm())

    @property
    def numerical_rank(self) -> int:
        """How many singular values are more than rounding of float32 factors: 1e-6 of the largest."""
        return int((self.values_K > 1e-6 * self.values_K[:1]).sum())

    def dropped_norm(self, r: int) -> float:
        """||X - X_r||_F = sqrt(sum of the squared singular values after the first r) (Eckart and Young)."""
        return float(self.values_K[r:].norm())

    def truncated(self, r: int) -> Delta:
        """The nearest update of rank r or less: B = U_r S_r^(1/2), A = S_r^(1/2) V_r^T, in float32."""
        root = self.values_K[:r].sqrt()
        return Delta((self.right_IK[:, :r] * root).T.float().contiguous(), (self.left_OK[:, :r] * root).float(), 1.0)


def delta_svd(delta: Delta) -> FactoredSvd:
    """Singular value decomposition by thin QR: B = Q_b R_b, A^T = Q_a R_a, then the SVD of scaling R_b R_a^T (r, r)."""
    left, small_left = torch.linalg.qr(delta.lora_B.double().cpu())
    right, small_right = torch.linalg.qr(delta.lora_A.double().cpu().T)
    inner_left, values, inner_right = torch.linalg.svd(delta.scaling * small_left @ small_right.T, full_matrices=False)
    return FactoredSvd(left @ inner_left, values, right @ inner_right.T)


def norm(delta: Delta) -> float:
    """||scaling B A||_F, to rounding of the largest factor also where its directions cancel."""
    _, small_left = torch.linalg.qr(delta.lora_B.double().cpu())
    _, small_right = torch.linalg.qr(delta.lora_A.double().cpu().T)
    return abs(delta.scaling) * float((small_left @ small_right.T).norm())


def inner_product(first: Delta, second: Delta) -> float:
    """<X, Y>_F = tr(X^T Y) = scalings * sum of (B_x^T B_y) * (A_x A_y^T), elementwise."""
    by_left = first.lora_B.double().cpu().T @ second.lora_B.double().cpu()
    by_right = first.lora_A.double().cpu() @ second.lora_A.double().cpu().T
    return first.scaling * second.scaling * float((by_left * by_right).sum())


def folded(delta: Delta) -> Delta:
    """The same update with scaling 1, in float32."""
    return Delta(delta.lora_A.float().cpu(), (delta.scaling * delta.lora_B.double().cpu()).float(), 1.0)


def concatenated(deltas: Sequence[Delta], weights: Sequence[float]) -> Delta:
    """The weighted sum, exactly: B = [w1 s1 B1, w2 s2 B2, ...], A = [A1; A2; ...]; ranks add up.

    PEFT's combination types but `cat` and `svd` add A and B apart, which leaves cross terms B1 A2 (measured against the
    sum, peft 0.21.2: `linear` is 86 % off).
    """
    halves_B = [weight * d.scaling * d.lora_B.double().cpu() for d, weight in zip(deltas, weights, strict=True)]
    return Delta(torch.cat([d.lora_A.double().cpu() for d in deltas]), torch.cat(halves_B, dim=1), 1.0)


def grown(delta: Delta, r: int, generator: torch.Generator) -> Delta:
    """The same update with room for r directions: zero columns in B, fresh rows in A.

    The rows are drawn as LoRA's start has it, uniform within 1 / sqrt(in): with zero rows the new directions would
    have no gradient, and never train. Raises ValueError where the update has more than r.
    """
    have, width = delta.lora_A.shape
    if have > r:
        raise ValueError(f"an update of {have} directions does not fit into {r}")
    plain = folded(delta)
    fresh = (2 * torch.rand(r - have, width, generator=generator) - 1) / math.sqrt(width)
    zeros = torch.zeros(plain.lora_B.shape[0], r - have)
    return Delta(torch.cat([plain.lora_A, fresh]), torch.cat([plain.lora_B, zeros], dim=1), 1.0)


def energy_rank(values: Tensor, frac: float) -> int:
    """The fewest of the first singular values whose squares make up `frac` of the whole; 0 where all are 0.

    >>> energy_rank(torch.tensor([3.0, 2.0, 1.0]), 0.9), energy_rank(torch.tensor([3.0, 2.0, 1.0]), 1.0)
    (2, 3)
    """
    squares = values.double() ** 2
    total = float(squares.sum())
    if total == 0:
        return 0
    kept = squares.cumsum(0)
    # A sum taken in another order may miss the whole by rounding.
    return min(int((kept < frac * total * (1 - 1e-12)).sum()) + 1, int((values > 0).sum()))


def ranks_within(values: Mapping[str, Tensor], error: float) -> dict[str, int]:
    """The rank of each module, at least 1, such that all truncations together stay within `error`.

    The smallest singular values of all modules are dropped while the sum of their squares is at most error^2 of the
    sum of all: || all X - all X_k ||_F <= error ||all X||_F over the stacked updates. No module loses its first one.
    """
    budget = error**2 * sum(float((v.double() ** 2).sum()) for v in values.values())
    droppable = torch.cat([v[1:].double() ** 2 for v in values.values()])
    owner = torch.cat([torch.full((len(v) - 1,), index) for index, v in enumerate(values.values())])
    ascending, order = droppable.sort()
    num_dropped = int((ascending.cumsum(0) <= budget).sum())
    dropped = torch.bincount(owner[order[:num_dropped]], minlength=len(values))
    return {name: len(v) - int(dropped[index]) for index, (name, v) in enumerate(values.items())}


def uniform_rank_within(values: Mapping[str, Tensor], error: float) -> int:
    """The smallest rank, the same for every module, whose truncations together stay within `error` of the whole."""
    longest = max(len(v) for v in values.values())
    squares = torch.zeros(longest, dtype=torch.float64)
    for v in values.values():
        squares[: len(v)] += v.double() ** 2
    budget = error**2 * float(squares.sum())
    dropped = squares.flip(0).cumsum(0)  # by the last one, the last two, ...
    return max(1, longest - int((dropped <= budget).sum()))
