"""Every method through the command line: trained by a recipe, resumed to the bit, exported and verified, or refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_train.recipe.methods import METHODS
from tests.commandline import run_cli, write_recipe
from tests.methods.cases import WAYS, section_of
from tests.tiny import build_tiny_llama

NUM_STEPS = 6
KEYS: dict[str, dict[str, Any]] = {
    "adalora": {"schedule_every": 1, "schedule_start_frac": 0.17, "schedule_end_frac": 0.17},
    "aflora": {"schedule_every": 1, "schedule_start_frac": 0.17, "schedule_end_frac": 0.17},
}
# What the log must show of a rule or a schedule, beside the loss.
LOGGED = {
    "adalora": {"num_triplets", "extra_loss"},
    "aflora": {"num_frozen_tensors", "trainable_frac"},
    "mole": {"gate_0", "gate_1", "extra_loss"},
    "loraplus": {"learning_rates"},
    "lora_pro": {"rule_norm"},
}


def _ranks_fall(lines: list[dict[str, Any]]) -> None:
    counts = [line["num_triplets"] for line in lines]
    assert counts == sorted(counts, reverse=True) and counts[-1] < counts[0]


def _all_is_frozen(lines: list[dict[str, Any]]) -> None:
    shares = [line["trainable_frac"] for line in lines]
    assert shares == sorted(shares, reverse=True) and shares[0] > 0 == shares[-1]


def _gates_move(lines: list[dict[str, Any]]) -> None:
    assert all(abs(line["gate_0"] + line["gate_1"] - 1) < 1e-5 for line in lines)
    assert lines[0]["gate_0"] == 0.5 != lines[-1]["gate_0"]


def _two_rates(lines: list[dict[str, Any]]) -> None:
    assert all(line["learning_rates"]["B"] > line["learning_rates"]["A"] > 0 for line in lines[:-1])


def _gradients_are_rewritten(lines: list[dict[str, Any]]) -> None:
    """The norm that is clipped is that of the gradients; the rule's is of what takes their place."""
    assert all(line["rule_norm"] > 0 and line["rule_norm"] != line["grad_norm"] for line in lines)


# A method's rule or schedule, seen acting in the log of its steps.
ACTS: dict[str, Callable[[list[dict[str, Any]]], None]] = {
    "adalora": _ranks_fall,
    "aflora": _all_is_frozen,
    "mole": _gates_move,
    "loraplus": _two_rates,
    "lora_pro": _gradients_are_rewritten,
}


def recipe(folder: Path, model: Path, method: str, experts: list[Path], **keys: Any) -> Path:
    """The method on the tiny model; what is left at its default is left out."""
    section = section_of(method, experts, **{**KEYS.get(method, {}), **keys})
    given = {key: value for key, value in section.model_dump(mode="json").items() if key in section.model_fields_set}
    folder.mkdir()
    path = write_recipe(
        folder,
        model,
        train__epochs=2,
        train__max_steps=NUM_STEPS,
        train__save_every=3,
        train__keep=5,
        eval__generate_rows=0,
    )
    sections = json.loads(path.read_text())
    sections["adapter"] = given
    if method == "qalora":
        sections["quant"] = {"quant_type": "int4", "block_size": 32}
    path.write_text(json.dumps(sections))
    return path


def test_an_adapted_embedding_is_looked_into_as_the_product_it_is(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, build_tiny_llama(tmp_path / "llama", tie=False), adapter__embeddings=True)
    outcome = run_cli("train", path)
    assert outcome.code == 0, outcome.err
    outcome = run_cli("analyze", tmp_path / "run", tmp_path / "run", "--json")
    assert outcome.code == 0, outcome.err
    assert "of full rank" not in outcome.out + outcome.err
    found = json.loads(outcome.out)
    assert "embed_tokens" in outcome.out and found["looks"][0]["start_overlaps"], found.keys()


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_trained_resumed_and_exported(way: str, tiny_dir: Path, experts: list[Path], tmp_path: Path) -> None:
    method, keys = way.partition(" ")[0], WAYS[way]
    straight = recipe(tmp_path / "straight", tiny_dir, method, experts, **keys)
    outcome = run_cli("train", straight, "--json")
    assert outcome.code == 0, outcome.err
    lines = [json.loads(line) for line in (straight.parent / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if line["kind"] == "train"]
    assert len(logged) == NUM_STEPS
    assert LOGGED.get(method, set()) <= logged[-1].keys()
    ACTS.get(method, lambda lines: None)(logged)

    again = recipe(tmp_path / "again", tiny_dir, method, experts, **keys)
    assert run_cli("train", again, "--json").code == 0
    resumed = run_cli("train", again, "--resume", "--from", "3", "--json")
    assert resumed.code == 0, resumed.err
    names = ["adapter_model.safetensors", "adapter_config.json"]
    ours, theirs = (
        [(path.parent / "run" / "adapter" / name).read_bytes() for name in names] for path in (straight, again)
    )
    assert ours == theirs, "resumed from step 3 it is the straight run to the bit"

    # In float32: six steps of a tiny model may change it less than rounding to 16 bit does.
    merging = ("export", straight.parent / "run", tmp_path / "merged", "export.export_dtype=float32", "--json")
    exported = run_cli(*merging)
    if METHODS[method].merges == "none":
        assert exported.code == 4 and "neither merged nor folded" in exported.err
        assert not (tmp_path / "merged").exists()
        return
    assert exported.code == 0, exported.err
    assert json.loads(exported.out)["verdict"]["accepted"]


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"method": "lora", "structure": "ctcm"}, "adapter.structure has no effect: adapter.method is lora"),
        ({"method": "mtlora", "target_r": 2}, "adapter.target_r has no effect: adapter.method is mtlora"),
        ({"method": "mtlora", "structure": "cd"}, 'adapter.structure: "cd" is not one of shim, icfm, ctcm, dtsm'),
        ({"method": "adalora"}, "adapter.target_r is missing"),
        ({"method": "adalora", "r": 4, "target_r": 4}, "adapter.target_r: 4 is not below adapter.r, 4"),
        ({"method": "aflora", "schedule_start_frac": 0.5, "schedule_end_frac": 0.5}, "no step is left between them"),
        ({"method": "mole", "experts": ["nowhere"]}, "adapter.experts names 1 adapters"),
        ({"method": "lora", "granularity": "layer"}, "remove granularity; it belongs to mole"),
        ({"method": "mole", "granularity": "block"}, 'adapter.granularity: "block" is not one of matrix, layer'),
        ({"method": "mole", "r": 8, "experts": []}, "adapter.r has no effect: adapter.method is mole"),
        ({"method": "delta", "alpha": 8}, "adapter.alpha has no effect: adapter.method is delta"),
        ({"method": "florra_core"}, "did you mean flora_core?"),
    ],
    ids=str,
)
def test_a_key_that_the_method_does_not_read_is_refused(
    keys: dict[str, Any], words: str, tiny_dir: Path, tmp_path: Path
) -> None:
    path = write_recipe(tmp_path, tiny_dir)
    sections = json.loads(path.read_text())
    sections["adapter"] = keys
    path.write_text(json.dumps(sections))
    outcome = run_cli("check", path)
    assert outcome.code == 2 and words in " ".join(outcome.err.split()), outcome.err
