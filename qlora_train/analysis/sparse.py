"""TIES (arXiv 2306.01708) and DARE (2311.03099): sums of updates of which most values are taken out before.

Which values go is decided value by value on the dense update, so it is formed here, one module at a time, and brought
back to rank r by a truncated SVD whose error is measured. The sparsifiers are PEFT's (`peft.utils.merge_utils`, peft
0.21.2), on the dense update: PEFT's own `ties` and `dare_linear` work on A and B apart, as the papers do not.
Memory: the dense update of one module for each adapter, in float32.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal

import torch
from peft.utils.merge_utils import dare_linear, ties
from torch import Tensor

from qlora_train.adapters.fold import Delta
from qlora_train.adapters.inits.factors import top_triples
from qlora_train.seeds import derive_seed

Sparsifier = Literal["ties", "dare"]


def sparse_sum(
    deltas: Sequence[Delta], weights: Sequence[float], how: Sparsifier, density: float, seed: int, position: int
) -> Tensor:
    """The dense sum (out, in) in float32.

    ties: of each weighted update the `density` largest values stay; of those, where signs differ, the ones of the sign
    with the larger sum; the mean of what is left. Weights come first here, so that a negative one turns the signs
    before they are compared. dare: of each update a random `density` of the values stays, divided by it; then the
    weighted sum. `position` tells modules apart in the randomness.
    """
    weighted = [weight * delta.dense(torch.device("cpu")) for delta, weight in zip(deltas, weights, strict=True)]
    ones = torch.ones(len(weighted))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "sparsify", position))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The density .* no pruning")  # a density of 1 is meant
            made: Tensor = (ties if how == "ties" else dare_linear)(weighted, ones, density)
    return made


def nearest(dense_OI: Tensor, r: int) -> tuple[Delta, float]:
    """The nearest update of rank r to a dense one, and ||dense - nearest||_F."""
    r = min(r, *dense_OI.shape)
    left, values, right_t = top_triples(dense_OI, r)
    root = values.clamp(min=0).sqrt()
    found = Delta((root[:, None] * right_t).float().contiguous(), (left * root).float().contiguous(), 1.0)
    return found, float((dense_OI.double() - found.lora_B.double() @ found.lora_A.double()).norm())
