"""Checkpoints of a tiny model: saved, found, restored to the bit, and retired."""

from __future__ import annotations

import errno
import os
import re
import signal
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from qlora_train.adapters.hooks import MethodHooks
from qlora_train.adapters.state import adapter_tensors
from qlora_train.artifacts.files import explained, read_json, write_json
from qlora_train.artifacts.folders import MANIFEST, _sealed, manifest_faults
from qlora_train.artifacts.layout import RunDir
from qlora_train.errors import MachineError, ResumeError
from qlora_train.recipe.schema import TrainSection
from qlora_train.train import checkpoint as checkpoint_module
from qlora_train.train.checkpoint import (
    Checkpoint,
    checkpoint_bytes,
    find_checkpoint,
    restore_checkpoint,
    retire_old,
    save_checkpoint,
    stored_environment,
    when_there_is_room,
)
from qlora_train.train.optim import build_optimizer, optimizer_tensors, trainable_parameters
from qlora_train.train.signals import StopRequest
from qlora_train.train.state import Binding, TrainState
from qlora_train.units import size_text
from tests.loading import tiny_base, with_adapter

BINDING = Binding("base", "data", "template", {"train.learning_rate": 0.1})
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def model(tiny_llama_dir: Path) -> PeftModel:
    return with_adapter(tiny_base(tiny_llama_dir, quant_type="none"), target_modules=("q_proj", "down_proj"))


@pytest.fixture
def optimizer(model: PeftModel) -> torch.optim.AdamW:
    """After one step, so that there is a state."""
    optimizer = build_optimizer(model, TrainSection(learning_rate=0.01))
    for parameter in trainable_parameters(model).values():
        parameter.grad = torch.randn(parameter.shape)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return optimizer


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[RunDir]:
    """A run folder; no test may leave a temporary one in it."""
    run_dir = RunDir(tmp_path)
    run_dir.recipe.write_text("model: {}\n")
    yield run_dir
    assert not list(tmp_path.rglob(".t*"))


def copies(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def save(run_dir: RunDir, step: int, model: PeftModel, optimizer: torch.optim.AdamW) -> Path:
    return save_checkpoint(run_dir, TrainState(step=step), model, optimizer, BINDING).folder


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def test_save_find_restore_to_the_bit(run_dir: RunDir, model: PeftModel, optimizer: torch.optim.AdamW) -> None:
    state = TrainState(12, 3, "a" * 64, 34, 5, 6.5, best_step=12, best_eval_loss=0.5)
    saved = save_checkpoint(run_dir, state, model, optimizer, BINDING)
    assert saved.folder == run_dir.checkpoints / "step-000012"
    names = {path.name for path in saved.folder.iterdir()}
    assert names == {
        WEIGHTS, "adapter_config.json", "optimizer.safetensors", "state.json", run_dir.recipe.name, MANIFEST
    }  # fmt: skip
    adapter, moments = copies(adapter_tensors(model)), copies(optimizer_tensors(model, optimizer))
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.zero_()
    fresh = build_optimizer(model, TrainSection(learning_rate=0.01))
    assert not equal(adapter_tensors(model), adapter)

    found, warnings = find_checkpoint(run_dir)
    assert found == saved and warnings == []
    assert restore_checkpoint(found, model, fresh, BINDING) == state
    assert equal(adapter_tensors(model), adapter) and equal(optimizer_tensors(model, fresh), moments)
    assert all(parameter.requires_grad for name, parameter in model.named_parameters() if ".lora_" in name)


def test_a_checkpoint_of_another_run_changes_nothing(
    run_dir: RunDir, model: PeftModel, optimizer: torch.optim.AdamW
) -> None:
    save(run_dir, 1, model, optimizer)
    with torch.no_grad():
        next(iter(trainable_parameters(model).values())).add_(1.0)
    before = copies(adapter_tensors(model))
    found, _ = find_checkpoint(run_dir)
    with pytest.raises(ResumeError, match="the base model"):
        restore_checkpoint(found, model, optimizer, replace(BINDING, base="another"))
    assert equal(adapter_tensors(model), before)


def test_saving_a_step_again_replaces_it(run_dir: RunDir, model: PeftModel, optimizer: torch.optim.AdamW) -> None:
    cut(save(run_dir, 3, model, optimizer) / WEIGHTS)
    with pytest.raises(ResumeError, match=WEIGHTS):
        find_checkpoint(run_dir, 3)
    folder = save(run_dir, 3, model, optimizer)
    assert find_checkpoint(run_dir, 3)[0].folder == folder and list(run_dir.checkpoint_steps()) == [3]


def test_a_damaged_newest_one_is_passed_over_with_a_warning(
    run_dir: RunDir, model: PeftModel, optimizer: torch.optim.AdamW
) -> None:
    folders = [save(run_dir, step, model, optimizer) for step in (2, 10, 9)]
    assert list(run_dir.checkpoint_steps()) == [2, 9, 10]
    cut(folders[1] / "optimizer.safetensors")
    found, warnings = find_checkpoint(run_dir)
    assert found.step == 9 and len(warnings) == 1
    assert "step-000010" in warnings[0] and "optimizer.safetensors" in warnings[0]
    with pytest.raises(ResumeError, match=r"step-000010: optimizer\.safetensors"):
        find_checkpoint(run_dir, 10)
    with pytest.raises(ResumeError, match="no checkpoint of step 5; there is: 2, 9, 10"):
        find_checkpoint(run_dir, 5)
    for folder in (folders[0], folders[2]):
        (folder / MANIFEST).unlink()
    with pytest.raises(ResumeError, match="no complete checkpoint") as caught:
        find_checkpoint(run_dir)
    assert all(f"step-{step:06d}" in str(caught.value) for step in (2, 9, 10))


def test_a_checkpoint_under_another_steps_name_is_passed_over(
    run_dir: RunDir, model: PeftModel, optimizer: torch.optim.AdamW
) -> None:
    save(run_dir, 4, model, optimizer)
    save(run_dir, 2, model, optimizer).rename(run_dir.checkpoints / "step-000009")
    found, warnings = find_checkpoint(run_dir)
    assert found.step == 4 and "step-000009" in warnings[0] and "a checkpoint of step 2" in warnings[0]
    with pytest.raises(ResumeError, match="a checkpoint of step 2"):
        find_checkpoint(run_dir, 9)


def test_a_full_disk_says_how_much_a_checkpoint_takes(
    run_dir: RunDir, model: PeftModel, optimizer: torch.optim.AdamW, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    saved = save(run_dir, 1, model, optimizer)
    size = sum(path.stat().st_size for path in saved.iterdir())
    assert 0.9 * size < checkpoint_bytes(model, optimizer) < size
    monkeypatch.setattr(os, "fsync", full)
    needed = re.escape(f"({size_text(checkpoint_bytes(model, optimizer))} needed, ")
    with pytest.raises(MachineError, match=rf"step-000002: No space left .*{needed}"):
        save(run_dir, 2, model, optimizer)
    assert list(run_dir.checkpoint_steps()) == [1]


@pytest.mark.parametrize("stopped", [False, True])
def test_waiting_for_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: bool) -> None:
    """A full disk is tried again until there is room, or until the run is to end; any other error is raised."""
    stop, said, tried = StopRequest(), [], []
    monkeypatch.setattr(checkpoint_module, "WAIT_S", 0.01)

    def save(number: int) -> Checkpoint:
        tried.append(number)
        with explained(tmp_path):
            if len(tried) < 3:
                raise OSError(number, os.strerror(number))
        return Checkpoint(1, tmp_path)

    if stopped:
        stop.signal_number = signal.SIGTERM
    for number, attempts in ((errno.ENOSPC, 1 if stopped else 3), (errno.EIO, 1)):
        tried.clear()
        if attempts == 3:
            assert when_there_is_room(partial(save, number), said.append, stop).step == 1
        else:
            with pytest.raises(MachineError):
                when_there_is_room(partial(save, number), said.append, stop)
        assert len(tried) == attempts
    assert len(said) == (0 if stopped else 2) and all("No space left" in text and "waits" in text for text in said)


def test_nothing_to_find(run_dir: RunDir) -> None:
    with pytest.raises(ResumeError, match="no complete checkpoint"):
        find_checkpoint(run_dir)
    with pytest.raises(ResumeError, match="there is: none"):
        find_checkpoint(run_dir, 1)


def test_checkpoint_steps_ignore_other_names(run_dir: RunDir) -> None:
    others = ("step-1", "step-0000x1", "step-000001.old", "old-step-000001", ".tmp-step-000004-1-a", "step-")
    for name in (*others, "step-000003", "step-1000000"):
        (run_dir.checkpoints / name).mkdir(parents=True)
    assert list(run_dir.checkpoint_steps()) == [3, 1_000_000]
    (run_dir.checkpoints / ".tmp-step-000004-1-a").rmdir()


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [
        (2, 3, [3, 5, 6]),
        (2, 6, [5, 6]),
        (1, None, [6]),
        (1, 1, [1, 6]),
        (6, 2, [1, 2, 3, 4, 5, 6]),
        (9, None, [1, 2, 3, 4, 5, 6]),
        (1, 77, [6]),
    ],
)
def test_retire_old_keeps_the_newest_and_the_best(
    run_dir: RunDir, keep: int, best: int | None, left: list[int]
) -> None:
    for step in range(1, 7):
        (run_dir.checkpoints / f"step-{step:06d}").mkdir(parents=True)
    retire_old(run_dir, keep, best)
    assert list(run_dir.checkpoint_steps()) == left
    assert len(list(run_dir.checkpoints.iterdir())) == len(left)


class Method(MethodHooks):
    """Keeps a tensor and plain values."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        if "ranks" not in state:
            raise ValueError("the ranks are missing")
        self.state = dict(state)


def test_what_a_method_keeps_comes_back_to_the_bit(
    run_dir: RunDir, model: PeftModel, optimizer: torch.optim.AdamW
) -> None:
    kept: dict[str, Any] = {
        "importance": torch.tensor([1.0, float("inf"), -0.0]),
        "ranks": {"q_proj": 3},
        "budget": 0.1,
    }
    saved = save_checkpoint(run_dir, TrainState(step=2), model, optimizer, BINDING, Method(kept), {"threads": 3})
    assert not manifest_faults(saved.folder) and stored_environment(saved) == {"threads": 3}
    method = Method({})
    restore_checkpoint(saved, model, optimizer, BINDING, method)
    assert torch.equal(method.state.pop("importance"), kept.pop("importance")) and method.state == kept


def test_a_method_and_a_checkpoint_that_do_not_fit_are_refused(
    run_dir: RunDir, model: PeftModel, optimizer: torch.optim.AdamW
) -> None:
    without = save_checkpoint(run_dir, TrainState(step=2), model, optimizer, BINDING)
    with pytest.raises(ResumeError, match="step-000002: the ranks are missing"):
        restore_checkpoint(without, model, optimizer, BINDING, Method({}))
    kept = save_checkpoint(run_dir, TrainState(step=3), model, optimizer, BINDING, Method({"ranks": 1}))
    with pytest.raises(ResumeError, match="step-000003: this method keeps no state, and there is one: ranks"):
        restore_checkpoint(kept, model, optimizer, BINDING)


def test_a_checkpoint_of_another_version_is_neither_passed_over_nor_called_damaged(
    run_dir: RunDir, model: PeftModel, optimizer: torch.optim.AdamW
) -> None:
    older, newer = (save(run_dir, step, model, optimizer) for step in (1, 2))
    manifest = read_json(newer / MANIFEST)
    write_json(newer / MANIFEST, _sealed({**manifest, "schema": manifest["schema"] + 1}))
    with pytest.raises(ResumeError, match=r"another version of qlora-train wrote it .*go on with that version"):
        find_checkpoint(run_dir)
    assert older.is_dir() and newer.is_dir()
    write_json(newer / MANIFEST, {**manifest, "schema": manifest["schema"] + 1})  # what it says is not sealed
    found, warnings = find_checkpoint(run_dir)
    assert found.step == 1 and "step-000002 is damaged" in warnings[0]
