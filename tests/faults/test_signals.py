"""Signals, and surroundings that are taken away: the run ends soon and saved, or goes on, and is the same run."""

from __future__ import annotations

import json
import os
import random
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.cases import PHASES, stop_and_resume, stop_somewhere
from tests.faults.harness import ROOT, Ended, Scene, damaged, leftovers, outcome_of, steps_of

RANDOM_STOPS = 20


def ended_by(ended: Ended, number: int) -> None:
    assert ended.code == 128 + number and "Traceback" not in ended.said, ended


def test_sigterm_in_an_evaluation(scene: Scene) -> None:
    """It is given up, the step is saved, and the resumed run makes up for it."""
    assert stop_and_resume(scene, "an evaluation", signal.SIGTERM) == ""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_every_signal_in_every_phase(scene: Scene, number: signal.Signals) -> None:
    wrong = {phase: found for phase in PHASES if (found := stop_and_resume(scene, phase, number))}
    assert not wrong


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sigterm_at_random(scene: Scene) -> None:
    draw = random.Random(5)
    wrong = [found for _ in range(RANDOM_STOPS) if (found := stop_somewhere(scene, draw))]
    assert not wrong


def test_a_template_worker_that_is_killed_is_replaced(scene: Scene) -> None:
    """The rows are those of the straight run; a cache of its own makes the child read and render them."""
    folder = scene.before_start()
    environment, setups = {"QLORA_TRAIN_CACHE": str(folder / "cache")}, [("kill_template_worker", {"call": 1})]
    ended = scene.launcher.run("data", folder / "recipe.yaml", environment=environment, setups=setups)
    assert ended.code == 0 and "a template worker was killed" in ended.said, ended
    keys = ("num_rows", "num_tokens", "num_supervised_tokens")
    found, expected = (
        [[split[key] for key in keys] for split in json.loads((path / "run" / "data.json").read_text())["splits"]]
        for path in (folder, scene.folder / "straight")
    )
    assert found == expected and found[0][0] == 24


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_rows_are_read_leaves_no_cache_behind(scene: Scene, number: signal.Signals) -> None:
    """In the middle of them, while another process renders their templates."""
    folder = scene.before_start()
    cache = {"environment": {"QLORA_TRAIN_CACHE": str(folder / "cache")}}
    options = {"where": "qlora_train.data.encode:Encoder.encode", "call": 1, "numbers": (number,)}
    ended_by(scene.train(folder, setups=[("signal_at", options)], **cache), number)
    assert steps_of(folder / "run") == [] and leftovers(folder / "run") == []
    assert not list((folder / "cache").rglob("*.arrow"))
    assert scene.finish(folder, **cache) == ""


@pytest.mark.slow
def test_killed_while_it_makes_up_for_an_evaluation(scene: Scene) -> None:
    """The evaluation is logged by then, and its checkpoint not yet written: it is made and logged once in the end."""
    folder = scene.before_start()
    where, call, saved = PHASES["an evaluation"]
    for options in (
        {"where": where, "call": call, "numbers": (signal.SIGTERM,)},
        {"where": "qlora_train.train.loop:save_checkpoint", "call": 1, "numbers": (signal.SIGKILL,)},
    ):
        scene.train(folder, *(["--resume"] if steps_of(folder / "run") else []), setups=[("signal_at", options)])
        assert steps_of(folder / "run")[-1] == saved
    assert scene.finish(folder) == ""


@pytest.mark.slow
def test_a_second_sigint_ends_the_run_at_once(scene: Scene) -> None:
    """In the middle of a save: what was saved before is intact, and nothing half-written stays."""
    folder = scene.before_save()
    where = "qlora_train.train.checkpoint:write_checkpoint"
    options = {"where": where, "call": 1, "numbers": (signal.SIGINT, signal.SIGINT)}
    ended = scene.train(folder, "--resume", setups=[("signal_at", options)])
    ended_by(ended, signal.SIGINT)
    assert "what was saved before is intact" in ended.said
    assert not damaged(folder / "run") and max(steps_of(folder / "run")) == 4 and not leftovers(folder / "run")
    assert scene.finish(folder) == ""


@pytest.mark.slow
def test_a_course_that_was_left_leaves_no_adapter_to_export(scene: Scene) -> None:
    """A run that had ended goes on from an earlier step and is stopped: its adapter was of the steps it has left."""
    folder = scene.finished()
    options = {"where": "qlora_train.train.loop:train_step", "call": 1, "numbers": (signal.SIGTERM,)}
    ended = scene.train(folder, "--resume", "--from", "8", setups=[("signal_at", options)])
    ended_by(ended, signal.SIGTERM)
    assert "removed the adapter that came of the steps past 8" in ended.said, ended
    refused = scene.launcher.run("export", folder / "run", folder / "merged")
    assert refused.code == 4 and "no finished adapter yet" in refused.said, refused
    assert scene.finish(folder) == ""


@pytest.mark.slow
def test_sigusr1_saves_and_goes_on(scene: Scene) -> None:
    folder = scene.before_start()
    options = {"where": "qlora_train.train.loop:train_step", "call": 5, "numbers": (signal.SIGUSR1,)}
    ended = scene.train(folder, setups=[("signal_at", options)])
    assert ended.code == 0 and "step-000005, as SIGUSR1 asked" in ended.said, ended
    assert outcome_of(folder / "run") == scene.expected


@pytest.mark.slow
def test_nohup_is_respected(scene: Scene) -> None:
    """A SIGHUP that was ignored when the run began stays ignored."""
    folder = scene.before_start()
    setups = [
        ("ignore_signal", {"number": signal.SIGHUP}),
        ("signal_at", {"where": "qlora_train.train.loop:train_step", "call": 5, "numbers": (signal.SIGHUP,)}),
    ]
    ended = scene.train(folder, setups=setups)
    assert ended.code == 0 and outcome_of(folder / "run") == scene.expected, ended


EXPORT = ("qlora_train.export.run:merge_to", "qlora_train.export.run:verify")


@pytest.mark.slow
@pytest.mark.parametrize("where", EXPORT)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_an_export_that_is_stopped_leaves_shards_to_go_on_from_alone(
    scene: Scene, where: str, number: signal.Signals
) -> None:
    folder = scene.finished()
    setups = [("signal_at", {"where": where, "call": 1, "numbers": (number,)})]
    ended_by(scene.launcher.run("export", folder / "run", folder / "merged", setups=setups), number)
    assert not (folder / "merged").exists()
    assert {Path(name).parts[0] for name in leftovers(folder)} <= {".tmp-merged-shards"}
    assert scene.launcher.run("export", folder / "run", folder / "merged").code == 0
    assert (folder / "merged" / "model.safetensors").is_file() and leftovers(folder) == []


def test_no_home_no_folder_and_nobody_who_reads(scene: Scene) -> None:
    """The terminal's pipe is closed, the working folder removed, HOME unset: the run is the same."""
    folder = scene.before_save()
    setups = [("close_pipe", {"descriptor": 2}), ("leave_removed_folder", {"path": str(folder / "gone")})]
    ended = scene.train(folder, "--resume", setups=setups, environment={"HOME": None, "XDG_CACHE_HOME": None})
    assert ended.code == 0, ended
    assert outcome_of(folder / "run") == scene.expected


@pytest.mark.slow
def test_result_that_nobody_reads(scene: Scene) -> None:
    """Of a run that is done already, so that only its result is printed."""
    ended = scene.train(scene.finished(), "--resume", setups=[("close_pipe", {"descriptor": 1})])
    assert ended.code == 128 + signal.SIGPIPE and "Traceback" not in ended.said, ended


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_bare_environment(scene: Scene) -> None:
    """A real process without HOME, locale and UTF-8, with another hash seed, in a removed folder, under `head -1`."""
    folder = scene.before_start()
    bare = {"PATH": os.environ["PATH"], "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    bare |= {"PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    bare |= {"QLORA_TRAIN_CACHE": str(scene.launcher.folder / "cache")}
    command = shlex.join([sys.executable, "-m", "qlora_train", "train", str(folder / "recipe.yaml")])
    gone = shlex.quote(str(folder / "gone"))
    script = f"mkdir {gone} && cd {gone} && rmdir {gone} && {command} 2>&1 | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], env=bare, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 128 + signal.SIGPIPE), done
    assert done.stdout.count("\n") == 1 and (folder / "run" / "run.json").is_file(), done
    assert outcome_of(folder / "run") == scene.expected
