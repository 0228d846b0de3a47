"""A still smaller model for the methods, and two adapters of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import build_tiny_llama


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One decoder layer of width 64, 128 in the middle. Never write into it: all tests share it."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    return build_tiny_llama(tmp_path_factory.mktemp("methods") / "llama", **sizes)


@pytest.fixture(scope="session")
def experts(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Folders of two plain adapters of the tiny model, of rank 4 and 2, all factors random."""
    from tests.methods.cases import write_experts

    return write_experts(tiny_dir, tmp_path_factory.mktemp("experts"))
