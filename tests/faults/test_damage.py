"""Checkpoints that were cut, flipped, edited or added to: never used, and named."""

from __future__ import annotations

import os
import random
import shutil
import signal
from pathlib import Path

import pytest

from qlora_train.artifacts.folders import MANIFEST
from qlora_train.artifacts.layout import RunDir
from qlora_train.errors import ResumeError
from qlora_train.train.checkpoint import find_checkpoint
from tests.faults.harness import STEP, Scene, damaged, outcome_of, steps_of

FLIPS = 64


@pytest.fixture(scope="module")
def checkpoints(scene: Scene) -> Path:
    """A run folder with checkpoints of steps 3, the best by then, and 4."""
    run = scene.before_save() / "run"
    assert steps_of(run) == [3, 4]
    return run


def passed_over(run: Path) -> str:
    """Why step 4 is not used: it is passed over with a warning, and refused where it is asked for."""
    found, warnings = find_checkpoint(RunDir(run))
    assert found.step == 3 and len(warnings) == 1 and warnings[0].startswith("step-000004 is damaged"), warnings
    with pytest.raises(ResumeError) as refused:
        find_checkpoint(RunDir(run), 4)
    assert warnings[0].partition(": ")[2] in str(refused.value)
    return warnings[0]


def test_any_length_but_its_own_is_seen(checkpoints: Path) -> None:
    for path in sorted((checkpoints / "ckpt" / "step-000004").iterdir()):
        content = path.read_bytes()
        for length in {0, 1, len(content) // 2, len(content) - 1}:
            path.write_bytes(content[:length])
            expected = f"{length:,} of {len(content):,} bytes" if path.name != MANIFEST else ""
            assert f"{path.name}: {expected}" in passed_over(checkpoints)
        path.write_bytes(content + b"x")
        assert path.name in passed_over(checkpoints)
        path.write_bytes(content)
    assert find_checkpoint(RunDir(checkpoints))[0].step == 4


def test_any_flipped_byte_is_seen(checkpoints: Path) -> None:
    """safetensors and torch would load such a file."""
    draw = random.Random(0)
    for path in sorted((checkpoints / "ckpt" / "step-000004").iterdir()):
        content = path.read_bytes()
        for _ in range(FLIPS):
            changed = bytearray(content)
            changed[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            path.write_bytes(changed)
            assert path.name in passed_over(checkpoints)
        path.write_bytes(content)
    assert find_checkpoint(RunDir(checkpoints))[0].step == 4


@pytest.mark.parametrize("damage", ["missing", "renamed", "added", "link", "no manifest"])
def test_other_damage_is_seen(checkpoints: Path, tmp_path: Path, damage: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(checkpoints, run)
    folder = run / "ckpt" / "step-000004"
    weights = folder / "adapter_model.safetensors"
    if damage == "missing":
        weights.unlink()
    elif damage == "renamed":
        weights.rename(folder / "other.safetensors")
    elif damage == "added":
        (folder / "notes.txt").write_text("mine", encoding="utf-8")
    elif damage == "link":
        weights.rename(run / "outside")
        weights.symlink_to(run / "outside")
    else:
        (folder / MANIFEST).unlink()
    assert {"added": "notes.txt", "no manifest": MANIFEST}.get(damage, weights.name) in passed_over(run)


def test_through_the_command_line(scene: Scene) -> None:
    """A damaged step is refused by name before anything is loaded; without a name the older one is taken."""
    folder = scene.before_save()
    path = folder / "run" / "ckpt" / "step-000004" / "optimizer.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:1000])
    refused = scene.train(folder, "--resume", "--from", "4")
    assert refused.code == 5 and f"optimizer.safetensors: 1,000 of {len(content):,} bytes" in refused.said, refused
    assert "rows" not in refused.said, "nothing was loaded for it"
    ended = scene.train(folder, "--resume")
    assert ended.code == 0 and "resumed from step-000003" in ended.said, ended
    assert "warning: step-000004 is damaged and passed over: optimizer.safetensors" in ended.said
    assert outcome_of(folder / "run") == scene.expected


def test_what_the_disk_does_not_hand_out_is_not_taken_for_damaged(scene: Scene) -> None:
    """A checkpoint that may be whole tomorrow is neither passed over nor removed; an earlier step goes on by name."""
    folder = scene.before_save()
    path = folder / "run" / "ckpt" / "step-000004" / "optimizer.safetensors"
    setups = [("fail_reading", {"path": str(path)})]
    refused = scene.train(folder, "--resume", setups=setups)
    assert refused.code == 6 and f"cannot read {path}: Input/output error" in refused.said, refused
    assert "--from" in refused.said and steps_of(folder / "run") == [3, 4] and not damaged(folder / "run")
    assert scene.finish(folder) == ""
    other = scene.before_save()
    setups = [("fail_reading", {"path": str(other / path.relative_to(folder))})]
    ended = scene.train(other, "--resume", "--from", "3", setups=setups)
    assert ended.code == 0 and outcome_of(other / "run") == scene.expected, ended


@pytest.mark.slow
def test_nothing_left_to_go_on_from(scene: Scene) -> None:
    folder = scene.before_save()
    for path in (folder / "run" / "ckpt").glob("step-*/state.json"):
        path.unlink()
    ended = scene.train(folder, "--resume")
    assert ended.code == 5 and ended.said.count("state.json: missing") == 2, ended
    assert "no complete checkpoint" in ended.said and "start again without --resume" in ended.said


@pytest.mark.slow
def test_the_best_checkpoint_is_lost(scene: Scene) -> None:
    """It is said, and which is best is judged from there on."""
    folder = scene.before_save()
    (folder / "run" / "ckpt" / "step-000003" / "adapter_model.safetensors").write_bytes(b"")
    ended = scene.train(folder, "--resume")
    assert ended.code == 0 and "the best checkpoint so far is lost" in ended.said, ended
    assert scene.finish(folder) == ""


def test_rows_that_change_under_a_run(scene: Scene) -> None:
    """They were read before the first step, so the run ends as the straight one; resumed, it wants the old ones."""
    for number, code in ((signal.SIGCONT, 0), (signal.SIGKILL, None)):
        folder = scene.before_save()
        rows = folder / "train.jsonl"
        before = rows.read_bytes()
        child = scene.start(folder, "--resume", setups=[("stop_at_save", {"step": STEP})])
        child.stopped()
        rows.write_bytes(before.replace(b"list files", b"list folders"))
        os.kill(child.pid, number)
        assert child.ended().code == code
        if number == signal.SIGCONT:
            assert outcome_of(folder / "run") == scene.expected
            continue
        refused = scene.train(folder, "--resume")
        assert refused.code == 5 and "data" in refused.said and not damaged(folder / "run"), refused
        rows.write_bytes(before)
        assert scene.finish(folder) == ""
