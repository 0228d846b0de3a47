"""On a card: torch's own peaks are given to the phases that they belong to, and a real shortage becomes advice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.commandline import run_cli, write_recipe

pytestmark = pytest.mark.gpu


def test_each_phase_has_its_own_peak(tmp_path: Path, tiny_llama_dir: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_llama_dir, model__compute_dtype="bfloat16")
    outcome = run_cli("train", recipe, "--json")
    assert outcome.code == 0, outcome.err
    memory = json.loads((tmp_path / "run" / "memory.json").read_text())
    phases = {phase["name"]: phase for phase in memory["phases"]}
    assert memory["device"] == "cuda" and set(phases) == {"training", "evaluation", "generation"}
    for phase in phases.values():
        assert 0 < phase["measured"] <= phase["reserved"] and phase["measured"] <= memory["peak"]
    assert memory["peak"] == json.loads(outcome.out)["peak_memory_bytes"]


def test_a_card_that_is_full_gives_advice(tmp_path: Path, tiny_llama_dir: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_llama_dir, model__compute_dtype="bfloat16")
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved() + 2**20
    torch.cuda.set_per_process_memory_fraction(held / torch.cuda.get_device_properties(0).total_memory)
    try:
        outcome = run_cli("train", recipe)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert outcome.code == 9 and "error[memory] out of memory" in outcome.err, outcome.err
    assert "Fix: change what costs least first" in outcome.err
    assert run_cli("train", recipe).code == 0, "nothing is in the way of a second try"
