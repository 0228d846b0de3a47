"""The training loop: one page. Everything that one step does is visible in order."""

from __future__ import annotations

import time
from functools import partial

from qlora_train.data.loader import Loader, eval_batches
from qlora_train.data.table import TokenTable
from qlora_train.errors import Interrupted, NumericsError, ResumeError
from qlora_train.evaluate.validation import TRAINED_FIX, Validation, validate
from qlora_train.train.checkpoint import Checkpoint, retire_old, save_checkpoint, when_there_is_room
from qlora_train.train.flight import FlightRecorder, trained_values_are_finite
from qlora_train.train.job import Job
from qlora_train.train.memory import MemoryLog
from qlora_train.train.metrics import Metrics, Progress
from qlora_train.train.optim import lr_factor, optimizer_figures
from qlora_train.train.signals import StopRequest
from qlora_train.train.state import TrainState
from qlora_train.train.step import HALF_UPDATED, StepResult, train_step
from qlora_train.train.watch import WINDOW, spike_limit

ROWS_NAMED = 4  # of a step, in a warning


def run_loop(
    job: Job, state: TrainState, metrics: Metrics, stop: StopRequest, memory: MemoryLog, *, command: str
) -> Validation | None:
    """Train from `state.step` to the end; `state` is brought forward in place. Returns the held-out loss at the end.

    `command` is what started the run, for messages that say how to come to a step again. Raises NumericsError before an
    update that is not finite, Interrupted after saving when a signal asked to stop, OutOfMemory after saving what was
    trained, and ResumeError when the data's order is not the one in which the rows so far came.
    """
    check_position(job.loader, state)
    train, num_steps = job.recipe.train, job.num_steps
    validation: Validation | None = None
    rescue = partial(_save_what_was_trained, job, state, metrics)
    recorder = FlightRecorder(job, command, state.step)
    job.model.train()
    if state.evaluation_due:
        validation = _evaluate(job, state, metrics, memory, stop)
        if validation is not None:
            _save(job, state, metrics)
        stop.check()
    for step in range(state.step, num_steps):
        started = time.perf_counter()
        learning_rate = train.learning_rate * lr_factor(step, num_steps, train.warmup_frac, train.schedule)
        where = f"at step {step + 1} of {num_steps}"
        with memory.during("training", where, rescue), recorder.recording(state.step, learning_rate, rescue):
            result = train_step(
                job.causal,
                job.loader.step(step),
                job.optimizer,
                job.accelerator,
                seed=job.recipe.run.seed,
                step=step,
                learning_rate=learning_rate,
                max_grad_norm=train.max_grad_norm,
                hooks=job.hooks,
            )
        dead = recorder.note(step, result, learning_rate)
        step_s = time.perf_counter() - started
        state.count(result.num_rows, result.num_tokens, result.num_supervised_tokens, step_s)
        progress = Progress.of(state, num_steps, result, learning_rate, step_s, memory.peak_bytes)
        job.reporter.step(progress)
        if state.step == num_steps or state.step % job.recipe.run.log_every == 0:
            _log(job, metrics, result, progress, step_s)
        _tell(job, state, metrics, result, dead)
        is_last = state.step == num_steps
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


def _log(job: Job, metrics: Metrics, result: StepResult, progress: Progress, step_s: float) -> None:
    """The line of a step in metrics.jsonl, with what the optimiser's groups and the method add to it."""
    extra = {} if result.extra_loss is None else {"extra_loss": result.extra_loss}
    metrics.write(
        "train",
        progress.step,
        loss=result.loss,
        grad_norm=result.grad_norm,
        learning_rate=progress.learning_rate,
        num_tokens=result.num_tokens,
        num_supervised_tokens=result.num_supervised_tokens,
        step_s=step_s,
        peak_memory_gib=progress.memory_gib,
        **optimizer_figures(job.optimizer),
        **extra,
        **job.hooks.figures(),
    )


def _tell(job: Job, state: TrainState, metrics: Metrics, result: StepResult, dead: list[str]) -> None:
    """Warn of what a run should not do, and log it: a loss that leaps, adapters that do not learn."""
    for text in dead:
        metrics.event(state.step, "dead adapter", text=text)
        job.reporter.warning(f"step {state.step}: {text}")
    limit = spike_limit(state.recent_losses)
    state.recent_losses = [*state.recent_losses, result.loss][-WINDOW:]
    if limit is None or result.loss <= limit:
        return
    rows = [job.table.where(row) for batch in job.loader.step(state.step - 1) for row in batch.row_ids]
    metrics.event(state.step, "loss spike", loss=result.loss, limit=limit, grad_norm=result.grad_norm, rows=rows)
    named = ", ".join(rows[:ROWS_NAMED]) + (f" and {len(rows) - ROWS_NAMED} more" if len(rows) > ROWS_NAMED else "")
    job.reporter.warning(
        f"step {state.step}: the loss leaps to {result.loss:.4g}; the steps before let expect at most {limit:.4g}. "
        f"The step was taken as ever; rows {named}"
    )


def _evaluate(job: Job, state: TrainState, metrics: Metrics, memory: MemoryLog, stop: StopRequest) -> Validation | None:
    """The held-out loss after `state.step`, logged; the state knows if it is the best so far. None: still due.

    NumericsError where it is not finite: the step is saved by then.
    """
    assert job.eval_table is not None
    rescue = partial(_save_what_was_trained, job, state, metrics)
    where = f"in the evaluation after step {state.step} of {job.num_steps}"
    try:
        with memory.during("evaluation", where, rescue):
            validation = evaluate_now(job, job.eval_table, stop)
    except Interrupted:
        return None
    except NumericsError as error:
        what = f"after step {state.step}, {error.problems[0].what}"
        fix = f"lower train.learning_rate, or look at the held-out rows; {rescue(error)}"
        raise NumericsError(what, fix=fix) from error
    state.evaluation_due = False
    metrics.write("eval", state.step, eval_loss=validation.loss, num_eval_tokens=validation.num_supervised_tokens)
    job.reporter.evaluation(state.step, validation.loss)
    if state.best_eval_loss is None or validation.loss < state.best_eval_loss:
        state.best_step, state.best_eval_loss = state.step, validation.loss
        state.best_rows = job.eval_table.fingerprint()
    return validation


def _save(job: Job, state: TrainState, metrics: Metrics) -> Checkpoint:
    """A checkpoint of the state, with the order of the rows that come next, and before it the log of its steps.

    NumericsError where the step's update left values that are not finite: what was saved before stays.
    """
    if not trained_values_are_finite(job.model):
        there = max(job.run_dir.checkpoint_steps(), default=None)
        fix = "lower train.learning_rate" + (f"; go on from step {there} with --resume" if there is not None else "")
        raise NumericsError(
            f"the update of step {state.step} left values that are not finite; it is not saved", fix=fix
        )
    metrics.sync()
    state.plan_sha256 = job.loader.plan_digest(state.step)
    last_steps = job.last_steps.as_dict()
    return save_checkpoint(
        job.run_dir, state, job.model, job.optimizer, job.binding, job.hooks, job.environment, last_steps
    )


def _save_what_was_trained(job: Job, state: TrainState, metrics: Metrics, error: BaseException) -> str:
    """After a failed step or evaluation: save the last finished step if it is whole; what is there to go on from."""
    job.optimizer.zero_grad(set_to_none=True)
    there = job.run_dir.checkpoint_steps()
    is_whole = state.step > 0 and HALF_UPDATED not in getattr(error, "__notes__", ())
    failed = ""
    if is_whole and state.step not in there:
        try:
            if trained_values_are_finite(job.model):
                there[state.step] = _save(job, state, metrics).folder
            else:
                failed = f"step {state.step} is not saved, its trained values are not finite; "
        except Exception as second:  # the first error is the one to show
            failed = f"step {state.step} could not be saved ({second}); "
    if there:
        return f"{failed}go on from step {max(there)} with --resume: {there[max(there)]}"
    return f"{failed}no step was trained yet that could be saved: start again"


def check_position(loader: Loader, state: TrainState) -> None:
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


def evaluate_now(job: Job, table: TokenTable, stop: StopRequest | None = None, *, fix: str = TRAINED_FIX) -> Validation:
    """The held-out loss of the model as it is; Interrupted between two batches when `stop` is asked for.

    NumericsError with `fix` where it is not finite.
    """
    batches = eval_batches(table, job.recipe.eval.batch_size, job.pad_token_id)
    return validate(job.causal, stop.until_stopped(batches) if stop else batches, job.accelerator.device, fix=fix)
