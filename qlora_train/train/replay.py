"""Making recorded steps again on this machine, and holding them against the log: is a resume exact here?"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from qlora_train.adapters.state import WEIGHTS, adapter_tensors
from qlora_train.artifacts.files import append_json_line, explained, read_json
from qlora_train.artifacts.folders import MANIFEST, locked
from qlora_train.artifacts.layout import RunDir
from qlora_train.errors import MachineError, ResumeError
from qlora_train.plain import to_plain
from qlora_train.quant.fingerprint import hash_tensors
from qlora_train.recipe.load import LoadedRecipe
from qlora_train.train.checkpoint import Checkpoint, find_checkpoint, stored_binding, stored_environment
from qlora_train.train.fork import Change, Level, binding_changes, environment_changes, refuse_changes
from qlora_train.train.job import Job
from qlora_train.train.metrics import Reporter
from qlora_train.train.optim import lr_factor
from qlora_train.train.resume import allow_resume, restore
from qlora_train.train.setup import prepare
from qlora_train.train.signals import stop_requests
from qlora_train.train.state import TrainState
from qlora_train.train.step import StepResult, train_step

MOST_STEPS = 10  # made again to reach the next checkpoint, whose adapter is compared too
# Relative, of a step's loss, where only the rounding is another: faults of this size are no other computation.
LOSS_TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}


@dataclass(frozen=True)
class ReplayedStep:
    """A step as it was logged, and as it is made here."""

    step: int
    logged_loss: float
    loss: float
    logged_grad_norm: float
    grad_norm: float
    same_tokens: bool  # as many tokens, and as many supervised ones

    @property
    def is_equal(self) -> bool:
        """To the bit."""
        return (self.loss, self.grad_norm) == (self.logged_loss, self.logged_grad_norm) and self.same_tokens

    @property
    def loss_distance(self) -> float:
        """Of the loss, relative."""
        return abs(self.loss - self.logged_loss) / max(abs(self.logged_loss), 1e-30)


@dataclass(frozen=True)
class Replay:
    """What came of making steps again."""

    run_dir: Path
    from_step: int  # of the checkpoint; 0: from the start
    steps: tuple[ReplayedStep, ...]
    compared_with: int | None  # the step of the checkpoint whose adapter is compared; None: there is none so near
    same_adapter: bool | None
    rounding: tuple[Change, ...]  # of the machine, since then
    tolerance: float  # relative, of a loss whose rounding alone is another
    repeats: bool  # whether the device computes the same bits each time: a CPU

    @property
    def sees_update(self) -> bool:
        """Whether anything is compared that the update of a step decides, and with it the optimiser's state."""
        return self.compared_with is not None or len(self.steps) > 1

    @property
    def is_other_update(self) -> bool:
        """Whether equal gradients led somewhere else, on a device that repeats itself and has not changed."""
        equal = [step.is_equal for step in self.steps]
        if not self.repeats or not all(step.same_tokens for step in self.steps):
            return False
        return (all(equal) and self.same_adapter is False) or (equal[:2] == [True, False] and not self.rounding)

    @property
    def level(self) -> Level:
        """D2: equal bits. D1: the same rows, and losses within the tolerance. D0: something else was computed."""
        if all(step.is_equal for step in self.steps) and self.same_adapter is not False:
            return "D2"
        near = not self.is_other_update and all(
            step.same_tokens and step.loss_distance <= self.tolerance for step in self.steps
        )
        return "D1" if near else "D0"

    def refuse_other(self) -> None:
        """ResumeError where this is not the computation that was logged."""
        if self.is_other_update:
            raise ResumeError(
                "equal gradients, another update: the optimiser's state is not what it was",
                fix="resume from another step, with the code and the versions that began the run, or start a new one",
            )
        if self.level == "D0":
            worst = max(self.steps, key=lambda step: (not step.same_tokens, step.loss_distance))
            raise ResumeError(
                f"step {worst.step} is not the one that was logged: its loss is {worst.loss!r} here and was "
                f"{worst.logged_loss!r}, {worst.loss_distance:.1e} apart (rounding: at most {self.tolerance:g})",
                fix="resume on the machine, and with the versions, of environment.json, or take the run for a fork",
            )


@dataclass(frozen=True)
class _Choice:
    checkpoint: Checkpoint | None  # None: from the start
    steps: tuple[int, ...]  # to make again, counted from 1
    target: Checkpoint | None  # reached by the last of them


def run_replay(loaded: LoadedRecipe, *, from_step: int | None, reporter: Reporter) -> Replay:
    """Make the steps after a checkpoint again, in memory; see `api.replay` for what it raises.

    A line of `replays.jsonl` is all that is written.
    """
    run_dir = RunDir(loaded.recipe.run.dir)
    with explained(run_dir.root):
        is_there = run_dir.root.is_dir()
    if not is_there:
        raise ResumeError(f"{run_dir.root} does not exist: there is nothing to replay", fix="name the run's own recipe")
    if loaded.recipe.run.threads is not None:
        torch.set_num_threads(loaded.recipe.run.threads)
    with locked(run_dir), stop_requests() as stop:
        logged = dict(_logged_steps(run_dir))
        choice = _choose(run_dir, logged, from_step)
        binding = stored_binding(choice.checkpoint) if choice.checkpoint else _binding_of_start(run_dir)
        known = choice.checkpoint or Checkpoint(0, run_dir.root)
        resume = allow_resume(known, binding, loaded, frozenset())
        folder = choice.checkpoint.folder if choice.checkpoint else None
        prepared = prepare(loaded.recipe, run_dir, reporter, bound=binding.get("recipe"), checkpoint=folder)
        job, state = prepared.job, TrainState()
        if choice.checkpoint:
            state, _ = restore(resume, prepared, loaded)
            then = stored_environment(choice.checkpoint)
        else:
            refuse_changes(binding_changes(binding, job.binding, loaded.origins), frozenset(), "the start")
            then = read_json(run_dir.environment)
        job.model.train()
        steps = []
        for number in choice.steps:
            stop.check()
            steps.append(_replayed(_step(job, number - 1), number, logged[number]))
            reporter.message(f"step {number} made again")
        found = Replay(
            run_dir.root,
            from_step=state.step,
            steps=tuple(steps),
            compared_with=choice.target.step if choice.target else None,
            same_adapter=_same_adapter(job, choice.target) if choice.target else None,
            rounding=tuple(environment_changes(then, job.environment)),
            tolerance=LOSS_TOLERANCE[job.recipe.model.compute_dtype],
            repeats=job.accelerator.device.type == "cpu",
        )
        _record(run_dir, found, job.environment, reporter)
        return found


def _record(run_dir: RunDir, found: Replay, environment: Mapping[str, Any], reporter: Reporter) -> None:
    """Both sides of every step, the verdict, and what computed it here. A full disk costs the line, not the verdict."""
    compared = {key: value for key, value in to_plain(found).items() if key != "run_dir"}
    entry = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **compared, "environment": dict(environment)}
    try:
        append_json_line(run_dir.replays, entry)
    except MachineError as error:
        reporter.warning(f"the replay is not recorded: {error.problems[0].what}")


def _logged_steps(run_dir: RunDir) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each logged step with its line."""
    try:
        lines = run_dir.metrics.read_bytes().splitlines()
    except OSError as error:
        raise MachineError(f"cannot read {run_dir.metrics}: {error.strerror}", fix="restore the file") from error
    for line in lines:
        with suppress(ValueError, KeyError, TypeError):  # a torn line
            entry = json.loads(line)
            if entry["kind"] == "train":
                yield int(entry["step"]), entry


def _choose(run_dir: RunDir, logged: Mapping[int, Any], from_step: int | None) -> _Choice:
    """The newest checkpoint after which steps were logged, best one with another checkpoint within MOST_STEPS."""
    there = run_dir.checkpoint_steps()
    if from_step is not None and from_step != 0:
        chosen = _after(run_dir, from_step, there, logged)
        if chosen is None:
            find_checkpoint(run_dir, from_step)
            raise ResumeError(f"step {from_step + 1} is not in {run_dir.metrics.name}", fix="name an earlier step")
        return chosen
    candidates = [c for s in reversed(there) if from_step is None and (c := _after(run_dir, s, there, logged))]
    for candidate in candidates:
        if candidate.target is not None:
            return candidate
    if candidates:
        return candidates[0]
    if 1 in logged and not _forked(run_dir):
        return _Choice(None, _two_steps(1, logged), None)
    raise ResumeError(
        f"{run_dir.root} holds no checkpoint with a logged step after it, and its first step is not to be had",
        fix="replay a run with train.keep: 2 or more, and run.log_every: 1",
    )


def _after(run_dir: RunDir, step: int, there: Mapping[int, Path], logged: Mapping[int, Any]) -> _Choice | None:
    """What can be made again from the checkpoint of a step; None where it does not verify or nothing was logged."""
    if step + 1 not in logged or step not in there:
        return None
    try:
        checkpoint, _ = find_checkpoint(run_dir, step)
    except ResumeError:
        return None
    later = min((other for other in there if other > step), default=None)
    if later is not None and later - step <= MOST_STEPS and all(n in logged for n in range(step + 1, later + 1)):
        with suppress(ResumeError):
            return _Choice(checkpoint, tuple(range(step + 1, later + 1)), find_checkpoint(run_dir, later)[0])
    return _Choice(checkpoint, _two_steps(step + 1, logged), None)


def _two_steps(first: int, logged: Mapping[int, Any]) -> tuple[int, ...]:
    """Two where both were logged: the loss of the second sees the update of the first."""
    return (first, first + 1) if first + 1 in logged else (first,)


def _forked(run_dir: RunDir) -> bool:
    """Whether the run took another course at some step: its first steps then belong to an earlier recipe."""
    return run_dir.resumes.is_file() and '"level": "D0"' in run_dir.resumes.read_text(encoding="utf-8")


def _binding_of_start(run_dir: RunDir) -> dict[str, Any]:
    """What the run belongs to, from its newest checkpoint or its adapter."""
    for folder in (*reversed(run_dir.checkpoint_steps().values()), run_dir.adapter):
        if (folder / MANIFEST).is_file():
            manifest = read_json(folder / MANIFEST)
            binding: dict[str, Any] = manifest.get("binding", manifest)
            return binding
    raise ResumeError(f"{run_dir.root} holds neither checkpoint nor adapter", fix="start the run first")


def _step(job: Job, step: int) -> StepResult:
    train = job.recipe.train
    return train_step(
        job.causal,
        job.loader.step(step),
        job.optimizer,
        job.accelerator,
        seed=job.recipe.run.seed,
        step=step,
        learning_rate=train.learning_rate * lr_factor(step, job.num_steps, train.warmup_frac, train.schedule),
        max_grad_norm=train.max_grad_norm,
        hooks=job.hooks,
    )


def _replayed(result: StepResult, number: int, line: Mapping[str, Any]) -> ReplayedStep:
    same = (result.num_tokens, result.num_supervised_tokens) == (line["num_tokens"], line["num_supervised_tokens"])
    return ReplayedStep(number, line["loss"], result.loss, line["grad_norm"], result.grad_norm, same_tokens=same)


def _same_adapter(job: Job, target: Checkpoint) -> bool:
    """Whether the adapter's tensors are those of a checkpoint, to the bit."""
    return _digest(adapter_tensors(job.model)) == _digest(load_file(target.folder / WEIGHTS))


def _digest(tensors: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    return [(name, hash_tensors(tensors[name])) for name in sorted(tensors)]
