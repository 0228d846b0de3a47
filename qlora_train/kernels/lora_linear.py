"""Frozen linear layers that read one input, and their LoRA branches, as one function: no copy, and few skinny matmuls.

    y_i = x W_i^T + b_i + s_i (d A_i^T) B_i^T,   d = dropout(x)

    dB_i = s_i dy_i^T (d A_i^T)
    dA_i = (s_i dy_i B_i)^T d
    dx   = sum_i dy_i W_i + mask * (s_i dy_i B_i) A_i

q, k and v (or gate and up) go through it together: their A stand below each other in one matrix, so that x is read once
for all of `x A^T`, once for all dA, and dx is written once for all branches.

Two autograd nodes, for the sake of checkpointing. `_Down` computes `d A^T` and saves all that is saved; `_Join` then
does the base matmuls, saves nothing, and computes every gradient with what `_Down` saved. torch stops a non-reentrant
recomputation at its last saved tensor: the base matmul of a block's last projection is never computed again
(Unsloth's and PEFT's order, base first, computes it; torch.utils.checkpoint, `early_stop`).

Shape legend: M tokens, I inputs, O outputs, r rank, R the sum of the ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora_train.kernels.dense import FrozenLinear


@dataclass(frozen=True)
class Branch:
    """A frozen layer with the adapter on it. A and B are float32 parameters."""

    base: FrozenLinear
    weight_A_rI: Tensor
    weight_B_Or: Tensor
    scaling: float


def lora_linear(x: Tensor, branches: Sequence[Branch], dropout: float = 0.0) -> tuple[Tensor, ...]:
    """`base(x) + scaling * B A dropout(x)` of each branch; x (..., I) in the compute dtype -> (..., O) in the same.

    A and B are cast to x's dtype for the matmuls; their gradients come back in float32. Of the activations x and
    `x A^T` are saved and nothing else: with dropout, the mask (one for all branches) is drawn again from its seed,
    which comes from the CPU generator of torch. Equal to its plain twin (tests/numerics/test_fused_linear.py).
    Cost per token and branch: 2 I O (forward) + 2 I O (dx) of the base, 8 r (I + O) of the branch.
    """
    seed = int(torch.randint(2**62, ())) if dropout else 0
    x_MI = x.reshape(-1, x.shape[-1])
    weights_A = [branch.weight_A_rI for branch in branches]
    weights_B = [branch.weight_B_Or for branch in branches]
    copies = _Copies(branches, x.dtype)
    down_MR = _Down.apply(x_MI, copies.weights_A_RI, dropout, seed, *weights_A)
    outs: tuple[Tensor, ...] = _Join.apply(x_MI, down_MR, copies, dropout, seed, *weights_A, *weights_B)
    return tuple(y_MO.view(*x.shape[:-1], y_MO.shape[-1]) for y_MO in outs)


def _keep(x_MI: Tensor, dropout: float, seed: int) -> Tensor:
    """1 where dropout keeps x, to be scaled by 1 / (1 - p); else 0."""
    generator = None if x_MI.is_meta else torch.Generator(x_MI.device).manual_seed(seed)  # meta draws no values
    return torch.empty_like(x_MI).bernoulli_(1 - dropout, generator=generator)


class _Copies:
    """The factors of all branches in the compute dtype: one copy and one cast for all of them, for launches cost more
    than bytes on a card."""

    @torch.no_grad()
    def __init__(self, branches: Sequence[Branch], dtype: torch.dtype) -> None:
        self.branches = tuple(branches)
        factors = [branch.weight_A_rI for branch in branches] + [branch.weight_B_Or for branch in branches]
        flat = torch.cat([factor.flatten() for factor in factors]).to(dtype)
        weight_A, *weights_B = flat.split([self._num_a, *(factor.numel() for factor in factors[len(branches) :])])
        self.weights_A_RI = weight_A.view(-1, factors[0].shape[1])
        self.weights_B = [copy.view_as(branch.weight_B_Or) for copy, branch in zip(weights_B, branches, strict=True)]

    @property
    def _num_a(self) -> int:
        return sum(branch.weight_A_rI.numel() for branch in self.branches)


class _Down(torch.autograd.Function):
    """d A^T of all branches, and the keeper of the saved tensors. Its own backward has nothing left to do."""

    @staticmethod
    def forward(ctx: Any, x_MI: Tensor, weights_A_RI: Tensor, dropout: float, seed: int, *_: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        dropped_MI = (x_MI * _keep(x_MI, dropout, seed)).mul_(1 / (1 - dropout)) if dropout else x_MI
        down_MR = dropped_MI @ weights_A_RI.t()
        ctx.save_for_backward(x_MI, down_MR)
        return down_MR

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        return (None,) * len(ctx.needs_input_grad)


class _Join(torch.autograd.Function):
    """The base matmuls with the branches added, and all gradients."""

    @staticmethod
    def forward(
        ctx: Any, x_MI: Tensor, down_MR: Tensor, copies: _Copies, dropout: float, seed: int, *_: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.down = down_MR.grad_fn
        # Parameters are held as they are: what save_for_backward keeps inside a checkpoint would be computed again, and
        # copies would stay alive until backward.
        ctx.branches, ctx.dropout, ctx.seed = copies.branches, dropout, seed
        outs = []
        parts = zip(copies.branches, copies.weights_B, _parts(down_MR, copies.branches), strict=True)
        for branch, weight_B_Or, down_Mr in parts:
            y_MO = torch.nn.functional.linear(x_MI, branch.base.dense(x_MI.dtype), branch.base.bias)
            outs.append(y_MO.addmm_(down_Mr, weight_B_Or.t(), alpha=branch.scaling))
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads_MO: Tensor | None) -> tuple[Tensor | None, ...]:
        x_MI, down_MR = ctx.down.saved_tensors
        branches: tuple[Branch, ...] = ctx.branches
        copies = _Copies(branches, down_MR.dtype)
        grad_down_MR, grad_x_MI = torch.empty_like(down_MR), None
        grads_B: list[Tensor | None] = []
        downs, grad_downs = _parts(down_MR, branches), _parts(grad_down_MR, branches)
        for branch, weight_B_Or, grad_MO, down_Mr, grad_down_Mr in zip(
            branches, copies.weights_B, grads_MO, downs, grad_downs, strict=True
        ):
            if grad_MO is None:  # nobody read this output
                grad_down_Mr.zero_()
                grads_B.append(None)
                continue
            grad_down_Mr.addmm_(grad_MO, weight_B_Or, beta=0, alpha=branch.scaling)
            # (r, M) x (M, O) reads dy once, in the order in which it lies in memory. Laid out as B is, a gradient is
            # taken over by autograd as it is.
            grad_B_Or = (down_Mr.t() @ grad_MO).t().to(torch.float32, memory_format=torch.contiguous_format)
            grads_B.append(grad_B_Or.contiguous().mul_(branch.scaling))
            if ctx.needs_input_grad[0]:
                weight_OI = branch.base.dense(grad_MO.dtype)
                grad_x_MI = grad_MO @ weight_OI if grad_x_MI is None else grad_x_MI.addmm_(grad_MO, weight_OI)
        keep_MI = _keep(x_MI, ctx.dropout, ctx.seed) if ctx.dropout else None
        dropped_MI = x_MI if keep_MI is None else (x_MI * keep_MI).mul_(1 / (1 - ctx.dropout))
        grad_A_RI = (grad_down_MR.t() @ dropped_MI).to(torch.float32)
        if grad_x_MI is not None:
            if keep_MI is None:
                grad_x_MI.addmm_(grad_down_MR, copies.weights_A_RI)
            else:
                grad_x_MI.addcmul_(grad_down_MR @ copies.weights_A_RI, keep_MI, value=1 / (1 - ctx.dropout))
        grads_A = grad_A_RI.split([branch.weight_A_rI.shape[0] for branch in branches])
        return grad_x_MI, None, None, None, None, *grads_A, *grads_B


def _parts(stacked_MR: Tensor, branches: Sequence[Branch]) -> tuple[Tensor, ...]:
    """The columns of each branch, as views."""
    if len(branches) == 1:
        return (stacked_MR,)
    return stacked_MR.split([branch.weight_A_rI.shape[0] for branch in branches], dim=1)
