"""kill -9 while a checkpoint is saved: at whatever call, the resumed run is the straight run, to the bit."""

from __future__ import annotations

import random

import pytest

from tests.faults.cases import kill_and_resume
from tests.faults.harness import STEP, Point, Scene

SAMPLE = 2
pytestmark = pytest.mark.usefixtures("traceable")


def test_a_save_makes_the_calls_that_are_attacked(save_points: list[Point]) -> None:
    """The list is no empty one: files are written, synced and renamed, and an older checkpoint is removed."""
    calls = {point.call for point in save_points}
    assert {"openat", "write", "fsync", "mkdir", "rename"} <= calls and {"unlink", "unlinkat"} & calls
    assert save_points[-1].call == "getppid" and len(save_points) > 30


def test_some_calls(scene: Scene, save_points: list[Point]) -> None:
    """A sample of all calls, the rename that publishes among them."""
    publishing = next(p for p in save_points if p.call == "rename" and f'/step-{STEP:06d}"' in p.arguments)
    chosen = random.Random(0).sample([p for p in save_points if p != publishing], SAMPLE - 1)
    for point in (publishing, *chosen):
        assert kill_and_resume(scene, point) == "", point


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_call(scene: Scene, save_points: list[Point]) -> None:
    wrong = {point: found for point in save_points if (found := kill_and_resume(scene, point))}
    assert not wrong
