"""The log of a run: nothing twice after a resume, and no full disk ends a run that only logs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qlora_train.train.metrics import Metrics, peak_memory_bytes


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_are_appended_with_kind_and_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path, after_step=0)
    assert not path.exists(), "a run that never steps leaves no empty log"
    metrics.write("train", 1, loss=2.5)
    metrics.write("eval", 1, eval_loss=2.0)
    assert lines(path) == [
        {"kind": "train", "step": 1, "loss": 2.5},
        {"kind": "eval", "step": 1, "eval_loss": 2.0},
    ]
    assert metrics.failed is None


@pytest.mark.parametrize(("after_step", "left"), [(0, []), (3, [1, 2, 3]), (5, [1, 2, 3, 4, 5])])
@pytest.mark.parametrize("torn", [b"", b'{"kind": "train", "st', b'{"kind": "train", "step": 1}'])
def test_a_resume_drops_later_lines_and_a_torn_one(
    tmp_path: Path, after_step: int, left: list[int], torn: bytes
) -> None:
    path = tmp_path / "metrics.jsonl"
    first = Metrics(path, after_step=0)
    for step in range(1, 6):
        first.write("train", step, loss=float(step))
    path.write_bytes(path.read_bytes() + torn)
    resumed = Metrics(path, after_step=after_step)
    assert [line["step"] for line in lines(path)] == left
    resumed.write("train", after_step + 1)
    assert [line["step"] for line in lines(path)] == [*left, after_step + 1]
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_full_disk_raises_nothing_and_its_lines_are_written_later(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    said: list[str] = []
    metrics = Metrics(path, after_step=0, warn=said.append)
    metrics.write("train", 1)
    path.rename(tmp_path / "aside")
    path.symlink_to("/dev/full")
    for step in (2, 3):
        metrics.write("train", step)
        assert metrics.failed is not None and "No space left" in metrics.failed and str(path) in metrics.failed
    assert len(said) == 1 and "training goes on" in said[0]
    path.unlink()
    (tmp_path / "aside").rename(path)
    path.write_bytes(path.read_bytes() + b'{"kind": "tr')  # what a full disk may leave of a line
    metrics.write("train", 4)
    assert metrics.failed is None and [line["step"] for line in lines(path)] == [1, 2, 3, 4]


@pytest.mark.parametrize("due", [False, True])
def test_an_evaluation_that_is_still_due_is_logged_once(tmp_path: Path, due: bool) -> None:
    """A run that was killed after the line and before its checkpoint makes the same evaluation again."""
    path = tmp_path / "metrics.jsonl"
    first = Metrics(path, after_step=0)
    for kind, step in (("train", 2), ("eval", 2), ("train", 3), ("eval", 3)):
        first.write(kind, step)
    Metrics(path, after_step=3, evaluation_due=due)
    kept = [(line["kind"], line["step"]) for line in lines(path)]
    assert kept == [("train", 2), ("eval", 2), ("train", 3), *([] if due else [("eval", 3)])]


def test_a_folder_that_is_gone_is_kept_in_failed(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "gone" / "metrics.jsonl", after_step=0)
    metrics.write("train", 1)
    assert metrics.failed is not None and "No such file" in metrics.failed


def test_a_line_torn_by_a_full_disk_in_the_middle_does_not_stop_a_resume(tmp_path: Path) -> None:
    """A write that failed half-way leaves a part of a line, and the next one is appended to it."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"kind": "train", "step": 1}\n{"kind": "tr{"kind": "train", "step": 3}\n')
    Metrics(path, after_step=9).write("train", 10)
    whole = [line for line in path.read_text().splitlines() if line.startswith('{"kind": "train"')]
    assert [json.loads(line)["step"] for line in whole] == [1, 10]


def test_peak_memory_grows_with_use() -> None:
    before = peak_memory_bytes(torch.device("cpu"))
    assert 2**24 < before < 2**40, "bytes, not KiB"
