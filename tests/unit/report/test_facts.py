"""What is read of a run folder, whole, unfinished or damaged: what is missing is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from qlora_train.artifacts.layout import RunDir
from qlora_train.errors import RecipeError
from qlora_train.report.facts import read_runs
from tests.runfolders import NUM_STEPS, export_line, rewrite, write_adapter, write_run


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    return RunDir(write_run(tmp_path / "run"))


def test_a_whole_run_leaves_nothing_to_note(run_dir: RunDir) -> None:
    (run,) = read_runs([run_dir.root])
    assert run.notes == ()
    assert (run.name, run.last_step, run.num_planned_steps) == ("run", NUM_STEPS, NUM_STEPS)
    assert [line.step for line in run.evals] == [20, NUM_STEPS]
    assert run.summary and (run.summary.train_s, run.summary.num_tokens) == (10.0, 3840)
    assert run.export and run.export.kl_frac == pytest.approx(1e-4)


def test_settings_keep_their_yaml_and_their_origin(run_dir: RunDir) -> None:
    """A `#` inside a value is no comment."""
    (run,) = read_runs([run_dir.root])
    found = {setting.key: (setting.value, setting.origin, setting.is_default) for setting in run.settings}
    assert found["adapter.alpha"] == ("8.0", "command line", False)
    assert found["adapter.method"] == ("lora", "default", True)
    assert found["data.train"] == ("[{path: 'rows #1.jsonl', weight: 1.0}]", "recipes/tiny.yaml:9", False)


@pytest.mark.parametrize("name", ["environment", "base", "data", "evaluation", "memory", "summary"])
@pytest.mark.parametrize("content", [None, b"", b"[]", b"{}", b'{"versions": 5, "tensors": [], "splits": 1}', b"\xff"])
def test_an_absent_or_damaged_file_is_noted_by_name(run_dir: RunDir, name: str, content: bytes | None) -> None:
    path: Path = getattr(run_dir, name)
    path.unlink() if content is None else path.write_bytes(content)
    (run,) = read_runs([run_dir.root])
    if name == "evaluation" and content is not None and content.startswith(b"{"):
        assert run.evaluation and run.evaluation.base is None, "an eval.json without sides is what a run begins with"
    else:
        assert getattr(run, name) is None
        assert [note for note in run.notes if note.startswith(path.name)], run.notes


def test_torn_and_unknown_lines_of_metrics_are_left_out(run_dir: RunDir) -> None:
    with run_dir.metrics.open("a") as file:
        file.write('{"kind": "resume", "step": 3}\n{"kind": "train", "step": 41, "lo')
    (run,) = read_runs([run_dir.root])
    assert run.last_step == NUM_STEPS
    assert any(note.startswith("metrics.jsonl: 1 line is damaged") for note in run.notes), run.notes


def test_a_run_that_did_not_end_has_the_adapter_of_its_newest_sound_checkpoint(run_dir: RunDir) -> None:
    run_dir.summary.unlink()
    shutil.rmtree(run_dir.adapter)
    write_adapter(run_dir.checkpoints / "step-000010", step=10, seed=1)
    write_adapter(run_dir.checkpoints / "step-000020", step=20, seed=2)
    (run_dir.checkpoints / "step-000020" / "adapter_config.json").write_text("{}")
    (run,) = read_runs([run_dir.root])
    assert run.adapter and (run.adapter.step, run.adapter.is_published) == (10, False)
    assert run.export is None, "what was exported was another adapter"
    assert any("step-000020 is damaged" in note for note in run.notes)
    assert any(note.startswith("run.json is absent") for note in run.notes)


def test_the_newest_export_of_this_very_adapter_counts(run_dir: RunDir) -> None:
    (before,) = read_runs([run_dir.root])
    assert before.adapter
    lines = [export_line(before.adapter.sha256, accepted=False), export_line("0" * 64)]
    with run_dir.exports.open("a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))
    (run,) = read_runs([run_dir.root])
    assert len(run.exports) == 3 and run.export and not run.export.accepted


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda folder: None, "does not exist"),
        (lambda folder: folder.write_text(""), "is a file"),
        (lambda folder: folder.mkdir(), "holds no recipe.resolved.yaml"),
        (lambda folder: (folder.mkdir(), (folder / "data.json").write_text("{}")), "no training yet"),
    ],
)
def test_what_is_no_run_folder_is_refused(tmp_path: Path, make: object, what: str) -> None:
    assert callable(make)
    make(tmp_path / "other")
    with pytest.raises(RecipeError, match=what):
        read_runs([tmp_path / "other"])


def test_runs_are_told_apart_by_their_parents(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / parent / "run") for parent in ("first", "second")]
    assert [run.name for run in read_runs(folders)] == ["first/run", "second/run"]
    with pytest.raises(RecipeError, match="named twice"):
        read_runs([folders[0], folders[0].parent / ".." / "first" / "run"])


def test_names_carry_no_escapes(tmp_path: Path) -> None:
    (run,) = read_runs([write_run(tmp_path / "a\x1b[2Jb")])
    assert run.name == "a\\x1b[2Jb"


def test_a_number_that_is_not_finite_is_damage(run_dir: RunDir) -> None:
    rewrite(run_dir.summary, tokens_per_s=float("nan"))
    (run,) = read_runs([run_dir.root])
    assert run.summary is None and any("run.json is damaged" in note for note in run.notes)
