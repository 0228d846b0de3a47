"""The real model and the real data through the command line: a short way for every `make test`, and a long one."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.commandline import run_cli

RECIPES = Path(__file__).resolve().parent.parent.parent / "recipes"
pytestmark = pytest.mark.real


@pytest.mark.parametrize("name", ["quickstart", "spelling", "jargon"])
def test_the_recipes_data_is_sound(name: str) -> None:
    outcome = run_cli("check", RECIPES / f"{name}.yaml", "--json")
    assert outcome.code == 0, outcome.err
    train, held_out = json.loads(outcome.out)["audits"]
    trained = {"quickstart": (1199, 222), "spelling": (3200, 1000), "jargon": (400, 50)}[name]
    assert (train["num_trained"], held_out["num_trained"]) == trained
    assert (train["num_pieces"] > train["num_trained"]) == (name == "jargon") and train["lost_token_frac"] < 0.01
    assert train["num_supervised_tokens"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["quickstart", "spelling", "jargon"])
def test_train_resume_export_chat(name: str, tmp_path: Path) -> None:
    """A few steps of each recipe, stopped and resumed, exported with its verification, and spoken to."""
    run = tmp_path / "run"
    seq_len = {"quickstart": 256, "spelling": 48, "jargon": 512}[name]
    short = [f"data.seq_len={seq_len}", "data.max_train_rows=24", "data.max_eval_rows=16", "train.max_steps=3"]
    short.append("train.grad_accum_steps=2")
    evaluation = ["eval.generate_rows=4", "eval.max_new_tokens=8", "eval.batch_size=8", "train.save_every=1"]
    arguments = [RECIPES / f"{name}.yaml", *short, *evaluation, f"run.dir={run}"]
    outcome = run_cli("train", *arguments, "--json")
    assert outcome.code == 0, outcome.err
    result = json.loads(outcome.out)
    assert result["num_steps"] == 3 and math.isfinite(result["adapter"]["loss"])
    again = run_cli("train", *arguments, "--resume", "--from", "2", "--json")
    assert again.code == 0, again.err
    assert json.loads(again.out)["adapter"]["loss"] == result["adapter"]["loss"], "resumed to the same bits"
    exported = run_cli("export", run, tmp_path / "merged", "export.verify_rows=8", "--json")
    assert exported.code == 0, exported.err
    verdict = json.loads(exported.out)["verdict"]
    assert verdict["merged"]["mean_kl"] <= 5e-4 and verdict["merged"]["top1_agreement"] >= 0.95
    for folder in (run, tmp_path / "merged"):
        spoken = run_cli("chat", folder, "--once", "Misspelled: recieve\nCorrect:", "--max-new-tokens", "6")
        assert spoken.code == 0, spoken.err
