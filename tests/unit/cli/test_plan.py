"""The verb `plan`: verdict, exit code, JSON and table, from a bare config and with no data there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import Phi3Config

from qlora_train.errors import OutOfMemory
from tests.commandline import Outcome, run_cli
from tests.unit.memory.planned import FIXTURES, tiny_config


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe whose rows and model are not there."""
    path = tmp_path / "recipe.yaml"
    sections: dict[str, Any] = {
        "model": {"path": "nobody/nothing"},
        "data": {"train": ["absent.jsonl"], "seq_len": 128},
        "run": {"dir": "run"},
    }
    path.write_text(yaml.safe_dump(sections), encoding="utf-8")
    (tmp_path / "config.json").write_text(tiny_config("llama", 3).to_json_string(use_diff=False), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """No folded columns."""
    monkeypatch.setenv("COLUMNS", "180")


def plan(*arguments: str) -> Outcome:
    return run_cli("plan", *arguments)


def test_it_fits(recipe: Path) -> None:
    result = plan(str(recipe), "--model", str(recipe.parent / "config.json"), "--gpu", "rtx4090")
    assert result.code == 0, result.err
    for words in ("RTX 4090 (23.52 GiB)", "quantised base", "CUDA context", "It fits", "cross-check", "export"):
        assert words in " ".join(result.out.split())  # a line with a long path is folded


def test_it_does_not_fit(recipe: Path) -> None:
    config = FIXTURES / "llama-3.3-70b.json"
    result = plan(str(recipe), "train.checkpointing=none", "--model", str(config), "--vram", "8GiB")
    assert result.code == OutOfMemory.exit_code == 9
    assert "It does not fit: training needs" in result.out and "even this does not fit" in result.out


def test_as_json(recipe: Path) -> None:
    result = plan(str(recipe), "--model", str(recipe.parent / "config.json"), "--vram", "400MiB", "--json")
    assert result.code == 9
    found = json.loads(result.out)
    assert found["fits"] is False and found["limit_bytes"] == 400 * 2**20
    assert found["peak_bytes"]["training"] == sum(t["num_bytes"] for t in found["terms"] if t["stage"] == "training")
    assert found["changes"][0]["overrides"]


@pytest.mark.slow
def test_without_a_card_it_is_planned_for_this_machine(recipe: Path) -> None:
    result = plan(str(recipe), "model.device=cpu", "--model", str(recipe.parent / "config.json"))
    assert result.code == 0 and "the CPUs of this machine" in result.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--gpu", "RTX 4095"), "no card 'RTX 4095' is known"),
        (("--gpu", "t4", "--vram", "8GiB"), "give one of them"),
        (("--vram", "many"), "no amount of memory"),
        (("--gpu", "t4", "model.device=cpu"), "model.device is cpu"),
    ],
)
def test_mistakes(recipe: Path, arguments: tuple[str, ...], words: str) -> None:
    result = plan(str(recipe), "--model", str(recipe.parent / "config.json"), *arguments)
    assert result.code == 2
    assert words in result.err


def test_the_table(recipe: Path) -> None:
    config = str(recipe.parent / "config.json")
    result = plan(str(recipe), "--table", "--model", config, "--gpu", "t4", "--gpu", "rtx 4090", "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert [card["name"] for card in found["cards"]] == ["T4", "RTX 4090"]
    assert [row["seq_len"] for row in found["rows"]] == [512] and found["rows"][0]["packs"] == [64, 64]


def test_what_a_run_refuses_of_the_model_is_not_planned(recipe: Path) -> None:
    config = recipe.parent / "config.json"
    sizes = {"num_key_value_heads": 4, "original_max_position_embeddings": 64, "pad_token_id": 0}
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 16, "long_factor": [4.0] * 16, "rope_theta": 1e4}
    Phi3Config(
        **{**json.loads(config.read_text()), **sizes, "model_type": "phi3", "rope_parameters": rope}
    ).save_pretrained(recipe.parent)
    result = plan(str(recipe), "--model", str(config), "--vram", "8GiB")
    assert result.code == 4 and "more than 64 tokens (longrope)" in result.err, result.err
