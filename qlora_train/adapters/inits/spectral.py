"""Starts from the weight alone: PiSSA and QPiSSA, MiLoRA, OLoRA, LoftQ.

Each takes the full-precision weight W (O, I) in float32 and the layer's scaling s, by which B A will be multiplied.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_train.adapters.inits.factors import Factors, bottom_triples, split_evenly, top_triples

RoundTrip = Callable[[Tensor], Tensor]  # quantise and dequantise: the float32 weight that the layer would compute with


@dataclass(frozen=True)
class Started:
    """What a start gives one layer. `taken`: the base is quantise(W - s B0 A0) of these; None: it is as loaded.

    With an `offset` start, `taken` is subtracted in the layer instead and the base stays as it was loaded.
    """

    factors: Factors
    taken: Factors | None = None


def pissa(weight_OI: Tensor, r: int, scaling: float, round_trip: RoundTrip, iters: int = 1) -> Started:
    """The r principal triples, moved out of the base: s B A = U_r S_r V_r^T, base = Q(W - s B A).

    Further iterations (QPiSSA) take the triples of what the base lacks: with R = W at first,
    {L = SVD_r(R); base = Q(W - L); R = W - base}, `iters` times. The base of the last is never made here.
    Source: arXiv 2404.02948, section 3, and the authors' init_qpissa.py; there s = 1, here any s > 0.
    tests/numerics/test_inits.py: W - s B A + s B A is W, and the error of base + s B A is below plain NF4's.
    """
    factors = split_evenly(*top_triples(weight_OI, r), scaling)
    for _ in range(iters - 1):
        rest = weight_OI - round_trip(weight_OI - factors.delta(scaling))
        factors = split_evenly(*top_triples(rest, r), scaling)
    return Started(factors, taken=factors)


def loftq(weight_OI: Tensor, base_OI: Tensor, r: int, scaling: float, round_trip: RoundTrip, iters: int = 1) -> Started:
    """The best rank-r correction of the quantisation error: s B A = SVD_r(W - base).

    `base_OI` is the base as loaded, which one iteration leaves as it is. More alternate
    {base = Q(W - s B A); s B A = SVD_r(W - base)}.
    Source: arXiv 2310.08659, algorithm 1. A and B hold the root of S / s each, which the authors' and PEFT's code
    leave out: with s = 2 theirs corrects the error twice over, and is as far from W as no correction at all.
    """
    taken: Factors | None = None
    factors = split_evenly(*top_triples(weight_OI - base_OI, r), scaling)
    for _ in range(iters - 1):
        taken = factors
        rest = weight_OI - round_trip(weight_OI - taken.delta(scaling))
        factors = split_evenly(*top_triples(rest, r), scaling)
    return Started(factors, taken)


def milora(weight_OI: Tensor, r: int, scaling: float) -> Started:
    """The r minor triples: s B A = U_min S_min V_min^T, subtracted in the layer. Source: arXiv 2406.09044, section 3.

    Theirs subtracts it from the base before training; the sum is the same.
    """
    factors = split_evenly(*bottom_triples(weight_OI, r), scaling)
    return Started(factors, taken=factors)


def olora(weight_OI: Tensor, r: int, scaling: float) -> Started:
    """The first r columns of Q and rows of R in W = Q R; s B A is subtracted in the layer.

    Source: arXiv 2406.01775, section 3. As in PEFT, A and B are not divided by s: B's columns are orthonormal.
    """
    orthonormal, triangular = torch.linalg.qr(weight_OI.float())
    factors = Factors(triangular[:r].contiguous(), orthonormal[:, :r].contiguous())
    return Started(factors, taken=factors)
