"""Room for what a run folder will hold, before anything is loaded."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from qlora_train.artifacts.layout import RunDir
from qlora_train.errors import MachineError
from qlora_train.recipe.load import load_recipe
from qlora_train.recipe.schema import Recipe
from qlora_train.train.disk import EXPORT, disk_terms_of, refuse_full_disk
from tests.commandline import write_recipe

ADAPTER = 16_384 * 4  # r = 4 on all 14 linear layers of the tiny Llama, in float32
NUM_WEIGHTS = 512 * 128 + 2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 256 * 128 + 2 * 128) + 128


def report_free(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    """Let the disk seem to have so much room."""
    real = getattr(shutil.disk_usage, "real", shutil.disk_usage)

    def usage(path: Path) -> Any:
        return real(path)._replace(free=num_bytes)

    usage.real = real  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", usage)


@pytest.fixture
def recipe(tmp_path: Path, tiny_llama_dir: Path) -> Recipe:
    return load_recipe(write_recipe(tmp_path, tiny_llama_dir, train__keep=3)).recipe


def test_causes_and_bytes(recipe: Recipe, tiny_llama_dir: Path) -> None:
    """Three are kept, the best one, and the one that is written; each is adapter and two moments."""
    found = {t.cause: t.num_bytes for t in disk_terms_of(recipe, AutoConfig.from_pretrained(tiny_llama_dir))}
    assert found.keys() == {"checkpoints", "adapter", EXPORT} and found["adapter"] == ADAPTER
    assert found[EXPORT] == 2 * NUM_WEIGHTS
    assert 0 <= found["checkpoints"] - 5 * 3 * ADAPTER < 5 * 4096, "and a step for each of 28 parameters"


def test_what_the_run_wrote_before_is_room(
    recipe: Recipe, tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run_dir = AutoConfig.from_pretrained(tiny_llama_dir), RunDir(tmp_path / "run")
    needed = sum(term.num_bytes for term in disk_terms_of(recipe, config) if term.cause != EXPORT)
    report_free(monkeypatch, needed - 1)
    with pytest.raises(
        MachineError,
        match=r"will hold 1 MiB, and 1 MiB are free .*checkpoints: .*adapter: .*needs 705 KiB more",
    ):
        refuse_full_disk(recipe, config, run_dir)
    assert not run_dir.root.exists()
    (run_dir.checkpoints / "step-000002").mkdir(parents=True)
    (run_dir.checkpoints / "step-000002" / "x").write_bytes(b"x")
    assert "an export 705 KiB" in str(refuse_full_disk(recipe, config, run_dir)), "which is a warning"


def test_an_export_that_will_not_fit_is_said(
    recipe: Recipe, tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run_dir = AutoConfig.from_pretrained(tiny_llama_dir), RunDir(tmp_path / "run")
    needed = sum(term.num_bytes for term in disk_terms_of(recipe, config))
    report_free(monkeypatch, needed - 1)
    notice = refuse_full_disk(recipe, config, run_dir)
    assert notice is not None and "will hold 1 MiB, and an export 705 KiB: 1.69 MiB" in notice
    report_free(monkeypatch, needed)
    assert refuse_full_disk(recipe, config, run_dir) is None


def test_a_model_that_cannot_be_traced_is_not_refused(recipe: Recipe, tmp_path: Path) -> None:
    assert refuse_full_disk(recipe, object(), RunDir(tmp_path / "run")) is None
