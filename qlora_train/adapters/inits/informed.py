"""Starts that have seen data: LoRA-GA from the gradient of the weight, EVA from the inputs of the layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_train.adapters.inits.factors import Factors
from qlora_train.adapters.inits.spectral import Started


@dataclass(frozen=True)
class ThinGradient:
    """The leading singular triples of a weight's mean gradient: U (O, q), S (q,) descending, V^T (q, I)."""

    left: Tensor
    singular: Tensor
    right: Tensor


def lora_ga(gradient: ThinGradient, r: int, stable_gamma: float) -> Started:
    """A = z V[:, :r]^T, B = z U[:, r:2r], z = O^(1/4) / sqrt(gamma); s B A is subtracted in the layer.

    One step of gradient descent then moves W by -lr s^2 z^2 G_2r to first order in lr, G_2r being the best rank-2r
    approximation of the gradient: B's gradient spans the first r left vectors, A's the next r right ones.
    Source: LoRA-GA, arXiv 2407.05000, section 3.3 and theorem 3.1 ("ArB2r" in the authors' code, which scales both
    orthonormal factors; PEFT's puts singular values into B).
    """
    if len(gradient.singular) < 2 * r:
        raise ValueError(f"LoRA-GA with r = {r} needs {2 * r} triples of the gradient, not {len(gradient.singular)}")
    size = gradient.left.shape[0] ** 0.25 / stable_gamma**0.5
    factors = Factors(
        (size * gradient.right[:r]).float().contiguous(), (size * gradient.left[:, r : 2 * r]).float().contiguous()
    )
    return Started(factors, taken=factors)


@dataclass(frozen=True)
class InputSpectrum:
    """Principal directions of a layer's inputs: rows of `directions` (q, I), orthonormal, with shares of variance."""

    directions: Tensor
    variance_frac: Tensor  # (q,) descending

    def leading(self, q: int) -> InputSpectrum:
        """The first q of them."""
        return InputSpectrum(self.directions[:q], self.variance_frac[:q])


def eva(spectrum: InputSpectrum, r: int, out_features: int) -> Started:
    """A = the r leading principal directions of the inputs, B = 0; nothing is taken. Source: arXiv 2410.07170."""
    directions = spectrum.directions[:r].float().contiguous()
    return Started(Factors(directions, directions.new_zeros(out_features, r)))


def redistribute(spectra: Mapping[str, InputSpectrum], r: int, rho: float) -> dict[str, int]:
    """Ranks that explain the most variance: of every layer's first r * rho directions, the best len(spectra) * r.

    `rho` = 1 gives every layer r. A layer may get none at all: it then keeps one direction, so that the sum can exceed
    the budget by the number of such layers. Source: arXiv 2410.07170, section 3, and PEFT's `_get_rank_distribution`.
    """
    limit = int(r * rho)
    shares = [
        (float(share), name) for name, spectrum in spectra.items() for share in spectrum.variance_frac[:limit].tolist()
    ]
    best = sorted(shares, key=lambda one: -one[0])[: r * len(spectra)]
    ranks = dict.fromkeys(spectra, 0)
    for _, name in best:
        ranks[name] += 1
    return {name: max(1, rank) for name, rank in ranks.items()}


class InputSketch:
    """Principal directions of inputs that come in batches, without their I x I covariance C: block power iteration.

    Feed every batch with `add`, then call `advance`; again for each further iteration, with the same batches; after the
    last pass `spectrum` instead. The cost is 4 q I floating-point operations per row and pass, the memory 2 q I floats.
    Source: Halko et al., arXiv 0909.4061, algorithm 4.4, with C = X^T X - n mean mean^T. EVA's authors and PEFT use an
    incremental PCA, which drops directions as it goes; this is exact in the limit of many passes.
    """

    def __init__(self, in_features: int, q: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)  # one start for equal widths: layers with equal inputs agree
        start = torch.randn(in_features, min(q, in_features), generator=generator)
        self._basis_Iq = torch.linalg.qr(start).Q.to(device)
        self._reset()

    def _reset(self) -> None:
        self._image_Iq = torch.zeros_like(self._basis_Iq)
        self._ritz_qq = self._basis_Iq.new_zeros(self._basis_Iq.shape[1], self._basis_Iq.shape[1])
        self._total_I = self._basis_Iq.new_zeros(self._basis_Iq.shape[0])
        self._square = self._basis_Iq.new_zeros(())
        self._num_rows = 0

    def add(self, rows_MI: Tensor) -> None:
        """Inputs of one call."""
        rows = rows_MI.detach().float()
        projected_Mq = rows @ self._basis_Iq
        self._image_Iq += rows.t() @ projected_Mq
        self._ritz_qq += projected_Mq.t() @ projected_Mq
        self._total_I += rows.sum(dim=0)
        self._square += rows.square().sum()
        self._num_rows += rows.shape[0]

    def advance(self) -> None:
        """One iteration: the basis becomes that of C times the basis."""
        mean_I = self._mean()
        image_Iq = self._image_Iq - self._num_rows * mean_I[:, None] * (mean_I @ self._basis_Iq)
        self._basis_Iq = torch.linalg.qr(image_Iq).Q
        self._reset()

    def spectrum(self) -> InputSpectrum:
        """Directions and their shares of the variance, by Rayleigh and Ritz in the space of the basis."""
        mean_I = self._mean()
        mean_q = mean_I @ self._basis_Iq
        ritz = self._ritz_qq.double() - self._num_rows * torch.outer(mean_q, mean_q).double()
        values, vectors = torch.linalg.eigh(ritz)
        values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
        variance = (self._square - self._num_rows * mean_I.square().sum()).double().clamp(min=1e-30)
        return InputSpectrum((self._basis_Iq.double() @ vectors).t().contiguous(), values / variance)

    def _mean(self) -> Tensor:
        if self._num_rows == 0:
            raise ValueError("no input was seen")
        return self._total_I / self._num_rows
