"""Summed cross-entropy over supervised tokens through a frozen output head, never holding all logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Logits of a chunk, in the compute dtype: large enough that reading W for each chunk costs little next to the matmul.
CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 256 * 2**20}
# Of those, the part that is softmaxed at once, in float32: on a CPU it stays in the cache through all passes over it.
BLOCK_BYTES = {"cpu": 4 * 2**20, "cuda": 256 * 2**20}


def chunk_tokens(vocab_size: int, dtype: torch.dtype, device: torch.device) -> tuple[int, int]:
    """Tokens of a chunk, and of a block within it: a function of the vocabulary and the device's kind alone, so that a
    run's sums are the same on every machine of that kind.

    >>> chunk_tokens(49_152, torch.bfloat16, torch.device("cpu"))
    (341, 21)
    """
    kind = "cpu" if device.type == "cpu" else "cuda"
    chunk = max(16, CHUNK_BYTES[kind] // (dtype.itemsize * vocab_size))
    return chunk, min(chunk, max(1, BLOCK_BYTES[kind] // (4 * vocab_size)))


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
        block: int,
    ) -> Tensor:
        loss_sum = torch.zeros((), dtype=torch.float32, device=hidden_NH.device)
        grad_NH = torch.empty_like(hidden_NH) if ctx.needs_input_grad[0] else None
        # Without values, two chunks show what all of them take.
        num_tokens = min(hidden_NH.shape[0], 2 * chunk) if hidden_NH.is_meta else hidden_NH.shape[0]
        for start in range(0, num_tokens, chunk):
            logits_CV = torch.nn.functional.linear(hidden_NH[start : start + chunk], weight_VH, bias_V)
            for first in range(0, logits_CV.shape[0], block):
                part = slice(start + first, start + min(first + block, logits_CV.shape[0]))
                weights = None if weights_N is None else weights_N[part]
                loss_sum += _loss_and_slope(
                    logits_CV[first : first + block], labels_N[part], weights, softcap, grad_NH is not None
                )
            if grad_NH is not None:  # what were logits are their gradients now
                torch.mm(logits_CV, weight_VH, out=grad_NH[start : start + chunk])
        ctx.save_for_backward(grad_NH)
        return loss_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        (grad_NH,) = ctx.saved_tensors
        return grad_NH * grad_loss.to(grad_NH.dtype), *[None] * 7


def _loss_and_slope(
    logits_BV: Tensor, labels_B: Tensor, weights_B: Tensor | None, softcap: float, needs_grad: bool
) -> Tensor:
    """The summed loss of a block; where gradients are wanted, they are written over the logits."""
    labels_B1 = labels_B[:, None]
    capped_BV = softcap * torch.tanh(logits_BV.float() / softcap) if softcap else logits_BV
    log_probs_BV = torch.log_softmax(capped_BV, dim=-1, dtype=torch.float32)
    losses_B = -log_probs_BV.gather(1, labels_B1)[:, 0]
    if needs_grad:
        grad_BV = log_probs_BV.exp_()
        grad_BV.scatter_add_(1, labels_B1, torch.full_like(labels_B1, -1, dtype=torch.float32))
        if softcap:
            grad_BV.mul_(1 - (capped_BV / softcap).square())
        if weights_B is not None:
            grad_BV.mul_(weights_B[:, None])
        logits_BV.copy_(grad_BV)
    return losses_B.sum() if weights_B is None else (weights_B * losses_B).sum()


def linear_cross_entropy_sum(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    labels_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    weights_N: Tensor | None = None,
    softcap: float = 0.0,
    sizes: tuple[int, int] | None = None,
) -> Tensor:
    """`sum_n weight_n * -log softmax(cap(hidden_n W^T + b))[label_n]` in nats, a float32 scalar.

    The count, or the sum of the weights, is the caller's to divide by. weights_N is float32; None stands for all 1 and
    gives the same bits as ones do.

    hidden_NH and weight_VH share one dtype; logits are taken to float32 before the softmax; labels_N is int64 and holds
    no ignored position: gather the supervised ones first, and the others cost nothing. Where softcap is not 0,
    `cap(z) = softcap * tanh(z / softcap)`, as transformers' `final_logit_softcapping` does. The head is frozen: no
    gradient reaches W or b, and asking for one raises ValueError. An empty batch gives 0 and a zero gradient.

    Cost: two matmuls of N x V x H; memory CHUNK_BYTES and two to three BLOCK_BYTES plus one copy of hidden_NH, whatever
    N and V are. `sizes` is the number of tokens of a chunk and of a block, if not `chunk_tokens`'s. Equal to
    `F.cross_entropy(..., reduction="sum")` for all sizes: tests/numerics/test_loss.py.
    """
    if weight_VH.requires_grad or (bias_V is not None and bias_V.requires_grad):
        raise ValueError("linear_cross_entropy_sum works with a frozen head only")
    chunk, block = sizes or chunk_tokens(weight_VH.shape[0], hidden_NH.dtype, hidden_NH.device)
    result: Tensor = _LinearCrossEntropySum.apply(
        hidden_NH, weight_VH, bias_V, labels_N, weights_N, softcap, chunk, block
    )
    return result
