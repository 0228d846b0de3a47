"""Going on from a checkpoint: which one, whether this recipe may, and what is said and recorded of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qlora_train.artifacts.files import explained
from qlora_train.artifacts.folders import read_manifest, retire
from qlora_train.artifacts.layout import RunDir
from qlora_train.data.account import build_loader
from qlora_train.errors import RecipeError
from qlora_train.model.load import resolve_device
from qlora_train.recipe.load import LoadedRecipe
from qlora_train.recipe.split import split_as_stored, with_split
from qlora_train.train.checkpoint import (
    Checkpoint,
    find_checkpoint,
    restore_checkpoint,
    retire_newer,
    stored_binding,
    stored_environment,
    stored_last_steps,
)
from qlora_train.train.fork import (
    SPLIT,
    Change,
    Level,
    binding_changes,
    describe_changes,
    environment_changes,
    is_another_split,
    recipe_changes,
    record_resume,
    refuse_changes,
    refuse_idle,
    refuse_other_device,
)
from qlora_train.train.job import Job
from qlora_train.train.keys import trajectory_keys
from qlora_train.train.loop import check_position
from qlora_train.train.metrics import Reporter
from qlora_train.train.scores import Scorer, forget_lost_best
from qlora_train.train.setup import Prepared
from qlora_train.train.state import TrainState


@dataclass(frozen=True)
class Resume:
    """A checkpoint that the recipe's keys let us go on from."""

    checkpoint: Checkpoint
    binding: dict[str, Any]  # as the checkpoint has it
    allowed: frozenset[str]  # keys that may differ, by --allow-change
    is_another_split: bool  # as many packs a step, in other micro-batches

    @property
    def accepted(self) -> frozenset[str]:
        """Keys that may differ."""
        return self.allowed | (frozenset(SPLIT) if self.is_another_split else frozenset())


def find_resume(
    run_dir: RunDir, loaded: LoadedRecipe, from_step: int | None, allowed: frozenset[str], reporter: Reporter
) -> Resume:
    """The newest checkpoint that verifies, or that of `from_step`, before anything is loaded.

    ResumeError where there is none, or where it quantised its base on another kind of device; OtherRun where a key that
    decides what is trained has changed unallowed.
    """
    checkpoint, warnings = find_checkpoint(run_dir, from_step)
    for warning in warnings:
        reporter.warning(warning)
    device, name = resolve_device(loaded.recipe.model.device).type, checkpoint.folder.name
    refuse_other_device(stored_environment(checkpoint), loaded.recipe, device, name)
    binding = stored_binding(checkpoint)
    return allow_resume(checkpoint, binding, loaded, allowed)


def allow_resume(
    checkpoint: Checkpoint, binding: dict[str, Any], loaded: LoadedRecipe, allowed: frozenset[str]
) -> Resume:
    """OtherRun unless the recipe's keys are those of the binding, or allowed to differ."""
    stored = binding.get("recipe", {})
    recipe = split_as_stored(loaded.recipe, stored)
    changes = recipe_changes(stored, trajectory_keys(recipe), loaded.origins)
    resume = Resume(checkpoint, binding, allowed, is_another_split(changes, stored, recipe))
    refuse_changes(changes, resume.accepted, checkpoint.folder.name)
    return resume


def restore(resume: Resume, prepared: Prepared, loaded: LoadedRecipe) -> tuple[TrainState, list[Change]]:
    """Put everything back; the state, and all that is not as the checkpoint has it. Nothing is written.

    OtherRun where base, rows, template or tokenizer are others and not allowed to be, RecipeError where a change was
    allowed that is none, ResumeError where the rows would not come in their order.
    """
    job, name = prepared.job, resume.checkpoint.folder.name
    changes = binding_changes(resume.binding, job.binding, loaded.origins)
    refuse_changes(changes, resume.accepted, name)
    refuse_idle(changes, resume.allowed)
    state = restore_checkpoint(
        resume.checkpoint, job.model, job.optimizer, job.binding, job.hooks, allowed=resume.accepted
    )
    state.evaluation_due = state.evaluation_due and job.eval_table is not None
    job.last_steps.restore(stored_last_steps(resume.checkpoint))
    if resume.is_another_split:
        _check_other_split(prepared, state, resume.binding["recipe"])
    elif changes:
        _place_fork(job, state)
    else:
        check_position(job.loader, state)
    return state, changes


def _check_other_split(prepared: Prepared, state: TrainState, stored: dict[str, Any]) -> None:
    """As many packs in other micro-batches: the rows of each step are the same ones. The state gets today's order."""
    job = prepared.job
    before = with_split(job.recipe, *(stored[key] for key in SPLIT))
    check_position(build_loader(before, prepared.inputs.train, job.pad_token_id), state)
    assert job.loader.rows_before(state.step) == state.num_rows, "another split of a step has other rows"
    state.plan_sha256 = job.loader.plan_digest(state.step)


def _place_fork(job: Job, state: TrainState) -> None:
    """A fork goes on at the same step of its own order; RecipeError where it has no such step."""
    if job.num_steps <= state.step:
        raise RecipeError(
            f"the recipe now ends at step {job.num_steps}, and the checkpoint is of step {state.step}",
            fix="raise train.epochs or train.max_steps, or resume --from an earlier step",
        )
    num_rows, digest = job.loader.rows_before(state.step), job.loader.plan_digest(state.step)
    if (num_rows, digest) != (state.num_rows, state.plan_sha256):
        job.reporter.warning(
            f"the rows come in another order from step {state.step} on: of the epoch in hand, some come twice and some "
            "not at all"
        )
        state.num_rows, state.plan_sha256 = num_rows, digest


def go_on(resume: Resume, prepared: Prepared, state: TrainState, changes: Sequence[Change], scorer: Scorer) -> None:
    """After `restore`, and all that may refuse: record what is not as it was, and clear away what came past this step.

    The record comes first: a process killed in between leaves the run as it was, or less than it was with the reason.
    """
    job, run_dir, name = prepared.job, prepared.job.run_dir, resume.checkpoint.folder.name
    rounding = environment_changes(stored_environment(resume.checkpoint), job.environment)
    forked: Sequence[Change] = () if resume.is_another_split else changes
    if resume.is_another_split:
        rounding = [*changes, *rounding]
    level = level_of(forked, rounding, job)
    record_resume(run_dir, name, state.step, level, forked, rounding)
    with explained(run_dir.summary):
        run_dir.summary.unlink(missing_ok=True)
    if gone := retire_newer(run_dir, state.step):
        job.reporter.message(f"removed the checkpoints past step {state.step}: {', '.join(map(str, gone))}")
    if _is_of_later_step(run_dir, state.step):
        retire(run_dir.adapter)
        job.reporter.message(
            f"removed the adapter that came of the steps past {state.step}; the end publishes one anew"
        )
    forget_lost_best(run_dir, state, job.reporter)
    scorer.forget_other_best(state)
    if forked and state.best_step is not None:
        state.best_step = state.best_eval_loss = None
        job.reporter.message("this is another course: which checkpoint is best is judged from here on")
    job.reporter.message(f"resumed from {name} ({_LEVELS[level]})")
    if forked:
        job.reporter.warning(f"a fork, recorded in {run_dir.resumes.name}: {describe_changes(forked)}")
    if rounding:
        # The mask is a function of step and micro-step.
        draws = " and other dropout masks" if resume.is_another_split and job.recipe.adapter.dropout else ""
        job.reporter.warning(
            "not bit for bit the undisturbed run from here on, the same rows in the same order with other rounding"
            f"{draws}: {describe_changes(rounding)}"
        )


def _is_of_later_step(run_dir: RunDir, step: int) -> bool:
    """Whether the published adapter belongs to the course that is left; a damaged one is refused by its readers."""
    try:
        written = read_manifest(run_dir.adapter).get("step")
    except (OSError, ValueError):
        return False
    return isinstance(written, int) and written > step


def level_of(forked: Sequence[Change], rounding: Sequence[Change], job: Job) -> Level:
    """What a resume promises. On CUDA kernels may add up in any order: the same rows, and not the same bits."""
    if forked:
        return "D0"
    return "D1" if rounding or job.accelerator.device.type == "cuda" else "D2"


_LEVELS: dict[Level, str] = {
    "D2": "D2: bit for bit the undisturbed run",
    "D1": "D1: the same rows in the same order",
    "D0": "D0: a fork",
}
