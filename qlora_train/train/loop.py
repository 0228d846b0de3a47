"""The training loop: one page. Everything that one step does is visible in order."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial

import torch
from accelerate import Accelerator
from peft import PeftModel

from qlora_train.artifacts import RunDir
from qlora_train.data.loader import Loader, eval_batches
from qlora_train.data.table import TokenTable
from qlora_train.errors import Interrupted, ResumeError
from qlora_train.evaluate.validation import Validation, validate
from qlora_train.model.causal import CausalModel
from qlora_train.recipe.schema import Recipe
from qlora_train.train.checkpoint import Checkpoint, list_steps, retire_old, save_checkpoint, when_there_is_room
from qlora_train.train.memory import MemoryLog
from qlora_train.train.metrics import Metrics, Progress, Reporter
from qlora_train.train.optim import lr_factor
from qlora_train.train.signals import StopRequest
from qlora_train.train.state import Binding, TrainState
from qlora_train.train.step import HALF_UPDATED, train_step


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


def run_loop(job: Job, state: TrainState, metrics: Metrics, stop: StopRequest, memory: MemoryLog) -> Validation | None:
    """Train from `state.step` to the end; `state` is brought forward in place. Returns the held-out loss at the end.

    Raises NumericsError before an update that is not finite, Interrupted after saving when a signal asked to stop,
    OutOfMemory after saving what was trained, and ResumeError when the data's order is not the one in which the rows so
    far came.
    """
    _check_position(job.loader, state)
    train, seed = job.recipe.train, job.recipe.run.seed
    num_steps = job.num_steps
    validation: Validation | None = None
    rescue = partial(_save_what_was_trained, job, state, metrics)
    job.model.train()
    if state.evaluation_due:
        validation = _evaluate(job, state, metrics, memory, stop)
        if validation is not None:
            _save(job, state, metrics)
        stop.check()
    for step in range(state.step, num_steps):
        started = time.perf_counter()
        learning_rate = train.learning_rate * lr_factor(step, num_steps, train.warmup_frac, train.schedule)
        with memory.during("training", f"at step {step + 1} of {num_steps}", rescue):
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
            memory_gib=memory.peak_bytes / 2**30,
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
                peak_memory_gib=progress.memory_gib,
            )
        state.evaluation_due = job.eval_table is not None and (is_last or _due(state.step, job.recipe.eval.every))
        if state.evaluation_due:
            validation = _evaluate(job, state, metrics, memory, stop)
        is_best = state.best_step == state.step
        if is_last or is_best or stop.wants_checkpoint or _due(state.step, train.save_every):
            with memory.during("saving", f"while the checkpoint of step {state.step} was written", rescue):
                save = partial(_save, job, state, metrics)
                waits = train.on_disk_full == "wait"
                checkpoint = when_there_is_room(save, job.reporter.warning, stop) if waits else save()
            retire_old(job.run_dir, train.keep, state.best_step)
            if stop.save_requested:
                job.reporter.message(f"saved {checkpoint.folder}, as SIGUSR1 asked")
            stop.saved_in(checkpoint.folder)
            stop.check()
    return validation


def _evaluate(job: Job, state: TrainState, metrics: Metrics, memory: MemoryLog, stop: StopRequest) -> Validation | None:
    """The held-out loss after `state.step`, logged; the state knows if it is the best so far. None: still due."""
    assert job.eval_table is not None
    where = f"in the evaluation after step {state.step} of {job.num_steps}"
    try:
        with memory.during("evaluation", where, partial(_save_what_was_trained, job, state, metrics)):
            validation = evaluate_now(job, job.eval_table, stop)
    except Interrupted:
        return None
    state.evaluation_due = False
    metrics.write("eval", state.step, eval_loss=validation.loss, num_eval_tokens=validation.num_supervised_tokens)
    job.reporter.evaluation(state.step, validation.loss)
    if state.best_eval_loss is None or validation.loss < state.best_eval_loss:
        state.best_step, state.best_eval_loss = state.step, validation.loss
    return validation


def _save(job: Job, state: TrainState, metrics: Metrics) -> Checkpoint:
    """A checkpoint of the state, with the order of the rows that come next, and before it the log of its steps."""
    metrics.sync()
    state.plan_sha256 = job.loader.plan_digest(state.step)
    return save_checkpoint(job.run_dir, state, job.model, job.optimizer, job.binding)


def _save_what_was_trained(job: Job, state: TrainState, metrics: Metrics, error: BaseException) -> str:
    """After a failed step or evaluation: save the last finished step if it is whole; what is there to go on from."""
    job.optimizer.zero_grad(set_to_none=True)
    there = list_steps(job.run_dir)
    is_whole = state.step > 0 and HALF_UPDATED not in getattr(error, "__notes__", ())
    failed = ""
    if is_whole and state.step not in there:
        try:
            there[state.step] = _save(job, state, metrics).folder
        except Exception as second:  # the first error is the one to show
            failed = f"step {state.step} could not be saved ({second}); "
    if there:
        return f"{failed}go on from step {max(there)} with --resume: {there[max(there)]}"
    return f"{failed}no step was trained yet that could be saved: start again"


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


def evaluate_now(job: Job, table: TokenTable, stop: StopRequest | None = None) -> Validation:
    """The held-out loss of the model as it is; Interrupted between two batches when `stop` is asked for."""
    batches = eval_batches(table, job.recipe.eval.batch_size, job.pad_token_id)
    return validate(job.causal, stop.until_stopped(batches) if stop else batches, job.accelerator.device)
