"""A whole training run: evaluate the base, train, evaluate the adapter, and leave a run folder that explains itself."""

from __future__ import annotations

import gc
import json
import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_train.adapters.state import save_adapter
from qlora_train.artifacts.files import explained, read_json, write_json
from qlora_train.artifacts.folders import MANIFEST, is_leftover, locked, manifest_faults, publishing, sweep
from qlora_train.artifacts.layout import RunDir
from qlora_train.errors import RecipeError, ResumeError
from qlora_train.evaluate.sides import SideScores
from qlora_train.evaluate.validation import Validation
from qlora_train.memory.live import only_new_garbage
from qlora_train.quant.fingerprint import print_base
from qlora_train.recipe.load import COMMAND_LINE, LoadedRecipe, recipe_as_dict
from qlora_train.recipe.schema import Recipe
from qlora_train.recipe.split import split_as_stored
from qlora_train.train.facts import describe, errors_recorded, write_facts
from qlora_train.train.fork import check_allowed, recipe_changes, refuse_changes
from qlora_train.train.keys import trajectory_keys
from qlora_train.train.loop import run_loop
from qlora_train.train.memory import MemoryLog
from qlora_train.train.metrics import Metrics, Reporter, last_logged_step
from qlora_train.train.rehearsal import largest_batches, rehearse
from qlora_train.train.resume import Resume, find_resume, go_on, restore
from qlora_train.train.scores import Scorer
from qlora_train.train.selfcheck import SelfCheck, selfcheck
from qlora_train.train.setup import Prepared, prepare
from qlora_train.train.signals import StopRequest, stop_requests
from qlora_train.train.state import TrainState
from qlora_train.train.trackers import tracking


@dataclass(frozen=True)
class TrainResult:
    """What came of a run. `base` and `adapter` are None where the recipe names no held-out rows."""

    run_dir: Path
    num_steps: int
    best_step: int | None
    base: SideScores | None
    adapter: SideScores | None
    num_trainable: int
    trainable_frac: float
    num_supervised_tokens: int
    supervised_tokens_per_s: float
    tokens_per_s: float
    peak_memory_bytes: int  # allocated by torch on a card; resident memory of the process on a CPU
    planned_memory_bytes: int | None  # tensors of a training step, and what was measured of them: memory.json
    measured_memory_bytes: int | None
    wall_s: float

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON; the run folder by its name, so that it can be moved."""
        return {**asdict(self), "run_dir": self.run_dir.name}

    @classmethod
    def from_dict(cls, run_dir: Path, data: dict[str, Any]) -> TrainResult:
        """The inverse of `as_dict`."""
        sides = {k: SideScores.from_dict(data[k]) if data[k] else None for k in ("base", "adapter")}
        return cls(**{**data, **sides, "run_dir": run_dir})


def run_training(
    loaded: LoadedRecipe,
    *,
    resume: bool,
    from_step: int | None,
    allow_change: Sequence[str] = (),
    reporter: Reporter,
) -> TrainResult:
    """Train a recipe from start to end; see `api.train` for what it raises."""
    recipe, run_dir, started = loaded.recipe, RunDir(loaded.recipe.run.dir), time.perf_counter()
    allowed = check_allowed(allow_change, recipe)
    if recipe.run.threads is not None:
        torch.set_num_threads(recipe.run.threads)
    with explained(run_dir.root):  # which may lie where nobody may look
        if not resume:
            refuse_used(run_dir)
        elif (done := _already_complete(run_dir, loaded, from_step, allowed)) is not None:
            reporter.message(f"{run_dir.root} is already complete; nothing was done")
            return done
    memory = MemoryLog(recipe, run_dir, reporter)
    with locked(run_dir), stop_requests() as stop, errors_recorded(run_dir):
        if not resume:
            refuse_used(run_dir)  # once more: another process may have made a run there until we had the lock
        sweep(run_dir.root)
        sweep(run_dir.checkpoints)
        going_on = find_resume(run_dir, loaded, from_step, allowed, reporter) if resume else None
        memory.holds_back = resume
        prepared = _load(recipe, run_dir, reporter, going_on, memory)
        stop.check()
        scorer = Scorer(prepared, memory)
        state, changes = restore(going_on, prepared, loaded) if going_on else (TrainState(), [])
        checked = _check(prepared, memory)
        if going_on is None:
            write_facts(loaded, prepared, checked)
        _rehearse(prepared, scorer, state, memory)
        stop.check()
        base = scorer.base(resumed=resume)
        stop.check()
        if going_on is not None:  # only now: whatever refused or stopped so far has left the run as it was
            go_on(going_on, prepared, state, changes, scorer)
            write_facts(loaded, prepared, checked)
        memory.holds_back = False
        memory.write()
        scorer.keep_base(base)
        validation = _train(loaded, prepared, state, base, stop, memory, resumed=resume)
        adapter = scorer.adapter(state, validation)
        _publish(prepared, state, memory)
        result = _result(prepared, state, memory, base, adapter, time.perf_counter() - started)
        write_json(run_dir.summary, result.as_dict())
        return result


def _load(recipe: Recipe, run_dir: RunDir, reporter: Reporter, going_on: Resume | None, memory: MemoryLog) -> Prepared:
    """Data, base and adapter."""
    with memory.during("loading", "while data and model were loaded, before the first step"):
        if going_on is None:
            return prepare(recipe, run_dir, reporter)
        bound, folder = going_on.binding.get("recipe", {}), going_on.checkpoint.folder
        return prepare(recipe, run_dir, reporter, bound=bound, checkpoint=folder)


def _check(prepared: Prepared, memory: MemoryLog) -> SelfCheck:
    """Before the first step: rows do not see each other."""
    with memory.during("checking", "in the selfcheck before the first step"):
        return _selfcheck(prepared)


def _rehearse(prepared: Prepared, scorer: Scorer, state: TrainState, memory: MemoryLog) -> None:
    """Before the first step: the largest of everything fits."""
    job = prepared.job
    describe(prepared)
    batches = largest_batches(job)
    memory.settle(job.recipe, prepared.inputs.config, prepared.speed, int(job.table.lengths.max()), batches)
    rehearse(prepared, batches, scorer.questions, state, memory)
    for line in memory.summary():
        job.reporter.message(line)
    memory.compare()


def _selfcheck(prepared: Prepared) -> SelfCheck:
    """Rows together are what they are alone; ModelError where they are not."""
    job, packed = prepared.job, prepared.job.recipe.data.batching == "packed"
    checked = selfcheck(job.causal, job.table, job.pad_token_id, job.accelerator.device, packed=packed)
    job.reporter.message(f"selfcheck: {checked.summary()}")
    return checked


def _train(
    loaded: LoadedRecipe,
    prepared: Prepared,
    state: TrainState,
    base: SideScores | None,
    stop: StopRequest,
    memory: MemoryLog,
    *,
    resumed: bool,
) -> Validation | None:
    """The loop, with its log and its trackers. Afterwards the base has every byte that it had."""
    job = prepared.job
    run_dir, reporter = job.run_dir, job.reporter
    with tracking(job.recipe, run_dir, reporter, resumed=resumed, step=state.step) as trackers:
        if base is not None and not resumed:
            trackers.log("eval", 0, {"eval_loss": base.loss})
        metrics = Metrics(
            run_dir.metrics,
            after_step=state.step,
            evaluation_due=state.evaluation_due,
            follower=trackers,
            warn=reporter.warning,
        )
        gc.collect()  # what loading and rehearsing left; then the collector has no business with the libraries' objects
        with stop.waiting(), only_new_garbage():
            validation = run_loop(job, state, metrics, stop, memory, command=command_of(loaded))
    if metrics.failed:
        reporter.warning(f"metrics are incomplete: {metrics.failed}")
    if print_base(job.model).digest != prepared.base.print.digest:
        raise AssertionError("the frozen base changed during training")
    return validation


def _publish(prepared: Prepared, state: TrainState, memory: MemoryLog) -> None:
    """The adapter that eval, chat and export use, bound to what it was trained with."""
    job = prepared.job
    bound = {"step": state.best_step or state.step, **job.binding.as_dict()}
    with publishing(job.run_dir.adapter, manifest=bound, replace=True) as folder:
        save_adapter(job.model, folder)
        if job.recipe.adapter.new_tokens:  # other programs need the ids that its rows belong to
            job.tokenizer.save_pretrained(str(folder))
    memory.compare()
    memory.write()


def _result(
    prepared: Prepared,
    state: TrainState,
    memory: MemoryLog,
    base: SideScores | None,
    adapter: SideScores | None,
    wall_s: float,
) -> TrainResult:
    train_s = max(state.train_s, 1e-9)
    return TrainResult(
        run_dir=prepared.job.run_dir.root,
        num_steps=state.step,
        best_step=state.best_step,
        base=base,
        adapter=adapter,
        num_trainable=prepared.facts.num_trainable,
        trainable_frac=prepared.facts.trainable_frac,
        num_supervised_tokens=state.num_supervised_tokens,
        supervised_tokens_per_s=state.num_supervised_tokens / train_s,
        tokens_per_s=state.num_tokens / train_s,
        peak_memory_bytes=memory.peak_bytes,
        planned_memory_bytes=memory.phases["training"].planned,
        measured_memory_bytes=memory.phases["training"].measured,
        wall_s=wall_s,
    )


def _already_complete(
    run_dir: RunDir, loaded: LoadedRecipe, from_step: int | None, allowed: frozenset[str]
) -> TrainResult | None:
    """What came of a run that has ended, where there is nothing to go on with; ResumeError where there is no run.

    OtherRun where the recipe is not the one that it was trained with, ResumeError where its adapter is damaged.
    """
    if not run_dir.root.is_dir():
        raise ResumeError(f"{run_dir.root} does not exist: there is nothing to resume", fix="start without --resume")
    if from_step is not None or allowed or not run_dir.summary.is_file():
        return None
    if faults := manifest_faults(run_dir.adapter):
        raise ResumeError(
            f"{run_dir.root} has ended, and its adapter is not as it was written: {'; '.join(faults)}",
            fix=f"make it again from the last checkpoint: --resume --from {max(run_dir.checkpoint_steps(), default=0)}",
        )
    stored = read_json(run_dir.adapter / MANIFEST)["recipe"]
    now = trajectory_keys(split_as_stored(loaded.recipe, stored))
    refuse_changes(recipe_changes(stored, now, loaded.origins), frozenset(), f"{run_dir.root}, which has ended")
    return TrainResult.from_dict(run_dir.root, read_json(run_dir.summary))


def refuse_used(run_dir: RunDir) -> None:
    """A new run starts in a new folder: nothing of an older one is touched."""
    if run_dir.root.exists() and not run_dir.root.is_dir():
        raise RecipeError(f"run.dir: {run_dir.root} is a file", fix="name a folder")
    if run_dir.checkpoint_steps():
        raise RecipeError(
            f"run.dir: {run_dir.root} already holds a run: {describe_run(run_dir)}",
            fix="go on with it: --resume, or --resume --from STEP; or choose another run.dir, or remove the folder",
        )
    # A run that ended before its first checkpoint left facts behind that the next one writes anew.
    own = {path.name for path in run_dir.facts()}
    there = sorted(p.name for p in run_dir.root.iterdir() if p.name not in own) if run_dir.root.is_dir() else []
    if foreign := [name for name in there if not is_leftover(name)]:
        raise RecipeError(
            f"run.dir: {run_dir.root} holds other things already ({', '.join(foreign[:6])})",
            fix="choose another run.dir, or empty this one",
        )


def describe_run(run_dir: RunDir) -> str:
    """What a run folder holds, in words: ended or not, when, after how many steps, and its checkpoints."""
    checkpoints = ", ".join(map(str, run_dir.checkpoint_steps()))
    newest = run_dir.summary if run_dir.summary.is_file() else run_dir.metrics
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(newest.stat().st_mtime)) if newest.exists() else "unknown"
    if newest == run_dir.summary:
        state = f"ended {when} after {read_json(run_dir.summary)['num_steps']:,} steps"
    else:
        state = f"not ended, {last_logged_step(run_dir.metrics):,} steps logged, last written {when}"
    return f"{state}; checkpoints of steps {checkpoints}"


def command_of(loaded: LoadedRecipe) -> str:
    """The command that trains this recipe with these overrides."""
    sections: Any = recipe_as_dict(loaded.recipe)
    given = [key for key, origin in loaded.origins.items() if origin == COMMAND_LINE]
    values = ((key, sections[key.partition(".")[0]][key.partition(".")[2]]) for key in given)
    overrides = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values]
    return shlex.join(["qlora-train", "train", str(loaded.path), *overrides])
