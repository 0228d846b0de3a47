"""One optimiser step: micro-batches, normalised by the supervised tokens of all of them, then clip and update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from qlora_train.adapters.hooks import NO_HOOKS, MethodHooks
from qlora_train.data.loader import MicroBatch
from qlora_train.errors import NumericsError
from qlora_train.memory.heap import HEAP
from qlora_train.model.causal import CausalModel
from qlora_train.seeds import derive_seed
from qlora_train.train.optim import set_learning_rate

HALF_UPDATED = "the optimiser failed in the middle of its update: adapter and moments are partly those of the next step"


@dataclass(frozen=True)
class StepResult:
    """What one step did. `loss` is the weighted mean over supervised tokens, in nats; `grad_norm` before clipping."""

    loss: float
    grad_norm: float
    num_rows: int
    num_tokens: int
    num_supervised_tokens: int
    extra_loss: float | None = None  # of the method, besides `loss`
    grad_norms: Tensor | None = None  # (P,) before clipping, in the order of the optimiser's parameters


class NotFinite(NumericsError):
    """Loss or gradient of a step is no number. Nothing was updated, and the gradients are gone."""

    def __init__(self, step: int, loss: float, grad_norm: float, rows: Sequence[int], grad_norms: Tensor) -> None:
        self.loss, self.grad_norm, self.grad_norms = loss, grad_norm, grad_norms
        super().__init__(
            f"step {step + 1}: loss {loss}, gradient norm {grad_norm}; rows {list(rows[:16])} of the training set",
            fix="lower train.learning_rate, or look at these rows; the adapter was not changed by this step",
        )


class _ExtraLoss:
    """The method's part of the loss, added up."""

    def __init__(self, hooks: MethodHooks) -> None:
        self._hooks = hooks
        self._sum: Tensor | None = None

    def __call__(self, share: float) -> Tensor | None:
        found = self._hooks.extra_loss(share)
        if found is not None:
            self._sum = found.detach() + (0.0 if self._sum is None else self._sum)
        return found

    def value(self) -> float | None:
        """What a step's shares came to; None where the method adds nothing."""
        return None if self._sum is None else float(self._sum)


def accumulate_gradients(
    causal: CausalModel,
    batches: Sequence[MicroBatch],
    accelerator: Accelerator,
    *,
    seed: int,
    step: int,
    extra_loss: Callable[[float], Tensor | None] = NO_HOOKS.extra_loss,
) -> float:
    """Add up the gradients of one step; returns the weighted mean loss over the supervised tokens of all micro-batches.

    Each micro-batch's summed loss is divided by the weights of all supervised tokens of the whole step: a mean of
    micro-batch means would weigh a token by the company it keeps. Dropout draws from a generator seeded by (seed, step,
    micro-step). `extra_loss` (see MethodHooks) adds to the gradients, not to what is returned.
    """
    total = sum(batch.weight_sum for batch in batches)
    loss_sum = torch.zeros((), device=accelerator.device)
    for micro_step, batch in enumerate(batches):
        torch.manual_seed(derive_seed(seed, "dropout", step, micro_step))
        loss_sum += backward(causal, batch, accelerator, total=total, extra_loss=extra_loss)
    return float(loss_sum) / total


def backward(
    causal: CausalModel,
    batch: MicroBatch,
    accelerator: Accelerator,
    *,
    total: float,
    extra_loss: Callable[[float], Tensor | None],
) -> Tensor:
    """Add the gradients of one micro-batch of a step whose supervised tokens weigh `total`; its summed loss."""
    loss_sum = causal.loss_sum(batch.to(accelerator.device))
    extra = extra_loss(batch.weight_sum / total)
    accelerator.backward(loss_sum / total if extra is None else loss_sum / total + extra)
    return loss_sum.detach()


def train_step(
    causal: CausalModel,
    batches: Sequence[MicroBatch],
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    *,
    seed: int,
    step: int,
    learning_rate: float,
    max_grad_norm: float,
    hooks: MethodHooks = NO_HOOKS,
) -> StepResult:
    """Forward, backward, clip, update. Raises NotFinite before the update when loss or gradient is no number.

    An exception leaves adapter and moments as they were, unless it bears the note HALF_UPDATED.
    """
    extra = _ExtraLoss(hooks)
    loss = accumulate_gradients(causal, batches, accelerator, seed=seed, step=step, extra_loss=extra)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    grad_norms = gradient_norms(parameters)
    norm = float(torch.linalg.vector_norm(grad_norms))
    if not (abs(loss + (extra.value() or 0.0)) < float("inf") and norm < float("inf")):
        optimizer.zero_grad(set_to_none=True)
        raise NotFinite(step, loss, norm, [row for batch in batches for row in batch.row_ids], grad_norms)
    if max_grad_norm > 0 and norm > max_grad_norm:
        nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, torch.tensor(norm, device=parameters[0].device))
    set_learning_rate(optimizer, learning_rate)
    try:
        hooks.before_step(step, optimizer)
        optimizer.step()
        hooks.after_step(step, optimizer)
    except Exception as error:
        error.add_note(HALF_UPDATED)
        raise
    optimizer.zero_grad(set_to_none=True)
    if accelerator.device.type == "cpu":
        HEAP.after_step()
    return StepResult(
        loss,
        norm,
        num_rows=sum(len(batch.row_ids) for batch in batches),
        num_tokens=sum(batch.num_tokens for batch in batches),
        num_supervised_tokens=sum(batch.num_supervised_tokens for batch in batches),
        extra_loss=extra.value(),
        grad_norms=grad_norms,
    )


@torch.no_grad()
def norms(tensors: Sequence[Tensor]) -> Tensor:
    """The Frobenius norm of each tensor, (P,) float32, on their device: one kernel for all on CUDA."""
    # What torch.nn.utils.get_total_norm calls too; it has no public name in torch 2.15.
    return torch.stack([norm.float() for norm in torch._foreach_norm(list(tensors))])


def gradient_norms(parameters: Sequence[nn.Parameter]) -> Tensor:
    """As `norms`, of the gradients; 0 where there is none."""
    places = [index for index, parameter in enumerate(parameters) if parameter.grad is not None]
    found = torch.zeros(len(parameters), device=parameters[0].device)
    if places:
        found[places] = norms([p.grad for p in parameters if p.grad is not None])
    return found
