"""A tiny run folder that nothing trained, made once: export reads it like any other."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "tools"))


@pytest.fixture(scope="package")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model` and `run`. Never write into it."""
    from make_model import make_model, make_run

    folder = tmp_path_factory.mktemp("made")
    make_run(folder, make_model("tiny", folder / "model"))
    return folder
