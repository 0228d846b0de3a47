"""Summed cross-entropy over supervised tokens through a frozen output head, never holding all logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# 256 rows of a 49,152-word vocabulary in float32 are 48 MiB.
CHUNK_TOKENS = 256


class _LinearCrossEntropySum(torch.autograd.Function):
    """The gradient is formed chunk by chunk in the forward, so that backward holds (N, H) and no logits."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        labels_N: Tensor,
        weights_N: Tensor | None,
        softcap: float,
        chunk: int,
    ) -> Tensor:
        loss_sum = torch.zeros((), dtype=torch.float32, device=hidden_NH.device)
        needs_grad = ctx.needs_input_grad[0]
        grad_NH = torch.empty_like(hidden_NH) if needs_grad else None
        for start in range(0, hidden_NH.shape[0], chunk):
            hidden, labels = hidden_NH[start : start + chunk], labels_N[start : start + chunk]
            weights = None if weights_N is None else weights_N[start : start + chunk]
            logits = torch.nn.functional.linear(hidden, weight_VH, bias_V).float()
            if softcap:
                logits.div_(softcap).tanh_().mul_(softcap)
            log_norm = torch.logsumexp(logits, dim=-1)
            losses = log_norm - logits.gather(1, labels[:, None])[:, 0]
            loss_sum += losses.sum() if weights is None else (weights * losses).sum()
            if grad_NH is None:
                continue
            slope = 1 - (logits / softcap).square() if softcap else None
            grad_logits = logits.sub_(log_norm[:, None]).exp_()  # softmax, in the logits' memory
            grad_logits[torch.arange(len(labels), device=labels.device), labels] -= 1
            if slope is not None:
                grad_logits.mul_(slope)
            if weights is not None:
                grad_logits.mul_(weights[:, None])
            torch.mm(grad_logits.to(hidden.dtype), weight_VH, out=grad_NH[start : start + chunk])
        ctx.save_for_backward(grad_NH)
        return loss_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        (grad_NH,) = ctx.saved_tensors
        return grad_NH * grad_loss.to(grad_NH.dtype), None, None, None, None, None, None


def linear_cross_entropy_sum(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    labels_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    weights_N: Tensor | None = None,
    softcap: float = 0.0,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Tensor:
    """`sum_n weight_n * -log softmax(cap(hidden_n W^T + b))[label_n]` in nats, a float32 scalar.

    The count, or the sum of the weights, is the caller's to divide by. weights_N is float32; None stands for all 1 and
    gives the same bits as ones do.

    hidden_NH and weight_VH share one dtype; logits are taken to float32 before the softmax; labels_N is int64 and holds
    no ignored position: gather the supervised ones first, and the others cost nothing. Where softcap is not 0,
    `cap(z) = softcap * tanh(z / softcap)`, as transformers' `final_logit_softcapping` does. The head is frozen: no
    gradient reaches W or b, and asking for one raises ValueError. An empty batch gives 0 and a zero gradient.

    Cost: two matmuls of N x V x H; memory `chunk_tokens * V * 8` bytes plus one copy of hidden_NH, whatever N is.
    Equal to `F.cross_entropy(..., reduction="sum")` for every chunk size: tests/numerics/test_loss.py.
    """
    if weight_VH.requires_grad or (bias_V is not None and bias_V.requires_grad):
        raise ValueError("linear_cross_entropy_sum works with a frozen head only")
    result: Tensor = _LinearCrossEntropySum.apply(
        hidden_NH, weight_VH, bias_V, labels_N, weights_N, softcap, chunk_tokens
    )
    return result
