"""A resumed run is the undisturbed run, to the bit: adapter, optimiser, every logged loss."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from qlora_train.quant.fingerprint import hash_tensors
from tests.commandline import run_cli, write_recipe


def state_digest(run: Path, step: int) -> dict[str, str]:
    """SHA-256 of every tensor of a checkpoint, by file."""
    folder = run / "ckpt" / f"step-{step:06d}"
    digests = {}
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        tensors = load_file(folder / name)
        digests[name] = hash_tensors(*(tensors[key] for key in sorted(tensors)))
    return digests


def losses(run: Path) -> list[str]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [f"{line['step']} {line['loss']!r} {line['grad_norm']!r}" for line in lines if line["kind"] == "train"]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    recipe = write_recipe(folder, tiny_llama_dir, train__checkpointing="full", train__keep=9, eval__generate_rows=0)
    outcome = run_cli("train", recipe)
    assert outcome.code == 0, outcome.err
    return folder


def _copy_until(straight: Path, tmp_path: Path, step: int) -> Path:
    """The run folder as it was when the process was killed after `step`'s checkpoint, in another place."""
    shutil.copytree(straight, tmp_path / "moved")
    run = tmp_path / "moved" / "run"
    for path in (run / "ckpt").glob("step-*"):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    shutil.rmtree(run / "adapter")
    (run / "run.json").unlink()
    return tmp_path / "moved"


@pytest.mark.parametrize("step", [2, 4])
def test_resume_equals_straight(straight: Path, tmp_path: Path, step: int) -> None:
    folder = _copy_until(straight, tmp_path, step)
    outcome = run_cli("train", folder / "recipe.yaml", "--resume")
    assert outcome.code == 0, outcome.err
    assert f"resumed from step-{step:06d}" in outcome.err
    assert state_digest(folder / "run", 5) == state_digest(straight / "run", 5)
    assert losses(folder / "run") == losses(straight / "run")


def test_repeat_equals_straight_and_another_seed_does_not(straight: Path, tmp_path: Path, tiny_llama_dir: Path) -> None:
    for name, seed in (("same", 0), ("other", 1)):
        recipe = straight / "recipe.yaml"
        run = tmp_path / name
        outcome = run_cli("train", recipe, f"run.dir={run}", f"run.seed={seed}", "train.keep=9")
        assert outcome.code == 0, outcome.err
        assert (state_digest(run, 5) == state_digest(straight / "run", 5)) == (seed == 0)


def test_losing_the_moments_is_noticed(straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the resume test: an optimiser that starts anew gives another adapter."""
    from qlora_train.train import checkpoint

    monkeypatch.setattr(checkpoint, "restore_optimizer", lambda *_: None)
    folder = _copy_until(straight, tmp_path, 2)
    assert run_cli("train", folder / "recipe.yaml", "--resume").code == 0
    assert state_digest(folder / "run", 5) != state_digest(straight / "run", 5)


def test_a_finished_run_is_left_alone(straight: Path) -> None:
    before = {p: p.read_bytes() for p in (straight / "run").rglob("*") if p.is_file()}
    outcome = run_cli("train", straight / "recipe.yaml", "--resume")
    assert outcome.code == 0 and "already complete" in outcome.err
    assert {p: p.read_bytes() for p in (straight / "run").rglob("*") if p.is_file()} == before
    outcome = run_cli("train", straight / "recipe.yaml")
    assert outcome.code == 2 and "already holds a run" in outcome.err and "--resume" in outcome.err


def test_changed_keys(straight: Path, tmp_path: Path) -> None:
    folder = _copy_until(straight, tmp_path, 2)
    for override in ("train.learning_rate=0.02", "data.seq_len=64", "adapter.r=8", "run.seed=3", "train.epochs=2"):
        outcome = run_cli("train", folder / "recipe.yaml", override, "--resume")
        key = override.partition("=")[0]
        assert outcome.code == 5 and key in outcome.err and "at the checkpoint" in outcome.err, (override, outcome.err)
    outcome = run_cli("train", folder / "recipe.yaml", "--resume", "train.save_every=1", "eval.every=1")
    assert outcome.code == 0, outcome.err
    assert state_digest(folder / "run", 5) == state_digest(straight / "run", 5), "neutral keys disturb nothing"


def test_other_data_is_refused(straight: Path, tmp_path: Path) -> None:
    folder = _copy_until(straight, tmp_path, 2)
    rows = (folder / "train.jsonl").read_text().splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join(reversed(rows)))
    outcome = run_cli("train", folder / "recipe.yaml", "--resume")
    assert outcome.code == 5 and "the training data" in outcome.err


@pytest.mark.parametrize("damage", ["truncate", "flip", "extra", "manifest"])
def test_a_damaged_checkpoint_is_passed_over(straight: Path, tmp_path: Path, damage: str) -> None:
    folder = _copy_until(straight, tmp_path, 4)
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
    assert state_digest(folder / "run", 5) == state_digest(straight / "run", 5)


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
    assert state_digest(folder / "run", 5) == state_digest(straight / "run", 5)
    assert losses(folder / "run") == losses(straight / "run")


def test_a_fork_from_an_older_step_keeps_what_it_saves(straight: Path, tmp_path: Path) -> None:
    """Checkpoints past the step that is resumed belong to another course: they go, and the new ones stay."""
    folder = tmp_path / "fork"
    shutil.copytree(straight, folder)
    outcome = run_cli("train", folder / "recipe.yaml", "--resume", "--from", "2", "train.keep=1", "eval.every=0")
    assert outcome.code == 0, outcome.err
    steps = sorted(path.name for path in (folder / "run" / "ckpt").iterdir())
    assert steps[-1] == "step-000005" and "step-000002" not in steps
    assert state_digest(folder / "run", 5) == state_digest(straight / "run", 5)
    assert losses(folder / "run") == losses(straight / "run")
