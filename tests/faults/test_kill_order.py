"""What a power cut cannot undo: files are on disk before the name that publishes them, and that before what follows.

Proven from the order of the system calls; the claim that fsync reaches the disk is the kernel's and the disk's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import pytest

from qlora_train.artifacts.folders import MANIFEST
from tests.faults.harness import STEP, Point, changing_points

_PATH = re.compile(r"^\d+<(.*?)>")  # the file of a descriptor
_NAMES = re.compile(r'"([^"]+)"')
pytestmark = pytest.mark.usefixtures("traceable")


def synced(point: Point) -> str | None:
    """The path that a call puts on disk."""
    found = _PATH.match(point.arguments)
    return found.group(1) if found and point.call in ("fsync", "fdatasync") else None


def written(point: Point) -> str | None:
    """The path that a call changes the content of, through a descriptor."""
    found = _PATH.match(point.arguments)
    return found.group(1) if found and point.call in ("write", "writev", "pwrite64", "ftruncate") else None


def renamed(point: Point) -> tuple[str, str] | None:
    """The old and the new name of a rename."""
    names = _NAMES.findall(point.arguments)
    return (names[0], names[1]) if point.call.startswith("rename") and len(names) == 2 else None


def disorder(points: list[Point], target: Path, names: Iterable[str]) -> list[str]:
    """What is wrong with how a folder of these files was published: of them, itself, and the folder it lies in."""
    published = _publishing(points, target)
    temporary = renamed(points[published])[0]  # type: ignore[index]
    before, after = points[:published], points[published + 1 :]
    wrong = []
    for name in names:
        own = {f"{temporary}/{name}"}
        for point in reversed(before):  # a file may have had another name first
            if (pair := renamed(point)) and pair[1] in own:
                own.add(pair[0])
        last_write = max((i for i, p in enumerate(before) if written(p) in own), default=-1)
        if not any(synced(p) in own for p in before[last_write + 1 :]):
            wrong.append(f"{name} is not synced after its last write")
        last_name = max((i for i, p in enumerate(before) if (n := renamed(p)) and n[1] in own), default=-1)
        if not any(synced(p) == temporary for p in before[max(last_write, last_name) + 1 :]):
            wrong.append(f"the name {name} is not synced")
    parent = next((i for i, p in enumerate(after) if synced(p) == str(target.parent)), None)
    later = next((i for i, p in enumerate(after) if p.call.startswith(("rename", "unlink", "rmdir"))), len(after))
    if parent is None or parent > later:
        wrong.append("older things are touched before the new name is synced")
    return wrong


def _publishing(points: list[Point], target: Path) -> int:
    """Which call gives a folder its name."""
    return next(i for i, p in enumerate(points) if (pair := renamed(p)) and pair[1] == str(target))


@pytest.fixture(scope="module")
def run(save_trace: Path) -> Path:
    """The folder of the traced run."""
    return save_trace.parent / "run"


def file_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_published_in_order(save_trace: Path, run: Path) -> None:
    """A checkpoint, and the adapter at the end: all files synced, then the folder, its name, and the folder above."""
    points, newest = changing_points(save_trace), max((run / "ckpt").iterdir())
    for target, like in ((run / "ckpt" / f"step-{STEP:06d}", newest), (run / "adapter", run / "adapter")):
        names = file_names(like)
        assert MANIFEST in names and len(names) >= 3
        assert disorder(points, target, names) == []


def test_the_log_is_synced_before_the_checkpoint_that_follows_it(save_trace: Path, run: Path) -> None:
    points = changing_points(save_trace)
    before = points[: _publishing(points, run / "ckpt" / f"step-{STEP + 2:06d}")]
    last_line = max(i for i, p in enumerate(before) if (written(p) or "").endswith("/metrics.jsonl"))
    assert any((synced(p) or "").endswith("/metrics.jsonl") for p in before[last_line:])


def test_disorder_is_seen(save_trace: Path, run: Path) -> None:
    """Negative controls: without an fsync of the save, and with the rename before all else."""
    points, target = changing_points(save_trace), run / "ckpt" / f"step-{STEP:06d}"
    names, published = file_names(max((run / "ckpt").iterdir())), _publishing(points, target)
    own = str((renamed(points[published]) or ("",))[0])
    of_files = [i for i, p in enumerate(points) if (synced(p) or "").startswith(f"{own}/")]
    assert len(of_files) == len(names)
    for index in (*of_files, published + 1):
        assert disorder(points[:index] + points[index + 1 :], target, names), points[index]
    assert disorder([p for p in points if synced(p) != own], target, names)
    assert disorder([points[published], *points[:published], *points[published + 1 :]], target, names)
