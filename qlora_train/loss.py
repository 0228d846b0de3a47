"""Summed cross-entropy over supervised tokens through an output head, frozen but for chosen rows; never all logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Logits of a chunk, in the compute dtype: large enough that reading W for each chunk costs little next to the matmul.
CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 256 * 2**20}
# Of those, the part that is softmaxed at once, in float32: on a CPU it stays in the cache through all passes over it.
BLOCK_BYTES = {"cpu": 4 * 2**20, "cuda": 256 * 2**20}
ALIGNMENT = 64  # values that a line of logits is a multiple of, where rows follow the table's last


class TrainedRows(NamedTuple):
    """Rows of a table (V, H) that train while the others are frozen."""

    ids_R: Tensor  # int64, ascending, no two alike
    rows_RH: Tensor  # float32; computed with in the dtype of what they meet
    num_new: int = 0  # so many of the last have ids V, V + 1, ...: the table has none for them


def head_logits(hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, rows: TrainedRows | None) -> Tensor:
    """`hidden W^T + b` (N, V), with trained rows, which take no bias, in place of those of W; differentiable.

    Nothing of the size of W is made.
    """
    logits_NV = torch.nn.functional.linear(hidden_NH, weight_VH, bias_V)
    return logits_NV if rows is None else put_rows(logits_NV, hidden_NH, rows)


def put_rows(logits_NV: Tensor, hidden_NH: Tensor, rows: TrainedRows) -> Tensor:
    """The logits of trained rows, in place of those of the table and after them. Overwrites or copies `logits_NV`."""
    if rows.num_new:
        logits_NV = torch.nn.functional.pad(logits_NV, (0, rows.num_new))
    return _overwrite(logits_NV, hidden_NH, rows)


def _overwrite(logits_NV: Tensor, hidden_NH: Tensor, rows: TrainedRows) -> Tensor:
    own_NR = torch.nn.functional.linear(hidden_NH, rows.rows_RH.to(hidden_NH.dtype))
    return logits_NV.index_copy_(-1, rows.ids_R, own_NR)


def _chunk_logits(hidden_CH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, rows: TrainedRows | None) -> Tensor:
    """As `head_logits`, not differentiable: where rows follow the table's last, they are made without a copy.

    Each line of them begins at a multiple of ALIGNMENT, as fast matmuls want it.
    """
    if rows is None or not rows.num_new:
        return head_logits(hidden_CH, weight_VH, bias_V, rows)
    num_frozen = weight_VH.shape[0]
    num_all = num_frozen + rows.num_new
    logits_CV = hidden_CH.new_empty((len(hidden_CH), -(-num_all // ALIGNMENT) * ALIGNMENT))[:, :num_all]
    if bias_V is None:
        torch.mm(hidden_CH, weight_VH.T, out=logits_CV[:, :num_frozen])
    else:
        torch.addmm(bias_V, hidden_CH, weight_VH.T, out=logits_CV[:, :num_frozen])
    return _overwrite(logits_CV, hidden_CH, rows)


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
    """The gradient is formed chunk by chunk in the forward, so that backward holds (N, H) and no logits.

    Backward scales it in place: torch refuses a second backward pass, as it does for everything that was changed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        ids_R: Tensor | None,
        rows_RH: Tensor | None,
        num_new: int,
        labels_N: Tensor,
        weights_N: Tensor | None,
        softcap: float,
        chunk: int,
        block: int,
    ) -> Tensor:
        loss_sum = torch.zeros((), dtype=torch.float32, device=hidden_NH.device)
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[4]
        rows = None if ids_R is None or rows_RH is None else TrainedRows(ids_R, rows_RH, num_new)
        grad_NH = torch.empty_like(hidden_NH) if needs_grad else None
        grad_RH = torch.zeros_like(rows.rows_RH) if rows is not None and needs_grad else None
        # Without values, two chunks show what all of them take.
        num_tokens = min(hidden_NH.shape[0], 2 * chunk) if hidden_NH.is_meta else hidden_NH.shape[0]
        for start in range(0, num_tokens, chunk):
            hidden_CH = hidden_NH[start : start + chunk]
            logits_CV = _chunk_logits(hidden_CH, weight_VH, bias_V, rows)
            for first in range(0, logits_CV.shape[0], block):
                part = slice(start + first, start + min(first + block, logits_CV.shape[0]))
                weights = None if weights_N is None else weights_N[part]
                loss_sum += _loss_and_slope(
                    logits_CV[first : first + block], labels_N[part], weights, softcap, needs_grad
                )
            if grad_NH is not None:  # what were logits are their gradients now
                grad_CH = grad_NH[start : start + chunk]
                if rows is None or grad_RH is None:
                    torch.mm(logits_CV, weight_VH, out=grad_CH)
                else:
                    _add_gradients(logits_CV, hidden_CH, weight_VH, rows, grad_CH, grad_RH)
        ctx.save_for_backward(grad_NH, grad_RH)
        ctx.chunk = chunk
        return loss_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad_NH, grad_RH = ctx.saved_tensors
        for grad_CH in grad_NH.split(ctx.chunk):  # in float32: 1 / count in bfloat16 would be off by up to 0.4 %
            grad_CH.copy_(grad_CH.float().mul_(grad_loss))
        grad_rows = None if grad_RH is None else grad_RH.mul_(grad_loss)
        return grad_NH, None, None, None, grad_rows, *[None] * 6


def _add_gradients(
    slopes_CV: Tensor, hidden_CH: Tensor, weight_VH: Tensor, rows: TrainedRows, grad_CH: Tensor, grad_RH: Tensor
) -> None:
    """Write a chunk's gradient of the hidden states, and add that of the trained rows, which is summed in float32.

    Overwrites the slopes of the trained rows: those of W under them take no part.
    """
    own_CR = slopes_CV.index_select(1, rows.ids_R)
    slopes_CV.index_fill_(1, rows.ids_R, 0)
    torch.mm(slopes_CV[:, : weight_VH.shape[0]], weight_VH, out=grad_CH)
    grad_CH.addmm_(own_CR, rows.rows_RH.to(grad_CH.dtype))
    grad_RH.addmm_(own_CR.float().T, hidden_CH.float())


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
    rows: TrainedRows | None = None,
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
    gradient reaches W or b, and asking for one raises ValueError. `rows` stand in place of those of W, and get theirs:
    `G[:, ids]^T hidden`, of the logits' gradient G, in float32. An empty batch gives 0 and a zero gradient.

    Cost: two matmuls of N x V x H, one where no gradient is wanted; memory CHUNK_BYTES and two to three BLOCK_BYTES
    plus one copy of hidden_NH, whatever N and V are. R trained rows take R x H twice, for their gradient and in the
    compute dtype, and a chunk's hidden states and logits of these rows in float32. `sizes` is the number of tokens of a
    chunk and of a block, if not `chunk_tokens`'s. Equal to `F.cross_entropy(..., reduction="sum")` for all sizes, with
    trained rows too: tests/numerics/test_loss.py, tests/numerics/test_token_rows.py.
    """
    if weight_VH.requires_grad or (bias_V is not None and bias_V.requires_grad):
        raise ValueError("linear_cross_entropy_sum works with a frozen head only")
    if rows is not None and not torch.is_grad_enabled():
        rows = rows._replace(rows_RH=rows.rows_RH.detach())  # else a gradient would be formed
    chunk, block = sizes or chunk_tokens(weight_VH.shape[0], hidden_NH.dtype, hidden_NH.device)
    result: Tensor = _LinearCrossEntropySum.apply(
        hidden_NH, weight_VH, bias_V, *(rows or (None, None, 0)), labels_N, weights_N, softcap, chunk, block
    )
    return result
