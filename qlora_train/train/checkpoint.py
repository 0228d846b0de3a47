"""Checkpoints: folders of safetensors and JSON that verify, published by rename, older ones retired after."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlora_train.adapters.hooks import NO_HOOKS, MethodHooks, Value
from qlora_train.adapters.state import restore_adapter, save_adapter
from qlora_train.artifacts.files import is_full
from qlora_train.artifacts.folders import MANIFEST, OtherSchema, manifest_faults, publishing, read_manifest, retire
from qlora_train.artifacts.layout import RunDir
from qlora_train.errors import MachineError, ResumeError
from qlora_train.train.fork import binding_changes, refuse_changes
from qlora_train.train.optim import optimizer_tensors, restore_optimizer, trainable_parameters
from qlora_train.train.signals import StopRequest
from qlora_train.train.state import Binding, TrainState
from qlora_train.untrusted import refuse_pickles

_OPTIMIZER = "optimizer.safetensors"
_STATE = "state.json"
_LAST_STEPS = "last_steps.json"
_METHOD_TENSORS, _METHOD_VALUES = "method.safetensors", "method.json"  # of a method that keeps a state
NOTHING: Mapping[str, Any] = {}  # no environment is known, no step was made
WAIT_S = 30.0


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint whose manifest verifies."""

    step: int
    folder: Path


def save_checkpoint(
    run_dir: RunDir,
    state: TrainState,
    model: PeftModel,
    optimizer: torch.optim.Optimizer,
    binding: Binding,
    hooks: MethodHooks = NO_HOOKS,
    environment: Mapping[str, Any] = NOTHING,
    last_steps: Mapping[str, Any] = NOTHING,
) -> Checkpoint:
    """Write one checkpoint whole or not at all. An existing one of the same step is replaced."""
    target = run_dir.checkpoint(state.step)
    manifest = {"step": state.step, "binding": binding.as_dict(), "environment": dict(environment)}
    with publishing(target, manifest=manifest, num_bytes=checkpoint_bytes(model, optimizer), replace=True) as folder:
        write_checkpoint(folder, run_dir, state, model, optimizer, hooks, last_steps)
    return Checkpoint(state.step, target)


def when_there_is_room(save: Callable[[], Checkpoint], warn: Callable[[str], None], stop: StopRequest) -> Checkpoint:
    """Call `save` again every WAIT_S seconds while the disk is full; else, or when asked to stop, raise as it does."""
    while True:
        try:
            return save()
        except MachineError as error:
            if not is_full(error) or stop.signal_number is not None:
                raise
            warn(f"{error.problems[0].what}; training waits for room, as train.on_disk_full has it")
        until = time.monotonic() + WAIT_S
        while stop.signal_number is None and time.monotonic() < until:
            time.sleep(min(1.0, WAIT_S))


def write_checkpoint(
    folder: Path,
    run_dir: RunDir,
    state: TrainState,
    model: PeftModel,
    optimizer: torch.optim.Optimizer,
    hooks: MethodHooks = NO_HOOKS,
    last_steps: Mapping[str, Any] = NOTHING,
) -> None:
    """The files of a checkpoint, but for its manifest, into a folder."""
    save_adapter(model, folder)
    save_file(optimizer_tensors(model, optimizer), folder / _OPTIMIZER)
    (folder / _STATE).write_text(json.dumps(state.as_dict(), indent=1), encoding="utf-8")
    shutil.copyfile(run_dir.recipe, folder / run_dir.recipe.name)
    if last_steps:
        (folder / _LAST_STEPS).write_text(json.dumps(last_steps), encoding="utf-8")
    if kept := hooks.state_dict():
        tensors = {name: value.detach().cpu().contiguous() for name, value in kept.items() if isinstance(value, Tensor)}
        plain = {name: value for name, value in kept.items() if name not in tensors}
        save_file(tensors, folder / _METHOD_TENSORS)
        (folder / _METHOD_VALUES).write_text(json.dumps(plain, indent=1, allow_nan=False), encoding="utf-8")


def checkpoint_bytes(model: PeftModel, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the tensors of a checkpoint; the rest of it is a kilobyte for each of them at most."""
    moments = (value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor))
    return sum(tensor.nbytes for tensor in (*trainable_parameters(model).values(), *moments))


def stored_binding(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the checkpoint says that it belongs to."""
    binding: dict[str, Any] = read_manifest(checkpoint.folder)["binding"]
    return binding


def stored_environment(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the machine was that wrote the checkpoint; empty where it does not say."""
    environment: dict[str, Any] = read_manifest(checkpoint.folder).get("environment", {})
    return environment


def stored_last_steps(checkpoint: Checkpoint) -> dict[str, Any]:
    """Figures of the steps up to the checkpoint, as train/last_steps.py lays them out; empty where it has none."""
    path = checkpoint.folder / _LAST_STEPS
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def find_checkpoint(run_dir: RunDir, step: int | None = None) -> tuple[Checkpoint, list[str]]:
    """The newest checkpoint that verifies, or that of `step`; and a warning for each newer one that does not.

    Raises ResumeError when there is none, or when the step asked for is absent or damaged; MachineError when the
    machine does not let one be read, which is no reason to pass it over.
    """
    steps = run_dir.checkpoint_steps()
    if step is not None:
        if step not in steps:
            there = ", ".join(map(str, steps)) or "none"
            raise ResumeError(
                f"{run_dir.checkpoints} has no checkpoint of step {step}; there is: {there}", fix="name one"
            )
        if faults := _faults(step, steps[step]):
            raise ResumeError(f"{steps[step]}: {'; '.join(faults)}", fix="resume from another step")
        return Checkpoint(step, steps[step]), []
    warnings: list[str] = []
    for number, folder in reversed(steps.items()):
        if not (faults := _faults(number, folder)):
            return Checkpoint(number, folder), warnings
        warnings.append(f"{folder.name} is damaged and passed over: {'; '.join(faults)}")
    again = "start again without --resume"
    raise ResumeError(
        "; ".join([f"no complete checkpoint in {run_dir.checkpoints}", *warnings]),
        fix=f"remove {run_dir.checkpoints} and {again}, or choose another run.dir" if warnings else again,
    )


def _faults(step: int, folder: Path) -> list[str]:
    """Why a folder is not the checkpoint of this step.

    SecurityError where a pickle was put into it, ResumeError where another version wrote it: it is not damaged, and
    must neither be passed over nor make way.
    """
    refuse_pickles(sorted(folder.iterdir()), str(folder))
    try:
        faults = manifest_faults(folder)
    except MachineError as error:
        (problem,) = error.problems
        fix = f"{problem.fix}; or go on from an earlier step: --resume --from STEP"
        raise MachineError(problem.what, fix=fix) from error
    if faults:
        _refuse_other_version(folder)
        return faults
    written = read_manifest(folder).get("step")
    return [] if written == step else [f"{MANIFEST}: it is a checkpoint of step {written}"]


def _refuse_other_version(folder: Path) -> None:
    try:
        read_manifest(folder)
    except OtherSchema as error:
        raise ResumeError(
            f"{folder}: another version of qlora-train wrote it ({error})",
            fix="go on with that version: it is in environment.json of the run folder",
        ) from None
    except (OSError, ValueError, RecursionError):
        pass  # damaged


def restore_checkpoint(
    checkpoint: Checkpoint,
    model: PeftModel,
    optimizer: torch.optim.Optimizer,
    binding: Binding,
    hooks: MethodHooks = NO_HOOKS,
    allowed: frozenset[str] = frozenset(),
) -> TrainState:
    """Put adapter, optimiser, method and counters back, to the bit.

    Raises OtherRun when the checkpoint is another run's, but for the keys of the recipe that are `allowed` to differ.
    """
    refuse_changes(binding_changes(stored_binding(checkpoint), binding), allowed, checkpoint.folder.name)
    state = TrainState.from_dict(json.loads((checkpoint.folder / _STATE).read_text(encoding="utf-8")))
    restore_adapter(model, checkpoint.folder)
    restore_optimizer(model, optimizer, load_file(checkpoint.folder / _OPTIMIZER))
    try:
        hooks.load_state_dict(_method_state(checkpoint.folder))
    except ValueError as error:
        raise ResumeError(f"{checkpoint.folder.name}: {error}", fix="use another step") from error
    return state


def _method_state(folder: Path) -> dict[str, Value]:
    """What the method kept; empty where it keeps nothing."""
    if not (folder / _METHOD_VALUES).exists():
        return {}
    plain: dict[str, Value] = json.loads((folder / _METHOD_VALUES).read_text(encoding="utf-8"))
    return plain | load_file(folder / _METHOD_TENSORS)


def retire_newer(run_dir: RunDir, step: int) -> list[int]:
    """Delete checkpoints past `step`: a run that goes on from there takes another course, or they do not verify.

    Returns their steps.
    """
    newer = {other: folder for other, folder in run_dir.checkpoint_steps().items() if other > step}
    for folder in newer.values():
        retire(folder)
    return list(newer)


def retire_old(run_dir: RunDir, keep: int, best_step: int | None) -> None:
    """Delete all but the newest `keep` checkpoints and the best one."""
    steps = run_dir.checkpoint_steps()
    for step in list(steps)[:-keep]:
        if step != best_step:
            retire(steps[step])
