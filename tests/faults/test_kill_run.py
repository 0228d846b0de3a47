"""kill -9 at any moment of a run, once and again; and proof that the comparison would see what is lost."""

from __future__ import annotations

import random
import signal

import pytest

from tests.faults.cases import CONTROLS, kill_somewhere, lose_and_resume
from tests.faults.harness import Scene, steps_of, tracing

RANDOM_KILLS = 50


@pytest.mark.slow
def test_killed_twice(scene: Scene) -> None:
    assert kill_somewhere(scene, random.Random(2), 2) == ""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_random(scene: Scene) -> None:
    """50 moments: most once, every fifth run two or three times."""
    draw, wrong, killed = random.Random(3), [], 0
    while killed < RANDOM_KILLS:
        times = draw.choice((1, 1, 1, 2, 3))
        killed += times
        if found := kill_somewhere(scene, draw, times):
            wrong.append(found)
    assert not wrong


@pytest.mark.slow
@pytest.mark.usefixtures("traceable")
def test_killed_in_the_first_save(scene: Scene) -> None:
    """Before the rename that publishes, which is the second: there is nothing to resume, and `train` starts."""
    folder = scene.before_start()
    child = scene.start(folder, setups=[("stop_at_save", {"step": 2})])
    child.stopped()
    with tracing(child.pid, folder / "trace", "inject=rename:signal=KILL:when=2"):
        child.go()
        assert child.ended().signal == signal.SIGKILL
    assert steps_of(folder / "run") == [] and (folder / "run" / "base.json").is_file()
    refused = scene.train(folder, "--resume")
    assert refused.code == 5 and "no complete checkpoint" in refused.said and "without --resume" in refused.said
    assert scene.finish(folder) == ""


@pytest.mark.slow
@pytest.mark.parametrize("control", CONTROLS)
def test_what_is_lost_is_seen(scene: Scene, control: str) -> None:
    """Negative controls: each ends with exit code 0, as with other trainers, and with another adapter."""
    found = lose_and_resume(scene, control)
    assert "adapter_model.safetensors" in found and "exit code" not in found, found
