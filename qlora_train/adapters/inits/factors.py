"""A thin product, and the two ways to find one in a matrix: its top and its bottom singular triples.

Shape legend: O outputs, I inputs, r rank, K = min(O, I).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

EXACT_UP_TO = 1024  # K from which the top triples are found by iteration
_OVERSAMPLING = 16  # further directions that the iteration carries
_ITERATIONS = 8


@dataclass(frozen=True)
class Factors:
    """lora_A (r, I) and lora_B (O, r) in float32, as a layer holds them."""

    lora_A: Tensor
    lora_B: Tensor

    def delta(self, scaling: float) -> Tensor:
        """`scaling * B A`, (O, I): multiplied in float64 and rounded once to float32.

        In float32 the sum's last bit would depend on the number of threads and the kind of device, and with it the
        codes of a base that the product is taken from: a reload on another machine could not prove it.
        """
        return (self.lora_B.double() @ self.lora_A.double()).mul_(scaling).float()


def split_evenly(left_Or: Tensor, singular_r: Tensor, right_rI: Tensor, scaling: float) -> Factors:
    """`scaling * B A = U diag(S) V^T`, each side with the root of S / scaling."""
    root = (singular_r / scaling).sqrt()
    return Factors((root[:, None] * right_rI).float().contiguous(), (left_Or * root).float().contiguous())


def top_triples(weight_OI: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """The r largest singular triples: U (O, r), S (r,) descending, V^T (r, I), float64 where exact, else float32.

    Exact up to K = 1,024; above, block power iteration from a fixed start (`torch.svd_lowrank`, Halko et al., arXiv
    0909.4061, algorithm 4.4) with 16 further directions and 8 iterations: 34 (r + 16) O I floating-point operations
    instead of about 10 O I K.
    """
    if min(weight_OI.shape) <= max(EXACT_UP_TO, r + _OVERSAMPLING):
        left, singular, right = _all_triples(weight_OI)
        return left[:, :r], singular[:r], right[:r]
    with torch.random.fork_rng(devices=[weight_OI.device] if weight_OI.is_cuda else []):
        torch.manual_seed(0)
        left, singular, right_t = torch.svd_lowrank(weight_OI.float(), r + _OVERSAMPLING, _ITERATIONS)
    return left[:, :r], singular[:r], right_t[:, :r].t()


def bottom_triples(weight_OI: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """The r smallest of the K singular triples, as `top_triples` gives the largest. Always by the whole SVD."""
    left, singular, right = _all_triples(weight_OI)
    return left[:, -r:], singular[-r:], right[-r:]


def _all_triples(weight_OI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The thin SVD in float64, from the eigenvectors of the smaller Gram matrix.

    Several times cheaper than LAPACK's SVD. Squaring costs half of the digits of a singular value: in float64, 8 of 16
    remain for one 1e-8 times the largest, below what a float32 weight can hold.
    """
    weight = weight_OI.double()
    wide = weight.shape[0] <= weight.shape[1]
    gram = weight @ weight.t() if wide else weight.t() @ weight
    vectors = torch.linalg.eigh(gram).eigenvectors.flip(1)
    # The singular values from the projections, not as roots of eigenvalues, which rounding may make negative.
    other = vectors.t() @ weight if wide else weight @ vectors
    singular = other.norm(dim=1 if wide else 0)
    scale = singular.clamp(min=torch.finfo(torch.float64).tiny)
    if wide:
        return vectors, singular, other / scale[:, None]
    return other / scale, singular, vectors.t()
