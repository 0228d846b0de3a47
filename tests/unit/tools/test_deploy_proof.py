"""The proof of deployment on a tiny run: its short form judges every bar, and quantises each base tensor once."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from make_model import make_model, make_run
from proofs import deploy
from serving import bars as serving_bars

from qlora_train.export.base import BaseReader
from tests.clients import llama_cpp

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a random adapter."""
    folder = tmp_path_factory.mktemp("made")
    return make_run(folder, make_model("tiny", folder / "model"))


@pytest.mark.skipif(not llama_cpp.AVAILABLE, reason="needs xllamacpp (uv sync --group serve)")
def test_the_short_form_judges_what_it_measures(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: Counter[str] = Counter()
    quantised = BaseReader.quantised

    def counted(self: BaseReader, weight: Any) -> Any:
        made["quantised"] += 1
        return quantised(self, weight)

    monkeypatch.setattr(BaseReader, "quantised", counted)
    monkeypatch.setattr(deploy, "FOLDER", tmp_path)
    monkeypatch.setattr(serving_bars, "FOLDER", tmp_path / "formats")
    monkeypatch.setattr(deploy, "LAYER", "model.layers.1")
    monkeypatch.setattr(deploy, "SHORT_ANSWERS", 4)
    monkeypatch.setattr(deploy, "_spelling", lambda full: (run, ""))
    monkeypatch.setattr(deploy, "memory_bars", lambda size: [])
    monkeypatch.setitem(os.environ, "TQDM_DISABLE", "1")
    found = {bar.what: bar for bar in deploy.measure(full=False)}
    short = {what: (bar.value, bar.bar) for what, bar in found.items() if not bar.ok and "Ollama" not in what}
    assert not short, short
    assert made["quantised"] == 14, "each linear layer once"
    judged = {what for what, bar in found.items() if bar.bar}
    for words in ("answers compared", "spelling, dequantized: KL", "no fault planted", "gguf-f16: KL", "lora: KL"):
        assert any(words in what for what in judged), words
    assert sum(what.startswith("planted fault") for what in judged) == len(deploy.FAULTS) == 4
    assert sum(what.startswith("llama.cpp") for what in judged) == 3
