"""One optimiser step: micro-batches, normalised by the supervised tokens of all of them, then clip and update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn

from qlora_train.data.loader import MicroBatch
from qlora_train.errors import NumericsError
from qlora_train.memory.available import return_freed_memory
from qlora_train.model.causal import CausalModel
from qlora_train.seeds import derive_seed

HALF_UPDATED = "the optimiser failed in the middle of its update: adapter and moments are partly those of the next step"


@dataclass(frozen=True)
class StepResult:
    """What one step did. `loss` is the weighted mean over supervised tokens, in nats; `grad_norm` before clipping."""

    loss: float
    grad_norm: float
    num_rows: int
    num_tokens: int
    num_supervised_tokens: int


def accumulate_gradients(
    causal: CausalModel, batches: Sequence[MicroBatch], accelerator: Accelerator, *, seed: int, step: int
) -> float:
    """Add up the gradients of one step; returns the weighted mean loss over the supervised tokens of all micro-batches.

    Each micro-batch's summed loss is divided by the weights of all supervised tokens of the whole step: a mean of
    micro-batch means would weigh a token by the company it keeps. Dropout draws from a generator seeded by (seed, step,
    micro-step).
    """
    total = sum(batch.weight_sum for batch in batches)
    loss_sum = torch.zeros((), device=accelerator.device)
    for micro_step, batch in enumerate(batches):
        torch.manual_seed(derive_seed(seed, "dropout", step, micro_step))
        batch_loss = causal.loss_sum(batch.to(accelerator.device))
        accelerator.backward(batch_loss / total)
        loss_sum += batch_loss.detach()
    return float(loss_sum) / total


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
) -> StepResult:
    """Forward, backward, clip, update. Raises NumericsError before the update when loss or gradient is not finite.

    An exception leaves adapter and moments as they were, unless it bears the note HALF_UPDATED.
    """
    loss = accumulate_gradients(causal, batches, accelerator, seed=seed, step=step)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = float(nn.utils.get_total_norm(grads)) if grads else 0.0
    if not (abs(loss) < float("inf") and norm < float("inf")):
        rows = [row for batch in batches for row in batch.row_ids]
        optimizer.zero_grad(set_to_none=True)
        raise NumericsError(
            f"step {step + 1}: loss {loss}, gradient norm {norm}; rows {rows[:16]} of the training set",
            fix="lower train.learning_rate, or look at these rows; the adapter was not changed by this step",
        )
    if max_grad_norm > 0 and norm > max_grad_norm:
        nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, torch.tensor(norm, device=parameters[0].device))
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    try:
        optimizer.step()
    except Exception as error:
        error.add_note(HALF_UPDATED)
        raise
    optimizer.zero_grad(set_to_none=True)
    if accelerator.device.type == "cpu":
        return_freed_memory()
    return StepResult(
        loss,
        norm,
        num_rows=sum(len(batch.row_ids) for batch in batches),
        num_tokens=sum(batch.num_tokens for batch in batches),
        num_supervised_tokens=sum(batch.num_supervised_tokens for batch in batches),
    )
