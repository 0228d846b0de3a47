"""The training loop: one page. Everything that one step does is visible in order."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from peft import PeftModel

from qlora_train.artifacts import RunDir
from qlora_train.data.loader import Loader, MicroBatch, eval_batches
from qlora_train.data.table import TokenTable
from qlora_train.errors import Interrupted, ResumeError
from qlora_train.evaluate.validation import Validation, validate
from qlora_train.model.causal import CausalModel
from qlora_train.recipe.schema import Recipe
from qlora_train.train.checkpoint import retire_old, save_checkpoint
from qlora_train.train.metrics import Metrics, Progress, Reporter, peak_memory_bytes
from qlora_train.train.optim import lr_factor
from qlora_train.train.signals import StopRequest
from qlora_train.train.state import Binding, TrainState
from qlora_train.train.step import accumulate_gradients, train_step


@dataclass(frozen=True)
class Job:
    """What the loop works on; built by `train.setup`, never changed."""

    recipe: Recipe
    run_dir: RunDir
    causal: CausalModel
    model: PeftModel
    optimizer: torch.optim.Optimizer
    accelerator: Accelerator
    loader: Loader
    eval_table: TokenTable | None
    pad_token_id: int
    binding: Binding
    reporter: Reporter

    @property
    def num_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.loader.num_steps(self.recipe.train.epochs, self.recipe.train.max_steps)


def run_loop(job: Job, state: TrainState, metrics: Metrics, stop: StopRequest) -> Validation | None:
    """Train from `state.step` to the end; `state` is brought forward in place. Returns the held-out loss at the end.

    Raises NumericsError before an update that is not finite, Interrupted after saving when a signal asked to stop, and
    ResumeError when the data's order is not the one in which the rows so far came.
    """
    _check_position(job.loader, state)
    train, seed, device = job.recipe.train, job.recipe.run.seed, job.accelerator.device
    num_steps = job.num_steps
    validation: Validation | None = None
    job.model.train()
    for step in range(state.step, num_steps):
        started = time.perf_counter()
        learning_rate = train.learning_rate * lr_factor(step, num_steps, train.warmup_frac, train.schedule)
        result = train_step(
            job.causal,
            job.loader.step(step),
            job.optimizer,
            job.accelerator,
            seed=seed,
            step=step,
            learning_rate=learning_rate,
            max_grad_norm=train.max_grad_norm,
        )
        step_s = time.perf_counter() - started
        state.step = step + 1
        state.train_s += step_s
        state.num_rows += result.num_rows
        state.num_tokens += result.num_tokens
        state.num_supervised_tokens += result.num_supervised_tokens
        progress = Progress(
            step=state.step,
            num_steps=num_steps,
            loss=result.loss,
            grad_norm=result.grad_norm,
            learning_rate=learning_rate,
            supervised_tokens_per_s=result.num_supervised_tokens / step_s,
            tokens_per_s=result.num_tokens / step_s,
            eta_s=state.train_s / state.step * (num_steps - state.step),
            memory_gib=peak_memory_bytes(device) / 2**30,
        )
        job.reporter.step(progress)
        is_last = state.step == num_steps
        if is_last or state.step % job.recipe.run.log_every == 0:
            metrics.write(
                "train",
                state.step,
                loss=result.loss,
                grad_norm=result.grad_norm,
                learning_rate=learning_rate,
                num_tokens=result.num_tokens,
                num_supervised_tokens=result.num_supervised_tokens,
                step_s=step_s,
            )
        is_best = False
        if job.eval_table is not None and (is_last or _due(state.step, job.recipe.eval.every)):
            validation = evaluate_now(job, job.eval_table)
            metrics.write(
                "eval", state.step, eval_loss=validation.loss, num_eval_tokens=validation.num_supervised_tokens
            )
            job.reporter.evaluation(state.step, validation.loss)
            is_best = state.best_eval_loss is None or validation.loss < state.best_eval_loss
            if is_best:
                state.best_step, state.best_eval_loss = state.step, validation.loss
        if is_last or is_best or stop.signal_number is not None or _due(state.step, train.save_every):
            state.plan_sha256 = job.loader.plan_digest(state.step)
            checkpoint = save_checkpoint(job.run_dir, state, job.model, job.optimizer, job.binding)
            retire_old(job.run_dir, train.keep, state.best_step)
            if stop.signal_number is not None and not is_last:
                raise Interrupted(stop.signal_number, f"saved {checkpoint.folder}; go on with --resume")
    return validation


def _check_position(loader: Loader, state: TrainState) -> None:
    """The next rows are exactly those that would have come."""
    if state.step == 0:
        return
    what = ""
    if (expected := loader.rows_before(state.step)) != state.num_rows:
        what = f"{state.num_rows:,} rows were consumed by step {state.step}, {expected:,} in today's order of the data"
    elif (digest := loader.plan_digest(state.step)) != state.plan_sha256:
        what = f"the order of the rows at step {state.step} is {digest[:16]} today, and was {state.plan_sha256[:16]}"
    if what:
        fix = "resume with the code and the library versions that began the run, or start a new run in another run.dir"
        raise ResumeError(what, fix=fix)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def evaluate_now(job: Job, table: TokenTable) -> Validation:
    """The held-out loss of the model as it is."""
    batches = eval_batches(table, job.recipe.eval.batch_size, job.pad_token_id)
    return validate(job.causal, batches, job.accelerator.device)


def rehearse(job: Job) -> MicroBatch:
    """Forward and backward of the largest micro-batch, and the largest evaluation batch, before step 1.

    What would run out of memory in an hour does so now. Gradients are dropped; nothing is changed.
    """
    largest = job.loader.longest_micro_batch()
    job.model.train()
    accumulate_gradients(job.causal, [largest], job.accelerator, seed=job.recipe.run.seed, step=-1)
    dead = [n for n, p in job.model.named_parameters() if p.requires_grad and p.grad is None]
    assert not dead, f"no gradient reaches {dead[0]}"
    job.optimizer.zero_grad(set_to_none=True)
    if job.eval_table is not None:
        first = next(iter(eval_batches(job.eval_table, job.recipe.eval.batch_size, job.pad_token_id)))
        validate(job.causal, [first], job.accelerator.device)
    return largest
