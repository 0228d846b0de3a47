"""Does an update repeat what its weight does, or amplify what it neglects? (LoRA, arXiv 2106.09685, section 7.3)

With U and V the singular directions of the update dW, the weight W is seen through them: ||U^T W V||_F. Small beside
what W's own first directions give, the update goes where W is weak; the factor by which it amplifies there is

    ||dW||_F / ||U^T W V||_F

W is the dequantised base in float32, which is what the layer computes with. tests/numerics/test_amplification.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_train.adapters.arithmetic import FactoredSvd
from qlora_train.adapters.inits.factors import top_triples

EXACT_UP_TO = 2048  # of the shorter side: beyond, W's own directions are found by iteration
FEW = 4  # the paper's smaller rank


@dataclass(frozen=True)
class Through:
    """The weight seen through k directions: the update's, and two controls. All norms are Frobenius norms."""

    num_directions: int  # k, the update's strongest
    delta_norm: float  # of these directions of dW
    by_delta: float  # ||U^T W V|| with the update's directions
    by_weight: float  # with W's own first k: sqrt(sum of its first k squared singular values)
    by_random: float  # with random directions, root of the mean square: k ||W|| / sqrt(out in)

    @property
    def factor(self) -> float:
        """||dW|| / ||U^T W V||: the amplification factor."""
        return _ratio(self.delta_norm, self.by_delta)

    @property
    def factor_weight(self) -> float:
        """The control: the same norm of update laid into W's own first directions."""
        return _ratio(self.delta_norm, self.by_weight)

    @property
    def factor_random(self) -> float:
        """The control: laid into random directions."""
        return _ratio(self.delta_norm, self.by_random)

    @property
    def emphasis(self) -> float:
        """||U^T W V|| beside random directions: above 1, the update's directions are ones that W uses."""
        return _ratio(self.by_delta, self.by_random)

    @property
    def of_first(self) -> float:
        """||U^T W V|| as a share of what W's own first directions give: far below 1, they are not W's first ones."""
        return _ratio(self.by_delta, self.by_weight)


@dataclass(frozen=True)
class Amplification:
    """One module's update against its weight, by the update's strongest directions and by all of them."""

    module: str
    delta_norm: float  # ||dW||
    weight_norm: float  # ||W||
    spectral_frac: float  # sigma_1(dW) / sigma_1(W)
    quant_error_norm: float | None  # ||W_original - W||; None where the base is not quantised
    few: Through
    whole: Through

    @property
    def delta_frac(self) -> float:
        """||dW|| / ||W||."""
        return _ratio(self.delta_norm, self.weight_norm)

    @property
    def above_quant_error(self) -> float | None:
        """||dW|| / ||W_original - W||: below 1, the update is smaller than what quantising changed."""
        return None if self.quant_error_norm is None else _ratio(self.delta_norm, self.quant_error_norm)


def amplification(module: str, svd: FactoredSvd, weight_OI: Tensor, quant_error_norm: float | None) -> Amplification:
    """Hold an update against the float32 weight (out, in) that it is added to.

    O(out in k), and O(in out min(in, out)) for W's own directions; above 2,048 they are found by iteration, from below.
    """
    num_directions = svd.numerical_rank
    left, right = (side[:, :num_directions].to(weight_OI.device).float() for side in (svd.left_OK, svd.right_IK))
    seen_KK = (left.T @ weight_OI @ right).double().cpu()
    largest = _first_values(weight_OI, max(1, num_directions))
    weight_norm = float(weight_OI.double().norm())

    def through(k: int) -> Through:
        return Through(
            k,
            delta_norm=float(svd.values_K[:k].norm()),
            by_delta=float(seen_KK[:k, :k].norm()),
            by_weight=float(largest[:k].norm()),
            by_random=k * weight_norm / math.sqrt(weight_OI.numel()),
        )

    return Amplification(
        module,
        delta_norm=svd.norm,
        weight_norm=weight_norm,
        spectral_frac=_ratio(float(svd.values_K[0]), float(largest[0])),
        quant_error_norm=quant_error_norm,
        few=through(min(FEW, num_directions)),
        whole=through(num_directions),
    )


def _first_values(weight_OI: Tensor, k: int) -> Tensor:
    """The k largest singular values, in float64: by the smaller Gram matrix, which needs no singular vectors."""
    if min(weight_OI.shape) > EXACT_UP_TO:
        return top_triples(weight_OI, k)[1].double().cpu()
    wide = weight_OI if weight_OI.shape[0] <= weight_OI.shape[1] else weight_OI.T
    wide = wide.double()
    return torch.linalg.eigvalsh(wide @ wide.T).flip(0)[:k].clamp(min=0).sqrt().cpu()


def _ratio(part: float, whole: float) -> float:
    """part / whole; 0 where there is nothing of either."""
    if whole == 0:
        return 0.0 if part == 0 else math.inf
    return part / whole
