"""Exports that are killed or refused a write: nothing half-written gets the target's name, and the next is clean."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.faults.cases import fail_export, kill_export
from tests.faults.harness import Point, Scene, changing_points, trace_of_export

SAMPLE = 16
REFUSABLE = ("mkdir", "write", "fsync", "rename")
pytestmark = pytest.mark.usefixtures("traceable")


@pytest.fixture(scope="module")
def trace(scene: Scene) -> Path:
    """What strace saw of an export."""
    return trace_of_export(scene)


@pytest.fixture(scope="module")
def clean(trace: Path) -> Path:
    """The export that nothing disturbed."""
    return trace.parent / "merged"


@pytest.fixture(scope="module")
def points(trace: Path) -> list[Point]:
    """The calls that change files of the target, of the shards beside it, or of the run folder."""
    return [point for point in changing_points(trace) if str(trace.parent) in point.arguments]


def test_an_export_makes_the_calls_that_are_attacked(points: list[Point]) -> None:
    calls = {point.call for point in points}
    assert {"openat", "mkdir", "write", "fsync", "rename", "unlinkat"} <= calls and len(points) > 60
    assert any(point.call == "write" and "model.safetensors>" in point.arguments for point in points)


def test_killed_before_it_has_its_name(scene: Scene, clean: Path, points: list[Point]) -> None:
    naming = next(p for p in points if p.call == "rename" and p.arguments.endswith('/merged") = 0'))
    assert kill_export(scene, clean, naming) == ""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_at_a_sample_of_all_calls(scene: Scene, clean: Path, points: list[Point]) -> None:
    chosen = random.Random(0).sample(points, SAMPLE)
    wrong = {point: found for point in chosen if (found := kill_export(scene, clean, point))}
    assert not wrong


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("error", ["ENOSPC", "EIO"])
def test_a_sample_of_all_calls_fails(scene: Scene, clean: Path, points: list[Point], error: str) -> None:
    """Of the target and the shards: a line of the run's log of exports that is lost costs a notice."""
    able = [p for p in points if p.call in REFUSABLE and "merged" in p.arguments and "exports.jsonl" not in p.arguments]
    able = [p for p in able if "= -1 EEXIST" not in p.arguments]  # making a folder that is there needs no disk
    chosen = random.Random(error).sample(able, SAMPLE)
    wrong = {point: found for point in chosen if (found := fail_export(scene, clean, point, error))}
    assert not wrong
