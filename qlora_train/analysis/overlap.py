"""Do two adapters use the same directions? Subspace similarity (LoRA, arXiv 2106.09685, section 7.2) with controls.

    phi(i, j) = || U1[:, :i]^T U2[:, :j] ||_F^2 / min(i, j)

with the first i and j directions of either side: 1 where one span holds the other, 0 where they are orthogonal; the
mean of the squared cosines of the principal angles. Random subspaces of R^d have phi = max(i, j) / d on average, which
is shown beside every value. The paper takes the directions of A; A keeps much of its random start, so the control is
phi of the two starts. `delta_right` takes those that B A reads, weighted with B, which still lie within A's rows;
`delta_left` those that it writes, which B alone decides: in short runs only they can be shared between seeds
(tests/e2e/test_analysis_real.py). tests/numerics/test_overlap.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from qlora_train.adapters.arithmetic import FactoredSvd
from qlora_train.adapters.fold import Delta
from qlora_train.adapters.module_names import name_of
from qlora_train.analysis.spectrum import in_model_order

Directions = Literal["A", "delta_right", "delta_left"]
DIRECTIONS: tuple[Directions, ...] = get_args(Directions)
WHAT: dict[Directions, str] = {"A": "rows of A", "delta_right": "inputs of B A", "delta_left": "outputs of B A"}


@dataclass(frozen=True)
class Overlap:
    """Phi over the modules of one name: `grid[i - 1][j - 1]` is the mean of phi(i, j) over its layers."""

    name: str  # q_proj
    directions: Directions
    num_modules: int
    dim: int  # of the space that the directions lie in
    grid: tuple[tuple[float, ...], ...]
    control: tuple[tuple[float, ...], ...] | None  # phi of the two starts, for A where they are known

    def at(self, i: int, j: int) -> float:
        """phi of the first i and the first j directions."""
        return self.grid[i - 1][j - 1]

    def control_at(self, i: int, j: int) -> float | None:
        """phi of the starts."""
        return self.control[i - 1][j - 1] if self.control else None

    def baseline(self, i: int, j: int) -> float:
        """phi of random subspaces of these sizes, on average."""
        return baseline(i, j, self.dim)


def similarity(first_DI: Tensor, second_DJ: Tensor) -> Tensor:
    """phi(i, j) (I, J) for all leading parts of two bases with orthonormal columns. O(d I J)."""
    squares = (first_DI.T @ second_DJ) ** 2
    sums = squares.cumsum(0).cumsum(1)
    num_first, num_second = squares.shape
    smaller = torch.minimum(torch.arange(1, num_first + 1)[:, None], torch.arange(1, num_second + 1)[None, :])
    return sums / smaller


def baseline(i: int, j: int, dim: int) -> float:
    """The mean of phi over random subspaces: max(i, j) / d."""
    return max(i, j) / dim


def baseline_deviation(i: int, j: int, dim: int) -> float:
    """The standard deviation of phi over random subspaces of dimensions i and j.

    Var tr(P Q) = 2 i j (d - i) (d - j) / (d^2 (d - 1) (d + 2)) for independent random projections P and Q of R^d; for
    i = j = 1 that of a squared cosine, Beta(1/2, (d - 1)/2). Held against samples by tests/numerics/test_overlap.py.
    """
    if dim == 1:
        return 0.0
    variance = 2 * i * j * (dim - i) * (dim - j) / (dim**2 * (dim - 1) * (dim + 2))
    return math.sqrt(variance) / min(i, j)


def row_directions(lora_A: Tensor) -> Tensor:
    """The right singular vectors (in, r) of A (r, in), the strongest first, in float64."""
    basis, small = torch.linalg.qr(lora_A.double().cpu().T)
    _, _, inner = torch.linalg.svd(small.T, full_matrices=False)
    return basis @ inner.T


def directions_of(svd: FactoredSvd, lora_A: Tensor, directions: Directions) -> Tensor:
    """The basis that phi compares. Of B A only directions with a singular value above rounding."""
    if directions == "A":
        return row_directions(lora_A)
    side = svd.right_IK if directions == "delta_right" else svd.left_OK
    return side[:, : svd.numerical_rank]


def overlaps(
    first: Mapping[str, tuple[Delta, FactoredSvd]],
    second: Mapping[str, tuple[Delta, FactoredSvd]],
    starts: tuple[Mapping[str, Tensor], Mapping[str, Tensor]] | None = None,
) -> list[Overlap]:
    """Phi between the modules that both adapters have, by name and kind of directions.

    `starts`: the A of either side before training, where known. Where modules of one name have updates of different
    numerical rank, the grid reaches to the smallest; a name of which one has none is left out.
    """
    shared = [module for module in in_model_order(first) if module in second]
    found = []
    for name in dict.fromkeys(map(name_of, shared)):
        modules = [module for module in shared if name_of(module) == name]
        for directions in DIRECTIONS:
            bases = [
                (directions_of(svd, delta.lora_A, directions), directions_of(svd2, delta2.lora_A, directions))
                for (delta, svd), (delta2, svd2) in ((first[module], second[module]) for module in modules)
            ]
            if not min(side.shape[1] for pair in bases for side in pair):
                continue
            control = None
            drawn = starts is not None and all(module in side for module in modules for side in starts)
            if starts is not None and drawn and directions == "A":
                control = _mean_grid([(row_directions(starts[0][m]), row_directions(starts[1][m])) for m in modules])
            dim = bases[0][0].shape[0]
            found.append(Overlap(name, directions, len(modules), dim, _mean_grid(bases), control))
    return found


def _mean_grid(bases: Sequence[tuple[Tensor, Tensor]]) -> tuple[tuple[float, ...], ...]:
    """The mean of phi over pairs of bases, as far as all of them reach."""
    num_first = min(first.shape[1] for first, _ in bases)
    num_second = min(second.shape[1] for _, second in bases)
    grids = [similarity(first[:, :num_first], second[:, :num_second]) for first, second in bases]
    return tuple(tuple(row) for row in torch.stack(grids).mean(0).tolist())
