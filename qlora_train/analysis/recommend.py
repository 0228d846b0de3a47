"""Which rank would have done, from a run with more than enough. A heuristic: nothing proves it but another run.

Background: Aghajanyan et al., arXiv 2012.13255 (intrinsic dimension); LoRA, 2106.09685, section 7.2 (few directions are
shared between seeds). Both are about small tasks; much data wants rank whatever the spectrum of a small run says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from qlora_train.adapters.arithmetic import FactoredSvd
from qlora_train.analysis.overlap import baseline, baseline_deviation, similarity
from qlora_train.analysis.spectrum import Spectrum

ENERGY = 0.95
BOUND_FRAC = 0.8  # of the directions an update can have: a module whose energy rank is above it is short of rank
QUANTILE = 0.9  # of the modules: what is recommended is enough for as many
SIZES = (4, 8, 16, 32, 64, 128, 256)
LEAST_SHARED = 0.5  # phi of directions that two runs have in common
DEVIATIONS = 4  # above random subspaces


@dataclass(frozen=True)
class Recommendation:
    """A rank, and what it rests on."""

    r: int  # the next of 4, 8, 16, ... that covers 90 % of the modules
    trained_r: int  # the run's own
    energy_rank: int  # that holds 95 % of the update's energy in 90 % of the modules
    shared_rank: int | None  # directions that a second run found too, in 90 % of the modules
    num_bound: int  # modules that use more than 80 % of the directions their update can have
    num_modules: int

    @property
    def is_bound(self) -> bool:
        """Whether most modules use all the rank they have, so that the run cannot say what would be enough."""
        return self.num_bound > self.num_modules / 2


def recommend(found: Sequence[Spectrum], trained_r: int, shared: Sequence[int] | None = None) -> Recommendation:
    """From the spectra of all modules; `shared`: of each module, the directions that a second run found too.

    An update may have more directions than the run's rank, as of a start that is taken off again (MiLoRA, OLoRA,
    LoRA-GA: 2 r), and is counted as it is.
    """
    ranks = [spectrum.energy_rank(ENERGY) for spectrum in found]
    enough = _quantile(ranks)
    return Recommendation(
        r=next((size for size in SIZES if size >= enough), enough),
        trained_r=trained_r,
        energy_rank=enough,
        shared_rank=_quantile(shared) if shared else None,
        num_bound=sum(rank > BOUND_FRAC * len(s.values) for rank, s in zip(ranks, found, strict=True)),
        num_modules=len(ranks),
    )


def shared_ranks(first: Mapping[str, FactoredSvd], second: Mapping[str, FactoredSvd]) -> list[int]:
    """Of each module that both have: the largest i for which the first i directions of both are the same subspace.

    The same: phi(i, i) above one half, and above random subspaces by four standard deviations, on the side of the
    inputs or of the outputs: the inputs are A's, which may still be what the seed made it.
    """
    ranks = []
    for module in first.keys() & second.keys():
        one, other = first[module], second[module]
        ends = one.numerical_rank, other.numerical_rank
        sides = ((one.right_IK, other.right_IK), (one.left_OK, other.left_OK))
        ranks.append(max(_shared_rank(x[:, : ends[0]], y[:, : ends[1]]) for x, y in sides) if min(ends) else 0)
    return ranks


def _shared_rank(first_IK: Tensor, second_IK: Tensor) -> int:
    phi, dim = similarity(first_IK, second_IK).diagonal().tolist(), first_IK.shape[0]
    found = [
        i
        for i, value in enumerate(phi, start=1)
        if value > max(LEAST_SHARED, baseline(i, i, dim) + DEVIATIONS * baseline_deviation(i, i, dim))
    ]
    return max(found, default=0)


def _quantile(values: Sequence[int]) -> int:
    """The smallest value that 90 % of the values do not exceed."""
    return sorted(values)[max(0, math.ceil(QUANTILE * len(values)) - 1)]
