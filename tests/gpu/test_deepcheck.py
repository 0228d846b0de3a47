"""The deep check with CUDA kernels. Skipped, with the reason, where there is no card."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.commandline import run_cli, write_recipe

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("batching", ["packed", "length_grouped"])
def test_a_sound_model_passes(tmp_path: Path, tiny_llama_dir: Path, batching: str, compute_dtype: str) -> None:
    recipe = write_recipe(
        tmp_path,
        tiny_llama_dir,
        model__device="cuda",
        model__compute_dtype=compute_dtype,
        data__batching=batching,
    )
    outcome = run_cli("check", recipe, "--deep", "--json")
    assert outcome.code == 0, outcome.err
    assert all(finding["ok"] for finding in json.loads(outcome.out)["findings"])
