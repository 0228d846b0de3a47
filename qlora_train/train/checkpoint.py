"""Checkpoints: folders of safetensors and JSON that verify, published by rename, older ones retired after."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from qlora_train.adapters.state import restore_adapter, save_adapter
from qlora_train.artifacts import MANIFEST, RunDir, manifest_faults, publishing, retire
from qlora_train.errors import ResumeError
from qlora_train.train.optim import optimizer_tensors, restore_optimizer
from qlora_train.train.state import Binding, TrainState

_STEP_NAME = re.compile(r"step-(\d{6,})")
_OPTIMIZER = "optimizer.safetensors"
_STATE = "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint whose manifest verifies."""

    step: int
    folder: Path


def save_checkpoint(
    run_dir: RunDir, state: TrainState, model: PeftModel, optimizer: torch.optim.Optimizer, binding: Binding
) -> Checkpoint:
    """Write one checkpoint whole or not at all. An existing one of the same step is replaced."""
    target = run_dir.checkpoints / f"step-{state.step:06d}"
    if target.exists():
        retire(target)
    with publishing(target, manifest={"step": state.step, "binding": binding.as_dict()}) as folder:
        save_adapter(model, folder)
        save_file(optimizer_tensors(model, optimizer), folder / _OPTIMIZER)
        (folder / _STATE).write_text(json.dumps(state.as_dict(), indent=1), encoding="utf-8")
        shutil.copyfile(run_dir.recipe, folder / run_dir.recipe.name)
    return Checkpoint(state.step, target)


def list_steps(run_dir: RunDir) -> dict[int, Path]:
    """Published checkpoint folders by step, oldest first, verified or not."""
    found = {}
    for folder in run_dir.checkpoints.glob("step-*"):
        if match := _STEP_NAME.fullmatch(folder.name):
            found[int(match.group(1))] = folder
    return dict(sorted(found.items()))


def find_checkpoint(run_dir: RunDir, step: int | None = None) -> tuple[Checkpoint, list[str]]:
    """The newest checkpoint that verifies, or that of `step`; and a warning for each newer one that does not.

    Raises ResumeError when there is none, or when the step asked for is absent or damaged.
    """
    steps = list_steps(run_dir)
    if step is not None:
        if step not in steps:
            there = ", ".join(map(str, steps)) or "none"
            raise ResumeError(
                f"{run_dir.checkpoints} has no checkpoint of step {step}; there is: {there}", fix="name one"
            )
        if faults := manifest_faults(steps[step]):
            raise ResumeError(f"{steps[step]}: {'; '.join(faults)}", fix="resume from another step")
        return Checkpoint(step, steps[step]), []
    warnings: list[str] = []
    for number, folder in reversed(steps.items()):
        if not (faults := manifest_faults(folder)):
            return Checkpoint(number, folder), warnings
        warnings.append(f"{folder.name} is damaged and passed over: {'; '.join(faults)}")
    raise ResumeError(
        "; ".join([f"no complete checkpoint in {run_dir.checkpoints}", *warnings]), fix="start again without --resume"
    )


def restore_checkpoint(
    checkpoint: Checkpoint, model: PeftModel, optimizer: torch.optim.Optimizer, binding: Binding
) -> TrainState:
    """Put adapter, optimiser and counters back, to the bit. Raises ResumeError when the checkpoint is another run's."""
    manifest: dict[str, Any] = json.loads((checkpoint.folder / MANIFEST).read_text(encoding="utf-8"))
    binding.refuse_difference(manifest["binding"])
    state = TrainState.from_dict(json.loads((checkpoint.folder / _STATE).read_text(encoding="utf-8")))
    restore_adapter(model, checkpoint.folder)
    restore_optimizer(model, optimizer, load_file(checkpoint.folder / _OPTIMIZER))
    return state


def retire_newer(run_dir: RunDir, step: int) -> None:
    """Delete checkpoints past `step`: a run that goes on from there takes another course, or they do not verify."""
    for other, folder in list_steps(run_dir).items():
        if other > step:
            retire(folder)


def retire_old(run_dir: RunDir, keep: int, best_step: int | None) -> None:
    """Delete all but the newest `keep` checkpoints and the best one."""
    steps = list_steps(run_dir)
    for step in list(steps)[:-keep]:
        if step != best_step:
            retire(steps[step])
