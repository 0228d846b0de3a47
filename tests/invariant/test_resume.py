"""A resumed run is the undisturbed run, to the bit: adapter, optimiser, every logged loss."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest

from qlora_train.errors import OutOfMemory
from tests.commandline import run_cli
from tests.invariant.runs import contents, copy_until, losses, state_digest


@pytest.mark.parametrize("step", [2, 4])
def test_resume_equals_straight(straight: Path, tmp_path: Path, step: int) -> None:
    folder = copy_until(straight, tmp_path / "moved", step)
    outcome = run_cli("train", folder / "recipe.yaml", "--resume")
    assert outcome.code == 0, outcome.err
    assert f"resumed from step-{step:06d}" in outcome.err
    assert state_digest(folder / "run") == state_digest(straight / "run")
    assert losses(folder / "run") == losses(straight / "run")


def test_repeat_equals_straight_and_another_seed_does_not(straight: Path, tmp_path: Path, tiny_llama_dir: Path) -> None:
    for name, seed in (("same", 0), ("other", 1)):
        recipe = straight / "recipe.yaml"
        run = tmp_path / name
        outcome = run_cli("train", recipe, f"run.dir={run}", f"run.seed={seed}", "train.keep=9")
        assert outcome.code == 0, outcome.err
        assert (state_digest(run) == state_digest(straight / "run")) == (seed == 0)


def test_losing_the_moments_is_noticed(straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the resume test: an optimiser that starts anew gives another adapter."""
    from qlora_train.train import checkpoint

    monkeypatch.setattr(checkpoint, "restore_optimizer", lambda *_: None)
    folder = copy_until(straight, tmp_path / "moved", 2)
    assert run_cli("train", folder / "recipe.yaml", "--resume").code == 0
    assert state_digest(folder / "run") != state_digest(straight / "run")


def test_a_finished_run_is_left_alone(straight: Path) -> None:
    before = contents(straight / "run")
    outcome = run_cli("train", straight / "recipe.yaml", "--resume")
    assert outcome.code == 0 and "already complete" in outcome.err
    assert contents(straight / "run") == before


def test_a_finished_run_with_a_damaged_adapter_is_made_again(straight: Path, tmp_path: Path) -> None:
    shutil.copytree(straight, tmp_path / "run")
    recipe, adapter = tmp_path / "run" / "recipe.yaml", tmp_path / "run" / "run" / "adapter"
    config = adapter / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": ', '"lora_alpha": 1'))
    outcome = run_cli("train", recipe, "--resume")
    assert outcome.code == 5 and "adapter_config.json: " in outcome.err, outcome.err
    assert "--resume --from 5" in outcome.err and "already complete" not in outcome.err
    assert run_cli("train", recipe, "--resume", "--from", "5").code == 0
    assert config.read_bytes() == (straight / "run" / "adapter" / config.name).read_bytes()


def test_a_used_folder_says_what_it_holds(straight: Path, tmp_path: Path) -> None:
    before = contents(straight / "run")
    outcome = run_cli("train", straight / "recipe.yaml")
    assert outcome.code == 2 and "already holds a run: ended 20" in outcome.err, outcome.err
    assert "after 5 steps; checkpoints of steps 2, 4, 5" in outcome.err and "--resume --from STEP" in outcome.err
    assert contents(straight / "run") == before
    killed = copy_until(straight, tmp_path / "killed", 2)
    outcome = run_cli("train", killed / "recipe.yaml")
    assert outcome.code == 2 and "not ended, 5 steps logged, last written 20" in outcome.err
    assert "checkpoints of steps 2." in outcome.err


@pytest.mark.parametrize(
    ("where", "change"), [("run.rehearse", "eval.every=1"), ("scores.score_side", "eval.generate_rows=2")]
)
def test_a_resume_that_does_not_fit_leaves_the_run_as_it_was(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, change: str
) -> None:
    """In the rehearsal, or when the base is measured anew: newer checkpoints go when the run is sure to go on."""

    def too_large(*_: object, **__: object) -> None:
        raise OutOfMemory("too large", fix="take less")

    monkeypatch.setattr(f"qlora_train.train.{where}", too_large)
    folder = tmp_path / "run"
    shutil.copytree(straight, folder)
    before = contents(folder / "run")
    outcome = run_cli("train", folder / "recipe.yaml", "--resume", "--from", "2", change)
    assert outcome.code == 9, outcome.err
    after = contents(folder / "run")
    assert after.pop(folder / "run" / "errors.jsonl")
    assert after == before


def test_other_data_is_refused(straight: Path, tmp_path: Path) -> None:
    folder = copy_until(straight, tmp_path / "moved", 2)
    rows = (folder / "train.jsonl").read_text().splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join(reversed(rows)))
    outcome = run_cli("train", folder / "recipe.yaml", "--resume")
    assert outcome.code == 5 and "the training data" in outcome.err


@pytest.mark.parametrize("damage", ["truncate", "flip", "extra", "manifest"])
def test_a_damaged_checkpoint_is_passed_over(straight: Path, tmp_path: Path, damage: str) -> None:
    folder = copy_until(straight, tmp_path / "moved", 4)
    newest = folder / "run" / "ckpt" / "step-000004"
    weights = newest / "optimizer.safetensors"
    content = bytearray(weights.read_bytes())
    if damage == "truncate":
        weights.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        content[-5] ^= 1
        weights.write_bytes(content)
    elif damage == "extra":
        (newest / "notes.txt").write_bytes(b"x")
    else:
        (newest / "MANIFEST.json").unlink()
    refused = run_cli("train", folder / "recipe.yaml", "--resume", "--from", "4")
    assert refused.code == 5 and "step-000004" in refused.err
    outcome = run_cli("train", folder / "recipe.yaml", "--resume")
    assert outcome.code == 0, outcome.err
    assert "step-000004 is damaged" in outcome.err and "resumed from step-000002" in outcome.err
    assert state_digest(folder / "run") == state_digest(straight / "run")


def test_sigterm_saves_and_resume_goes_on(straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora_train.train import loop

    folder = tmp_path / "stopped"
    shutil.copytree(straight, folder, ignore=shutil.ignore_patterns("run"))
    original, calls = loop.train_step, []

    def step_and_signal(*args: object, **kwargs: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        return original(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "train_step", step_and_signal)
    outcome = run_cli("train", folder / "recipe.yaml")
    assert outcome.code == 143 and "saved" in outcome.err, outcome.err
    assert (folder / "run" / "ckpt" / "step-000003").is_dir()
    assert run_cli("train", folder / "recipe.yaml", "--resume").code == 0
    assert state_digest(folder / "run") == state_digest(straight / "run")
    assert losses(folder / "run") == losses(straight / "run")


def test_a_fork_from_an_older_step_keeps_what_it_saves(straight: Path, tmp_path: Path) -> None:
    """Checkpoints past the step that is resumed belong to another course: they go, and the new ones stay."""
    folder = tmp_path / "fork"
    shutil.copytree(straight, folder)
    outcome = run_cli("train", folder / "recipe.yaml", "--resume", "--from", "2", "train.keep=1", "eval.every=0")
    assert outcome.code == 0, outcome.err
    steps = sorted(path.name for path in (folder / "run" / "ckpt").iterdir())
    assert steps[-1] == "step-000005" and "step-000002" not in steps
    assert state_digest(folder / "run") == state_digest(straight / "run")
    assert losses(folder / "run") == losses(straight / "run")
