"""Gradient rules: what is done to the gradients of A and B between clipping and the optimiser's update. LoRA-Pro.

Shape legend: O outputs, I inputs, r rank. g (O, I) is the gradient of the dense weight, which is never formed in
`factor` mode: A and B's own gradients hold what is needed of it, g_A = s B^T g and g_B = s g A^T.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_train.errors import NumericsError

DAMPING = 1e-6  # of a Gram matrix, relative to the mean of its diagonal


@dataclass(frozen=True)
class Pair:
    """A and B of one layer, and the scaling of their product."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    scaling: float


def lora_pro(lora_A: Tensor, lora_B: Tensor, grad_A: Tensor, grad_B: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """The steps (g^A, g^B) whose effect on the weight, s B g^A + s g^B A, is nearest to the full gradient g.

        g^A = (B^T B)^-1 g_A / s^2 + X A
        g^B = (1 - B (B^T B)^-1 B^T) g_B (A A^T)^-1 / s^2 - B X

    X, which the effect does not depend on, keeps the steps nearest to (g_A, g_B):

        B^T B X + X A A^T = -(B^T B)^-1 g_A A^T / s^2

    Where B is zero, as at the first step of plain LoRA, g_A is zero and stays so, and g^B is g_B (A A^T)^-1 / s^2.
    The residual |effect - g| is |(1 - P_B) g (1 - P_A)|, the least possible (tests/numerics/test_gradrules.py).
    Source: LoRA-Pro, arXiv 2407.18242, theorems 2.1 and 2.3. Both Gram matrices are symmetric, so that the Sylvester
    equation is solved in their eigenvectors, in float32, or float64 if A is. Cost: some 8 r^2 (O + I) operations.
    """
    dtype = torch.promote_types(lora_A.dtype, torch.float32)
    a_rI, b_Or, grad_a, grad_b = (tensor.to(dtype) for tensor in (lora_A, lora_B, grad_A, grad_B))
    values_a, vectors_a = torch.linalg.eigh(a_rI @ a_rI.t())
    values_b, vectors_b = torch.linalg.eigh(b_Or.t() @ b_Or)
    inverse_a, inverse_b = (_damped_inverse(values) for values in (values_a, values_b))
    scale = 1.0 / scaling**2

    natural_a = vectors_b @ (inverse_b[:, None] * (vectors_b.t() @ grad_a)) * scale  # (B^T B)^-1 g_A / s^2
    outside_b = grad_b - b_Or @ (vectors_b @ (inverse_b[:, None] * (vectors_b.t() @ (b_Or.t() @ grad_b))))
    natural_b = (outside_b @ vectors_a * inverse_a) @ vectors_a.t() * scale

    right = vectors_b.t() @ (natural_a @ a_rI.t()) @ vectors_a
    sums = values_b.clamp(min=0)[:, None] + values_a.clamp(min=0)
    least = (DAMPING * (values_a.mean() + values_b.mean())).clamp_min(torch.finfo(dtype).tiny)
    x_rr = -vectors_b @ (right / sums.clamp(min=least)) @ vectors_a.t()
    return natural_a + x_rr @ a_rI, natural_b - b_Or @ x_rr


def _damped_inverse(values: Tensor) -> Tensor:
    """1 / (value + damping); zero where the value is none but for rounding, as r - n of them are where r is above a
    side of the layer: an inverse would multiply noise."""
    damping = (DAMPING * values.mean()).clamp_min(torch.finfo(values.dtype).tiny)
    is_some = values > DAMPING * values.max()
    return torch.where(is_some, 1.0 / (values.clamp(min=0) + damping), torch.zeros_like(values))


class LoraProRule:
    """LoRA-Pro in `factor` mode: a hook before an optimiser's step that rewrites the gradients of A and B.

    The optimiser then keeps its moments of the rewritten gradients, on A and B as ever. That is our form, which costs
    no memory; the paper's keeps the moments of the dense weight (`LoraProAdamW`).
    """

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self._pairs = pairs
        self.rule_norm = 0.0  # of all rewritten gradients of the last step

    @torch.no_grad()
    def __call__(self, optimizer: Any = None, args: Any = None, kwargs: Any = None) -> None:
        """As torch's `Optimizer.register_step_pre_hook` calls it."""
        gradients: list[Tensor] = []
        rewritten: list[Tensor] = []
        for pair in self._pairs:
            grad_a, grad_b = pair.lora_A.grad, pair.lora_B.grad
            if grad_a is None or grad_b is None:
                continue
            gradients += [grad_a, grad_b]
            rewritten += lora_pro(pair.lora_A, pair.lora_B, grad_a, grad_b, pair.scaling)
        self.rule_norm = _total_norm(rewritten)
        _refuse_not_finite(self.rule_norm)
        for gradient, new in zip(gradients, rewritten, strict=True):
            gradient.copy_(new)


class LoraProAdamW(torch.optim.Optimizer):
    """LoRA-Pro in `full` mode, the paper's: AdamW's moments are those of the weight's gradient, (O, I) each.

    Each step: (g^A, g^B) as in `lora_pro`; their effect g~ = s B g^A + s g^B A enters the moments; AdamW's direction d
    for the dense weight is projected back by the same formulas, with s B^T d and s d A^T in the places of g_A and g_B.
    Decay is decoupled. No weight moves by numbers that are not finite. Keeps 8 bytes for each base weight under an
    adapter: for small models and as a reference.
    Source: LoRA-Pro, arXiv 2407.18242, section 3.3 and the authors' code.
    """

    def __init__(
        self, pairs: Sequence[Pair], *, lr: float, betas: tuple[float, float], weight_decay: float, eps: float = 1e-8
    ) -> None:
        self.pairs = tuple(pairs)
        self.rule_norm = 0.0  # of all steps (g^A, g^B) of the last update, before the moments
        super().__init__(
            (p for pair in pairs for p in (pair.lora_A, pair.lora_B)),
            {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": eps},
        )

    def new_state(self, lora_B: nn.Parameter) -> dict[str, Tensor]:
        """Zero moments of the weight that this B belongs to, put in place."""
        pair = next(pair for pair in self.pairs if pair.lora_B is lora_B)
        shape = (pair.lora_B.shape[0], pair.lora_A.shape[1])
        self.state[lora_B] = {
            "step": torch.zeros(()),
            "exp_avg": lora_B.new_zeros(shape, requires_grad=False),
            "exp_avg_sq": lora_B.new_zeros(shape, requires_grad=False),
        }
        return self.state[lora_B]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update; NumericsError, and no weight moved, where it is not finite. A closure is refused: gradients are
        rewritten once.
        """
        if closure is not None:
            raise ValueError("LoRA-Pro takes no closure")
        group = self.param_groups[0]
        steps = {}
        for pair in self.pairs:
            if (grad_a := pair.lora_A.grad) is not None and (grad_b := pair.lora_B.grad) is not None:
                steps[pair] = lora_pro(pair.lora_A, pair.lora_B, grad_a, grad_b, pair.scaling)
        self.rule_norm = _total_norm([step for both in steps.values() for step in both])
        _refuse_not_finite(self.rule_norm)
        updates: list[tuple[nn.Parameter, Tensor]] = []
        for pair, both in steps.items():
            updates += zip((pair.lora_A, pair.lora_B), self._updates(pair, both, group), strict=True)
        _refuse_not_finite(_total_norm([update for _, update in updates]))
        for parameter, update in updates:
            parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])

    def _updates(self, pair: Pair, steps: tuple[Tensor, Tensor], group: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """What the rate multiplies, for A and for B; the moments move on."""
        (a_rI, b_Or), scaling, (step_a, step_b) = (pair.lora_A, pair.lora_B), pair.scaling, steps
        state = self.state[b_Or] or self.new_state(b_Or)
        effect_OI = scaling * (b_Or @ step_a + step_b @ a_rI)
        direction_OI = _adam_direction(state, effect_OI, group["betas"], group["eps"])
        return lora_pro(a_rI, b_Or, scaling * (b_Or.t() @ direction_OI), scaling * (direction_OI @ a_rI.t()), scaling)


def _total_norm(tensors: Sequence[Tensor]) -> float:
    return float(nn.utils.get_total_norm(tensors)) if tensors else 0.0


def _refuse_not_finite(norm: float) -> None:
    if not math.isfinite(norm):
        raise NumericsError(
            f"the gradients that LoRA-Pro makes of finite ones are not finite (norm {norm})",
            fix="lower train.learning_rate, or use another adapter.method",
        )


def _adam_direction(state: dict[str, Tensor], gradient: Tensor, betas: tuple[float, float], eps: float) -> Tensor:
    """Adam's direction for a gradient, bias corrected; the moments move on."""
    state["step"] += 1
    step = float(state["step"])
    state["exp_avg"].lerp_(gradient, 1 - betas[0])
    state["exp_avg_sq"].mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
    root = (state["exp_avg_sq"] / (1 - betas[1] ** step)).sqrt_().add_(eps)
    return state["exp_avg"] / (1 - betas[0] ** step) / root
