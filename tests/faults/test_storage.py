"""Disks that are full, broken, read-only or slow to say so: what was saved stays, and the message says what to do."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from qlora_train.artifacts.folders import locked, manifest_faults
from qlora_train.artifacts.layout import RunDir
from tests.faults.cases import fail_and_resume
from tests.faults.harness import (
    STEP,
    Ended,
    Point,
    Scene,
    damaged,
    leftovers,
    outcome_of,
    steps_of,
    tracing,
)
from tests.invariant.runs import contents

REFUSABLE = ("openat", "mkdir", "write", "fsync", "rename")


def refused(ended: Ended, *words: str) -> None:
    assert ended.code == 6, ended
    assert "error[machine]" in ended.said and "Fix:" in ended.said and "Traceback" not in ended.said, ended.said
    for word in words:
        assert word in ended.said, (word, ended.said)


def _refusable(points: list[Point]) -> list[Point]:
    """Calls on the files of the new checkpoint that a disk can refuse; making a folder that is there needs no disk."""
    own = [p for p in points if p.call in REFUSABLE and f"step-{STEP:06d}" in p.arguments]
    return [p for p in own if "= -1 EEXIST" not in p.arguments]


def test_a_save_that_fails_leaves_the_checkpoint_before_it(scene: Scene, save_points: list[Point]) -> None:
    """A full disk in the middle of a file."""
    point = random.Random(1).choice([point for point in _refusable(save_points) if point.call == "write"])
    assert fail_and_resume(scene, point, "ENOSPC") == "", point


@pytest.mark.slow
def test_a_rename_to_what_the_file_system_takes_for_another_disk(scene: Scene, save_points: list[Point]) -> None:
    publishing = next(point for point in reversed(_refusable(save_points)) if point.call == "rename")
    assert fail_and_resume(scene, publishing, "EXDEV") == ""


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("error", ["ENOSPC", "EDQUOT", "EIO"])
def test_every_call_of_a_save_may_fail(scene: Scene, save_points: list[Point], error: str) -> None:
    wrong = {p: found for p in _refusable(save_points) if (found := fail_and_resume(scene, p, error))}
    assert not wrong


def test_a_full_disk_for_the_log_alone_costs_one_warning(scene: Scene, save_points: list[Point]) -> None:
    """Lines that cannot be written are kept, and written when there is room again."""
    folder = scene.before_save()
    metrics = folder / "run" / "metrics.jsonl"
    child = scene.start(folder, "--resume", setups=[("stop_at_save", {"step": STEP})])
    child.stopped()
    options = ("inject=write:error=ENOSPC:when=1..3", "trace=write")
    with tracing(child.pid, folder / "trace", *options, path=metrics):
        child.go()
        ended = child.ended()
    assert ended.code == 0, ended.said
    assert ended.said.count("training goes on") == 1 and "metrics are incomplete" not in ended.said, ended.said
    assert outcome_of(folder / "run") == scene.expected


@pytest.mark.slow
@pytest.mark.parametrize("on_disk_full", ["stop", "wait"])
def test_a_disk_that_is_full_for_a_while(scene: Scene, on_disk_full: str) -> None:
    """`train.on_disk_full` says whether a run ends or waits; the key may change on resume."""
    folder = scene.before_save()
    ended = scene.train(folder, "--resume", f"train.on_disk_full={on_disk_full}", setups=[("fill_disk", {"times": 2})])
    if on_disk_full == "stop":
        refused(ended, "No space left on device", " needed")
        assert scene.finish(folder) == ""
    else:
        assert ended.code == 0 and ended.said.count("training waits for room") == 2, ended
        assert outcome_of(folder / "run") == scene.expected


@pytest.mark.slow
def test_a_limit_on_the_size_of_files(scene: Scene) -> None:
    """RLIMIT_FSIZE stands for every refusal in the middle of a file, on machines without strace too."""
    folder = scene.before_save()
    ended = scene.train(folder, "--resume", setups=[("limit_file_size", {"num_bytes": 60_000})])
    refused(ended, "File too large", "ulimit -f")
    assert not damaged(folder / "run") and steps_of(folder / "run")[-1] == 4
    assert scene.finish(folder) == ""


@pytest.mark.parametrize(
    ("num_bytes", "what"),
    [(5_000, "the tokenizer's"), pytest.param(60_000, "the weights", marks=pytest.mark.slow)],
)
def test_a_write_of_an_export_that_is_refused_publishes_nothing(scene: Scene, num_bytes: int, what: str) -> None:
    """Each library says it in its own way; the file that was too large was `what`. The next export is whole."""
    folder = scene.finished()
    before = contents(folder / "run")
    setups = [("limit_file_size", {"num_bytes": num_bytes})]
    refused(
        scene.launcher.run("export", folder / "run", folder / "merged", setups=setups),
        *("File too large", "merged", "ulimit -f"),
    )
    assert not (folder / "merged").exists() and contents(folder / "run") == before, what
    if num_bytes == 60_000:
        assert scene.launcher.run("export", folder / "run", folder / "merged").code == 0
        assert manifest_faults(folder / "merged") == [] and leftovers(folder) == []


def test_no_room_for_an_export_is_known_before_anything_is_written(scene: Scene) -> None:
    folder = scene.finished()
    setups = [("report_free_space", {"num_bytes": 300_000})]
    ended = scene.launcher.run("export", folder / "run", folder / "merged", setups=setups)
    refused(ended, str(folder / "merged"), " needs ", " free")
    assert not (folder / "merged").exists() and leftovers(folder) == []


def test_a_folder_that_holds_other_things_is_not_trained_into(scene: Scene) -> None:
    folder = scene.before_start()
    (folder / "run").mkdir()
    (folder / "run" / "thesis.txt").write_text("mine", encoding="utf-8")
    before = contents(folder)
    ended = scene.train(folder)
    assert ended.code == 2 and "holds other things already (thesis.txt)" in ended.said, ended
    assert contents(folder) == before


def test_no_room_for_the_checkpoints_is_known_before_anything_is_loaded(scene: Scene) -> None:
    folder = scene.before_start()
    ended = scene.train(folder, setups=[("report_free_space", {"num_bytes": 300_000})])
    refused(ended, "checkpoints:", "adapter:", "train.keep", "free for it")
    assert "Loading" not in ended.said and "selfcheck" not in ended.said
    assert not (folder / "run" / "base.json").exists()


def test_a_run_folder_that_cannot_be_written(scene: Scene) -> None:
    """Read-only by a mount that the child alone sees; or not a folder; each is said before anything is loaded."""
    folder = scene.before_start()
    (folder / "run").mkdir()
    if os.geteuid() == 0:
        ended = scene.train(folder, setups=[("mount_read_only", {"path": str(folder)})])
        if "cannot mount" in ended.said:
            pytest.skip(ended.said.strip())
        refused(ended, str(folder / "run"), "Read-only file system", "mount the file system writable")
    else:
        (folder / "run").chmod(0o500)
        refused(scene.train(folder), str(folder / "run"), "Permission denied", "this process runs as")
        (folder / "run").chmod(0o700)
    assert list((folder / "run").iterdir()) == []
    (folder / "run").rmdir()
    (folder / "run").write_text("a file", encoding="utf-8")
    ended = scene.train(folder)
    assert ended.code == 2 and "is a file" in ended.said and (folder / "run").read_text(encoding="utf-8") == "a file"


def test_the_lock_names_its_holder_and_a_killed_one_frees_it(scene: Scene) -> None:
    folder = scene.before_save()
    child = scene.start(folder, "--resume", setups=[("stop_at_save", {"step": STEP})])
    child.stopped()
    second = scene.train(folder, "--resume")
    refused(second, f"in use by pid {child.pid} on ", " since 20")
    os.kill(child.pid, signal.SIGKILL)
    assert child.ended().signal == signal.SIGKILL
    with locked(RunDir(folder / "run")):
        pass


@pytest.mark.slow
def test_clocks_may_jump(scene: Scene) -> None:
    """Order is that of the steps: times of files in 1970 and 2099 change nothing."""
    folder = scene.before_save()
    for step, when in zip(steps_of(folder / "run"), (4e9, 0, 3e9), strict=False):
        path = folder / "run" / "ckpt" / f"step-{step:06d}"
        for file in (*path.iterdir(), path):
            os.utime(file, (when, when))
    assert scene.finish(folder) == ""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two megabytes, where this machine lets us mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "small", folder]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
def test_a_disk_that_is_really_full(scene: Scene, small_disk: Path) -> None:
    """Filled up by somebody else after the start: the run ends with its last checkpoint whole, and goes on later."""
    folder = small_disk / "case"
    shutil.copytree(scene.before_save(), folder)
    child = scene.start(folder, "--resume", setups=[("stop_at_save", {"step": STEP})])
    child.stopped()
    filler = small_disk / "filler"
    with pytest.raises(OSError, match="No space left"):
        filler.write_bytes(bytes(4 * 2**20))
    child.go()
    refused(child.ended(), "No space left on device", f"step-{STEP:06d}", " needed", "0 MiB free")
    assert not damaged(folder / "run") and leftovers(folder / "run") == []
    filler.unlink()
    assert scene.finish(folder) == ""


def test_a_file_system_without_locks_is_refused(scene: Scene) -> None:
    """Two runs in one folder would spoil each other there."""
    folder = scene.before_start()
    ended = scene.train(folder, setups=[("refuse_locks", {})])
    refused(ended, f"cannot lock {folder / 'run'}: No locks available", "on a file system with locks")
    assert "selfcheck" not in ended.said and steps_of(folder / "run") == []
