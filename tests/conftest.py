"""What every test stands on: no network, one thread, fixed seeds, and a tiny random Llama built here."""

from __future__ import annotations

import os

# Before anything imports torch or the hub client: both read these once. One thread makes sums repeatable.
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")

import random
import signal
import sys
from pathlib import Path

import pytest
from hypothesis import settings

from tests.tiny import build_tiny_llama

# The same examples every time, and no verdict that depends on the speed of the machine.
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")


# Ignored where a shell started this in the background; tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, by name and with the reason, what needs a GPU where there is none."""
    needing_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not needing_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in needing_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch sees none"))


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Every test starts from the same generators. numpy and torch only where something imported them already."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(autouse=True)
def own_cache(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache of this test run's own; only the real model, which takes a minute to convert, stays in the user's."""
    if not request.node.get_closest_marker("real"):
        monkeypatch.setenv("QLORA_TRAIN_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random Llama (tied head) and its tokenizer. Never write into it: all tests share it."""
    return build_tiny_llama(tmp_path_factory.mktemp("tiny") / "llama")
