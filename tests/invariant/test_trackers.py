"""Trackers get every step once, also over a resume, and cannot end a run. All offline, read back from disk."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker, WandBTracker

from qlora_train.artifacts.files import read_json
from qlora_train.artifacts.layout import RunDir
from qlora_train.recipe import validate
from qlora_train.recipe.advice import KEYS
from qlora_train.recipe.load import load_recipe
from qlora_train.recipe.schema import Recipe
from qlora_train.train.metrics import Metrics, Silent
from qlora_train.train.trackers import flat_config, tracking
from tests.commandline import run_cli, write_recipe


class Noted(Silent):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.warnings: list[str] = []

    def message(self, text: str) -> None:
        """Keep it."""
        self.messages.append(text)

    def warning(self, text: str) -> None:
        """Keep it."""
        self.warnings.append(text)


def recipe_with(tmp_path: Path, model: Path, *trackers: str, **run: Any) -> Recipe:
    keys = {f"run__{key}": value for key, value in run.items()}
    return load_recipe(write_recipe(tmp_path, model, run__trackers=list(trackers), **keys)).recipe


def train(recipe: Recipe, steps: range, offset: float = 0.0) -> Noted:
    """Log these steps as the loop does, from 1 on or resumed; the loss is the step plus an offset."""
    run_dir, reporter, resumed = RunDir(recipe.run.dir), Noted(), steps.start > 1
    run_dir.root.mkdir(exist_ok=True)
    Accelerator(cpu=True)  # trackers ask its state which process this is
    with tracking(recipe, run_dir, reporter, resumed=resumed, step=steps.start - 1) as trackers:
        if not resumed:
            trackers.log("eval", 0, {"eval_loss": 9.0})
        metrics = Metrics(run_dir.metrics, after_step=steps.start - 1, follower=trackers)
        for step in steps:
            metrics.write(
                "train",
                step,
                loss=step + offset,
                grad_norm=0.5,
                learning_rate=1e-3,
                num_tokens=100,
                num_supervised_tokens=50,
                step_s=0.5,
                peak_memory_gib=1.25,
            )
            if step % 2 == 0:
                metrics.write("eval", step, eval_loss=2.0 + offset, num_eval_tokens=7)
    return reporter


def interrupted(recipe: Recipe) -> tuple[Noted, Noted]:
    """Four steps; then the process dies, and the run goes on from the checkpoint of step 2."""
    return train(recipe, range(1, 5)), train(recipe, range(3, 7), offset=0.25)


def test_tensorboard_replaces_the_steps_after_the_checkpoint(tmp_path: Path, tiny_llama_dir: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = recipe_with(tmp_path, tiny_llama_dir, "tensorboard")
    first, _ = interrupted(recipe)
    folder = recipe.run.dir / "trackers" / "tensorboard"
    assert first.messages == [f"tracker tensorboard: see it with: tensorboard --logdir {folder}"]
    events = EventAccumulator(str(folder)).Reload()
    found = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert found["train/loss"] == [(1, 1.0), (2, 2.0), (3, 3.25), (4, 4.25), (5, 5.25), (6, 6.25)]
    assert found["eval/loss"] == [(0, 9.0), (2, 2.0), (4, 2.25), (6, 2.25)]
    assert {tag: values[0][1] for tag, values in found.items() if tag.startswith("train/")} == pytest.approx(
        {
            "train/loss": 1.0,
            "train/grad_norm": 0.5,
            "train/learning_rate": 1e-3,
            "train/tokens_per_s": 200.0,
            "train/supervised_tokens_per_s": 100.0,
            "train/peak_memory_gib": 1.25,
        }
    )
    (config,) = folder.glob("*/hparams.yml")
    assert yaml.safe_load(config.read_text())["train.learning_rate"] == 0.01
    train(recipe, range(1, 2))
    again = EventAccumulator(str(folder)).Reload()
    assert [event.step for event in again.Scalars("train/loss")] == [1], "a run that starts anew keeps nothing old"


def test_trackio_goes_on_in_the_same_run(
    tmp_path: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    from trackio import sqlite_storage

    monkeypatch.setattr(sqlite_storage, "TRACKIO_DIR", tmp_path / "trackio")
    recipe = recipe_with(tmp_path, tiny_llama_dir, "trackio", tracker_project="shells")
    first, second = interrupted(recipe)
    name = f"run-{read_json(recipe.run.dir / 'trackers' / 'run.json')['id']}"
    told = [f"tracker trackio: run {name}, see it with: trackio show --project shells"]
    assert first.messages == second.messages == told
    assert sqlite_storage.SQLiteStorage.get_runs("shells") == [name]
    logs = sqlite_storage.SQLiteStorage.get_logs("shells", name)
    losses = [(log["step"], log["train/loss"]) for log in logs if "train/loss" in log]
    assert losses == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 5.25), (6, 6.25)], "what was sent stays"
    assert [log["step"] for log in logs if "eval/loss" in log] == [0, 2, 4, 6]
    assert sqlite_storage.SQLiteStorage.get_run_config("shells", name)["adapter.r"] == 4
    assert capfd.readouterr().out == "", "stdout is for results"


def wandb_records(folder: Path) -> Iterator[Any]:
    """The records of an offline run's file: a log in blocks of 32 KiB, each part with a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("run-*.wandb")
    content, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if 2**15 - at % 2**15 < 7:
            at += 2**15 - at % 2**15
            continue
        length, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            parsed = wandb_internal_pb2.Record()
            parsed.ParseFromString(record)
            record = b""
            yield parsed


def finished_records(folder: Path) -> list[Any]:
    """The records once wandb's own process has written the last of them, a moment after the run was finished."""
    for _ in range(600):
        records = list(wandb_records(folder))
        if any(record.HasField("exit") for record in records):
            return records
        time.sleep(0.1)
    raise AssertionError("wandb never wrote that the run is finished")


def test_wandb_keeps_an_offline_run_in_the_run_folder(
    tmp_path: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_X_DISABLE_STATS", "true")
    monkeypatch.setenv("WANDB_X_SERVICE_WAIT", "300")  # seconds, on a busy machine
    recipe = recipe_with(tmp_path, tiny_llama_dir, "wandb", tracker_project="shells")
    first, second = interrupted(recipe)
    parts = sorted((recipe.run.dir / "trackers" / "wandb").glob("offline-run-*"))
    assert first.warnings == second.warnings == []
    told = [reporter.messages[0].rpartition(" ")[2] for reporter in (first, second)]
    assert "kept offline, send it with: wandb sync" in first.messages[0], first.warnings
    assert [Path(path).name for path in told] == [path.name for path in parts] and len(set(told)) == 2
    records = [record for part in parts for record in finished_records(part)]
    runs = [record.run for record in records if record.HasField("run")]
    assert {(run.run_id, run.project, run.display_name) for run in runs} == {
        (read_json(recipe.run.dir / "trackers" / "run.json")["id"], "shells", "run")
    }
    config = {item.key: item.value_json for run in runs for item in run.config.update}
    config |= {item.key: item.value_json for r in records if r.HasField("config") for item in r.config.update}
    assert json.loads(config["train.learning_rate"]) == 0.01
    history = [
        {(item.nested_key[0] if item.nested_key else item.key): json.loads(item.value_json) for item in r.history.item}
        for r in records
        if r.HasField("history")
    ]
    losses = [(row["_step"], row["train/loss"]) for row in history if "train/loss" in row]
    assert losses == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 5.25), (6, 6.25)]
    assert [row["_step"] for row in history if "eval/loss" in row] == [0, 2, 4, 6]
    assert capfd.readouterr().out == "", "stdout is for results"


def test_a_tracker_that_fails_is_left_alone_and_the_others_go_on(
    tmp_path: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_start(self: object) -> None:
        raise RuntimeError("api_key not configured (no-tty)")

    monkeypatch.setattr(WandBTracker, "start", no_start)
    recipe = recipe_with(tmp_path, tiny_llama_dir, "wandb", "tensorboard")
    reporter = train(recipe, range(1, 3))
    assert len(reporter.warnings) == 1 and "tracker wandb did not start" in reporter.warnings[0]
    assert "api_key not configured" in reporter.warnings[0] and "tensorboard" in reporter.messages[0]
    original = TensorBoardTracker.log

    def full_disk(self: TensorBoardTracker, values: dict[str, Any], step: int) -> None:
        if step == 4:
            raise OSError(28, "No space left on device")
        original(self, values, step)

    monkeypatch.setattr(TensorBoardTracker, "log", full_disk)
    reporter = train(recipe, range(3, 7))
    assert [warning.partition(",")[0] for warning in reporter.warnings] == [
        "tracker wandb did not start",
        "tracker tensorboard failed at step 4",
    ]
    lines = [json.loads(line) for line in (recipe.run.dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2, 3, 4, 5, 6]


def test_a_run_without_trackers_writes_nothing_of_theirs(tmp_path: Path, tiny_llama_dir: Path) -> None:
    recipe = recipe_with(tmp_path, tiny_llama_dir)
    assert train(recipe, range(1, 3)).messages == []
    assert [path.name for path in recipe.run.dir.iterdir()] == ["metrics.jsonl"]


def test_the_whole_recipe_is_told_in_plain_values(tmp_path: Path, tiny_llama_dir: Path) -> None:
    config = flat_config(recipe_with(tmp_path, tiny_llama_dir, "tensorboard"))
    assert config["run.trackers"] == '["tensorboard"]' and config["train.max_steps"] == "null"
    assert config["quant.double_quant"] is True and config["adapter.r"] == 4
    assert len(config) == sum(len(keys) for keys in KEYS.values())


def test_a_tracker_that_is_not_installed_is_refused_at_once(
    tmp_path: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> str:
        raise validate.PackageNotFoundError(name)

    monkeypatch.setattr(validate, "version", missing)
    recipe = write_recipe(tmp_path, tiny_llama_dir, run__trackers=["wandb"], model__device="cuda")
    outcome = run_cli("train", recipe)
    assert outcome.code == 2, "before the device is looked for"
    assert "run.trackers: wandb is not installed" in outcome.err and "pip install wandb" in outcome.err


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        ({"run__trackers": ["tensorboard", "tensorboard"]}, "run.trackers: tensorboard is given twice"),
        ({"run__trackers": ["tensorboard"], "run__tracker_project": "x"}, "run.tracker_project has no effect"),
        ({"run__tracker_project": "x"}, "run.tracker_project has no effect"),
        ({"run__trackers": ["tensorbord"]}, "did you mean tensorboard?"),
        ({"run__report_to": "wandb"}, "it is called trackers here"),
    ],
)
def test_tracker_keys_that_make_no_sense(tmp_path: Path, tiny_llama_dir: Path, keys: dict[str, Any], what: str) -> None:
    outcome = run_cli("check", write_recipe(tmp_path, tiny_llama_dir, **keys))
    assert outcome.code == 2 and what in outcome.err


def test_a_training_tells_its_tracker(tmp_path: Path, tiny_llama_dir: Path) -> None:
    """Through the command line: the base at step 0, every step, and the held-out loss at the end; stdout stays JSON.
    Resumed from step 1, the run tells the same tracker run, and no step twice."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    changes = {"train__max_steps": 2, "train__save_every": 1, "eval__generate_rows": 0}
    recipe = write_recipe(tmp_path, tiny_llama_dir, run__trackers="tensorboard", **changes)
    for more in ((), ("--resume", "--from", "1")):
        outcome = run_cli("train", recipe, "--json", *more)
        assert outcome.code == 0, outcome.err
        result = json.loads(outcome.out)
        events = EventAccumulator(str(tmp_path / "run" / "trackers" / "tensorboard")).Reload()
        assert [event.step for event in events.Scalars("train/loss")] == [1, 2]
        assert [(event.step, event.value) for event in events.Scalars("eval/loss")] == [
            (0, pytest.approx(result["base"]["loss"], rel=1e-6)),
            (2, pytest.approx(result["adapter"]["loss"], rel=1e-6)),
        ]
        assert events.Scalars("train/tokens_per_s")[0].value > 0
    assert len(list((tmp_path / "run" / "trackers" / "tensorboard").glob("events.*"))) == 2
