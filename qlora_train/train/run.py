"""A whole training run: evaluate the base, train, evaluate the adapter, and leave a run folder that explains itself."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_train.adapters.state import save_adapter
from qlora_train.artifacts import (
    MANIFEST,
    RunDir,
    is_leftover,
    locked,
    publishing,
    read_json,
    sweep,
    write_json,
)
from qlora_train.errors import RecipeError, ResumeError
from qlora_train.evaluate.sides import SideScores
from qlora_train.quant.fingerprint import print_base
from qlora_train.recipe.load import LoadedRecipe
from qlora_train.recipe.schema import Recipe
from qlora_train.train.checkpoint import (
    Checkpoint,
    find_checkpoint,
    list_steps,
    restore_checkpoint,
    retire_newer,
    stored_binding,
)
from qlora_train.train.facts import describe, write_facts
from qlora_train.train.loop import run_loop
from qlora_train.train.memory import MemoryLog
from qlora_train.train.metrics import Metrics, Reporter
from qlora_train.train.rehearsal import largest_batches, rehearse
from qlora_train.train.scores import Scorer, forget_lost_best
from qlora_train.train.selfcheck import SelfCheck, selfcheck
from qlora_train.train.setup import Prepared, prepare
from qlora_train.train.signals import stop_requests
from qlora_train.train.speed import split_as_stored
from qlora_train.train.state import TrainState, trajectory_keys
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


def run_training(loaded: LoadedRecipe, *, resume: bool, from_step: int | None, reporter: Reporter) -> TrainResult:
    """Train a recipe from start to end; see `api.train` for what it raises."""
    recipe, run_dir, started = loaded.recipe, RunDir(loaded.recipe.run.dir), time.perf_counter()
    if recipe.run.threads is not None:
        torch.set_num_threads(recipe.run.threads)
    if not resume:
        refuse_used(run_dir)
    elif from_step is None and run_dir.summary.is_file():
        _refuse_other_recipe(run_dir, recipe)
        reporter.message(f"{run_dir.root} is already complete; nothing was done")
        return TrainResult.from_dict(run_dir.root, read_json(run_dir.summary))
    elif not run_dir.root.is_dir():
        raise ResumeError(f"{run_dir.root} does not exist: there is nothing to resume", fix="start without --resume")
    memory = MemoryLog(recipe, run_dir, reporter)
    with locked(run_dir), stop_requests() as stop:
        if not resume:
            refuse_used(run_dir)  # once more: another process may have made a run there until we had the lock
        sweep(run_dir.root)
        sweep(run_dir.checkpoints)
        checkpoint = _checkpoint_to_resume(run_dir, from_step, reporter) if resume else None
        bound = stored_binding(checkpoint).get("recipe", {}) if checkpoint else None
        with memory.during("loading", "while data and model were loaded, before the first step"):
            prepared = prepare(recipe, run_dir, reporter, bound=bound)
        stop.check()
        job, state = prepared.job, TrainState()
        scorer = Scorer(prepared, memory)
        if checkpoint is not None:
            state = restore_checkpoint(checkpoint, job.model, job.optimizer, job.binding)
            run_dir.summary.unlink(missing_ok=True)
            retire_newer(run_dir, state.step)
            forget_lost_best(run_dir, state, reporter)
            scorer.forget_other_best(state)
            reporter.message(f"resumed from {checkpoint.folder.name}")
        with memory.during("checking", "in the selfcheck before the first step"):
            checked = _selfcheck(prepared)
        write_facts(loaded, prepared, checked)
        describe(prepared)
        batches = largest_batches(job)
        longest_row = int(prepared.inputs.train.table.lengths.max())
        memory.settle(job.recipe, prepared.inputs.config, prepared.speed, longest_row, batches)
        rehearse(prepared, batches, scorer.questions, state, memory)
        for line in memory.summary():
            reporter.message(line)
        memory.compare()
        memory.write()
        stop.check()
        base_scores = scorer.base(resumed=checkpoint is not None)
        stop.check()
        with tracking(recipe, run_dir, reporter, resumed=checkpoint is not None, step=state.step) as trackers:
            if base_scores is not None and checkpoint is None:
                trackers.log("eval", 0, {"eval_loss": base_scores.loss})
            metrics = Metrics(
                run_dir.metrics,
                after_step=state.step,
                evaluation_due=state.evaluation_due,
                follower=trackers,
                warn=reporter.warning,
            )
            with stop.waiting():
                validation = run_loop(job, state, metrics, stop, memory)
        if metrics.failed:
            reporter.warning(f"metrics are incomplete: {metrics.failed}")
        if print_base(job.model).digest != prepared.base.print.digest:
            raise AssertionError("the frozen base changed during training")
        adapter_scores = scorer.adapter(state, validation)
        bound = {"step": state.best_step or state.step, **job.binding.as_dict()}
        with publishing(run_dir.adapter, manifest=bound, replace=True) as folder:
            save_adapter(job.model, folder)
        memory.compare()
        memory.write()
        result = TrainResult(
            run_dir=run_dir.root,
            num_steps=state.step,
            best_step=state.best_step,
            base=base_scores,
            adapter=adapter_scores,
            num_trainable=prepared.facts.num_trainable,
            trainable_frac=prepared.facts.trainable_frac,
            num_supervised_tokens=state.num_supervised_tokens,
            supervised_tokens_per_s=state.num_supervised_tokens / max(state.train_s, 1e-9),
            tokens_per_s=state.num_tokens / max(state.train_s, 1e-9),
            peak_memory_bytes=memory.peak_bytes,
            planned_memory_bytes=memory.phases["training"].planned,
            measured_memory_bytes=memory.phases["training"].measured,
            wall_s=time.perf_counter() - started,
        )
        write_json(run_dir.summary, result.as_dict())
        return result


def _selfcheck(prepared: Prepared) -> SelfCheck:
    """Rows together are what they are alone; ModelError where they are not."""
    job, packed = prepared.job, prepared.job.recipe.data.batching == "packed"
    table, device = prepared.inputs.train.table, job.accelerator.device
    checked = selfcheck(job.causal, table, job.pad_token_id, device, packed=packed)
    job.reporter.message(f"selfcheck: {checked.summary()}")
    return checked


def refuse_used(run_dir: RunDir) -> None:
    """A new run starts in a new folder: nothing of an older one is touched."""
    if run_dir.root.exists() and not run_dir.root.is_dir():
        raise RecipeError(f"run.dir: {run_dir.root} is a file", fix="name a folder")
    if steps := list_steps(run_dir):
        raise RecipeError(
            f"run.dir: {run_dir.root} already holds a run with checkpoints up to step {max(steps)}",
            fix="choose another run.dir, or remove the folder; training goes on with `train --resume`",
        )
    # A run that ended before its first checkpoint left facts behind that the next one writes anew.
    own = {path.name for path in run_dir.facts()}
    there = sorted(p.name for p in run_dir.root.iterdir() if p.name not in own) if run_dir.root.is_dir() else []
    if foreign := [name for name in there if not is_leftover(name)]:
        raise RecipeError(
            f"run.dir: {run_dir.root} holds other things already ({', '.join(foreign[:6])})",
            fix="choose another run.dir, or empty this one",
        )


def _refuse_other_recipe(run_dir: RunDir, recipe: Recipe) -> None:
    """A finished run is only "already complete" for the recipe that it was trained with."""
    stored = read_json(run_dir.adapter / MANIFEST)["recipe"]
    now = json.loads(json.dumps(trajectory_keys(split_as_stored(recipe, stored))))
    if differing := [f"{k}: {stored.get(k)} then, {v} now" for k, v in now.items() if stored.get(k) != v]:
        raise ResumeError(
            f"{run_dir.root} was trained with another recipe: {'; '.join(differing)}", fix="choose another run.dir"
        )


def _checkpoint_to_resume(run_dir: RunDir, from_step: int | None, reporter: Reporter) -> Checkpoint:
    checkpoint, warnings = find_checkpoint(run_dir, from_step)
    for warning in warnings:
        reporter.warning(warning)
    return checkpoint
