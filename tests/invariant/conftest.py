"""The straight run that resumed ones are held against."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.commandline import run_cli, write_recipe


@pytest.fixture(scope="session")
def straight(tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path) -> Path:
    """An undisturbed run with dropout, checkpointing and two micro-batches a step. Never written to."""
    folder = tmp_path_factory.mktemp("straight")
    recipe = write_recipe(folder, tiny_llama_dir, train__checkpointing="full", train__keep=9, eval__generate_rows=0)
    outcome = run_cli("train", recipe)
    assert outcome.code == 0, outcome.err
    return folder
