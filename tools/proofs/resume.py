"""No run is ever lost: killed, starved or signalled, it goes on to the bits of the straight run, at what cost."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from proofs.common import ROOT, WORK, Bar, fresh, tests_pass

sys.path.append(str(ROOT))  # the harness lies with the tests
from tests.faults import cases
from tests.faults.harness import STEP as ATTACKED
from tests.faults.harness import Launcher, Point, Scene, changing_points, points_of_save, trace_of_save
from tests.tiny import build_tiny_llama

T = TypeVar("T")
FOLDER = WORK / "resume"
QUICKSTART = ROOT / "recipes" / "quickstart.yaml"
AT_ONCE = 2  # children
KILLS, KILLS_FULL = 10, 50
ERRORS = ("ENOSPC", "EIO", "EROFS")
SAMPLE = {"loading the base": "SIGTERM", "a step": "SIGHUP", "an evaluation": "SIGTERM", "a checkpoint": "SIGINT"}
STEPS, SAVES, NOTES = 4, 5, 20
EXIT_S = 5.0  # that an interpreter with these libraries may take to end
TESTS = {
    "damaged checkpoints, and the order of writing": ["tests/faults/test_damage.py", "tests/faults/test_kill_order.py"],
    "changed recipes, rows and machines, forks, replays": [
        "tests/invariant/test_resume.py",
        "tests/invariant/test_resume_changes.py",
        "tests/invariant/test_replay.py",
        "tests/unit/train/test_keys.py",
    ],
    "numbers that are not finite, spikes, dead adapters": [
        "tests/faults/test_numerics.py",
        "tests/unit/train/test_flight.py",
        "tests/unit/train/test_watch.py",
    ],
}


def measure(full: bool) -> list[Bar]:
    """All bars of resuming."""
    folder = fresh(FOLDER)
    launcher = Launcher(folder / "children")
    try:
        scene = Scene(launcher, folder / "scene", build_tiny_llama(folder / "model"))
        bars = [*_kills(scene, full), *_faults(scene, full), *_signals(scene, full), *_controls(scene)]
    finally:
        launcher.close()
    step_s, cost = _cost(folder / "cost")
    return [*bars, *cost, *_latency(folder / "latency", step_s), *tests_pass(TESTS)]


def _wrong(what: str, case: Callable[[T], str], items: Iterable[T]) -> list[Bar]:
    """How many cases there were, and how many ended otherwise than they must."""
    listed = list(items)
    print(f"{what}: {len(listed)}", flush=True)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = list(pool.map(case, listed))
    for item, words in zip(listed, found, strict=True):
        if words:
            print(f"{item}: {words}", file=sys.stderr)
    return [Bar(what, len(listed)), Bar(f"{what}: not the straight run afterwards", sum(map(bool, found)), at_most=0)]


def _points(scene: Scene) -> list[Point]:
    """The calls of a save that change files; RuntimeError where strace cannot be used."""
    return points_of_save(changing_points(trace_of_save(scene)))


def _kills(scene: Scene, full: bool) -> list[Bar]:
    """kill -9 at every call of a save, and at random moments of a run."""

    def kill(seed: int) -> str:
        return cases.kill_somewhere(scene, random.Random(seed), 1 + seed % 3)

    every = "kill -9 at each file-changing system call of a save"
    bars = _wrong(every, partial(cases.kill_and_resume, scene), _points(scene))
    seeds = range(KILLS_FULL if full else KILLS)
    return bars + _wrong("runs killed at random moments, once to three times", kill, seeds)


def _faults(scene: Scene, full: bool) -> list[Bar]:
    """Writes that the disk refuses."""

    def fail(item: tuple[Point, str]) -> str:
        return cases.fail_and_resume(scene, *item)

    refusable = [p for p in _points(scene) if p.call in ("write", "fsync", "rename")]
    chosen = [(p, error) for p in refusable if f"step-{ATTACKED:06d}" in p.arguments for error in ERRORS]
    return _wrong("errors of the disk in a save", fail, chosen if full else random.Random(0).sample(chosen, 6))


def _signals(scene: Scene, full: bool) -> list[Bar]:
    """SIGTERM, SIGHUP and SIGINT in the phases of a run."""

    def stop(item: tuple[str, str]) -> str:
        return cases.stop_and_resume(scene, item[0], signal.Signals[item[1]])

    every = [(phase, name) for phase in cases.PHASES for name in ("SIGTERM", "SIGHUP", "SIGINT")]
    return _wrong("signals in the phases of a run", stop, every if full else SAMPLE.items())


def _controls(scene: Scene) -> list[Bar]:
    """What a resume must not lose, lost: the comparison has to see it."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = list(pool.map(partial(cases.lose_and_resume, scene), cases.CONTROLS))
    seen = sum("adapter_model" in words for words in found)
    return [Bar("negative controls that the comparison sees", seen, f"of {len(found)}", at_least=len(found))]


def _cost(folder: Path) -> tuple[float, list[Bar]]:
    """Seconds of a step of the quickstart; and what a checkpoint of it takes."""
    from qlora_train.artifacts.files import write_file
    from qlora_train.artifacts.layout import RunDir
    from qlora_train.recipe.load import load_recipe, resolved_yaml
    from qlora_train.train.checkpoint import checkpoint_bytes, retire_old, save_checkpoint
    from qlora_train.train.flight import FlightRecorder
    from qlora_train.train.metrics import Silent
    from qlora_train.train.optim import trainable_parameters
    from qlora_train.train.setup import prepare
    from qlora_train.train.state import TrainState
    from qlora_train.train.step import StepResult, norms, train_step

    loaded, run_dir = load_recipe(QUICKSTART, [f"run.dir={folder}"]), RunDir(fresh(folder))
    train = loaded.recipe.train
    job = prepare(loaded.recipe, run_dir, Silent()).job
    job.model.train()
    options: dict[str, Any] = {"seed": 0, "learning_rate": train.learning_rate, "max_grad_norm": train.max_grad_norm}
    run_dir.root.mkdir(parents=True)
    write_file(run_dir.recipe, resolved_yaml(loaded).encode())

    def advance(step: int) -> None:
        train_step(job.causal, job.loader.step(step), job.optimizer, job.accelerator, step=step, **options)

    def save(step: int) -> None:
        state = TrainState(step=step + 1)
        last_steps = job.last_steps.as_dict()
        save_checkpoint(run_dir, state, job.model, job.optimizer, job.binding, job.hooks, job.environment, last_steps)
        retire_old(run_dir, train.keep, None)

    def note(step: int) -> None:
        recorder.note(step, StepResult(1.0, 1.0, 1, 1, 1, grad_norms=some_norms), train.learning_rate)

    recorder = FlightRecorder(job, "")
    some_norms = norms(list(trainable_parameters(job.model).values()))
    step_s, note_s, save_s = _seconds(STEPS, advance), _seconds(NOTES, note), _seconds(SAVES, save)
    share = save_s / (train.save_every * step_s)
    return step_s, [
        Bar("quickstart (135M): bytes of a checkpoint", checkpoint_bytes(job.model, job.optimizer) / 2**20, "MiB"),
        Bar("quickstart (135M): a checkpoint, older ones retired", save_s, "s"),
        Bar("quickstart (135M): a step", step_s, "s"),
        Bar("quickstart (135M): the flight recorder, share of a step", note_s / step_s, at_most=0.01),
        Bar(f"quickstart (135M): share of the time, a checkpoint every {train.save_every} steps", share, at_most=0.03),
    ]


def _seconds(count: int, action: Callable[[int], object]) -> float:
    """Mean seconds of an action, the first of `count` left out."""
    action(0)
    started = time.perf_counter()
    for index in range(1, count):
        action(index)
    return (time.perf_counter() - started) / (count - 1)


def _latency(folder: Path, step_s: float) -> list[Bar]:
    """Seconds from SIGTERM to the end of a real process, in the middle of its training."""
    command = [sys.executable, "-m", "qlora_train", "train", str(QUICKSTART), f"run.dir={fresh(folder)}"]
    command += ["data.eval=[]", "train.warmup_frac=0"]
    print(f"$ qlora-train {' '.join(command[3:])}", flush=True)
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("step 1/"):
                break
        time.sleep(step_s / 2)
        started = time.perf_counter()
        process.send_signal(signal.SIGTERM)
        code = process.wait()
    seconds = time.perf_counter() - started
    return [
        Bar("SIGTERM: exit code", code, at_least=143, at_most=143),
        Bar(
            "SIGTERM: quickstart stopped and saved",
            seconds,
            "s",
            at_most=2 * step_s + EXIT_S,
        ),
    ]
