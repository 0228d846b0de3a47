"""Conflicts among the keys that decide what is held in memory: each names both keys and its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_train.errors import Problem, RecipeError
from qlora_train.recipe.load import load_recipe

GOOD = "model: {path: org/base}\ndata:\n  train: [train.jsonl]\nrun: {dir: out}\n"


def check(folder: Path, *overrides: str) -> list[Problem]:
    (folder / "train.jsonl").write_text("{}\n")
    (folder / "r.yaml").write_text(GOOD)
    try:
        load_recipe(folder / "r.yaml", overrides)
    except RecipeError as error:
        return list(error.problems)
    return []


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        (["train.checkpoint_every=2"], ["checkpoint_every has no effect", "checkpointing is auto"]),
        (["train.checkpoint_every=2", "train.checkpointing=none"], ["checkpoint_every", "checkpointing is none"]),
        (["train.offload_checkpoints=true"], ["offload_checkpoints has no effect", "checkpointing is auto"]),
        (
            ["train.offload_checkpoints=true", "train.checkpointing=full", "model.device=cpu"],
            ["offload_checkpoints needs CUDA", "model.device is cpu"],
        ),
        (["train.resident_layers=2", "quant.quant_type=none"], ["resident_layers has no effect", "quant_type is none"]),
        (["train.resident_layers=2", "train.fused=false"], ["resident_layers has no effect", "fused is false"]),
        (["train.memory=auto", "data.batching=length_grouped"], ["train.memory: auto", "batching is length_grouped"]),
        (
            ["train.memory=auto", "train.micro_batch_size=1", "train.grad_accum_steps=1"],
            ["train.memory: auto", "one pack per step"],
        ),
        (["train.compile=true", "train.checkpointing=selective"], ["train.compile: true", "checkpointing: selective"]),
    ],
    ids=str,
)
def test_a_conflict_names_both_sides(tmp_path: Path, overrides: list[str], names: list[str]) -> None:
    (problem,) = check(tmp_path, *overrides)
    assert all(name in problem.what for name in names), problem
    assert problem.where == "command line"


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.checkpoint_every=2", "train.checkpointing=selective"],
        ["train.offload_checkpoints=true", "train.checkpointing=full"],
        ["train.resident_layers=2"],
        ["train.resident_layers=0", "quant.quant_type=none"],
        ["train.memory_limit_gib=4"],
        ["train.memory=auto", "train.micro_batch_size=1"],
        ["train.memory=fixed", "data.batching=length_grouped"],
        ["train.compile=auto", "train.checkpointing=selective"],
        ["train.compile=true", "train.checkpointing=full"],
    ],
    ids=str,
)
def test_what_belongs_together_loads(tmp_path: Path, overrides: list[str]) -> None:
    assert check(tmp_path, *overrides) == []
