"""The made model is one that transformers loads, and its run folder is bound to it as training binds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from make_model import SIZES, make_model, make_run
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qlora_train.model.trained import load_trained, open_run
from qlora_train.quant.bnb import linear4bit_modules


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded tiny model with its run."""
    folder = tmp_path_factory.mktemp("made")
    make_run(folder, make_model("tiny", folder / "model", shard_bytes=2**18))
    return folder


def test_transformers_loads_it_whole(folder: Path) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(folder / "model", dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    assert model.dtype == torch.bfloat16 and len(list((folder / "model").glob("*.safetensors"))) > 1
    values = torch.cat([p.detach().float().flatten() for p in model.parameters() if p.ndim > 1])
    assert abs(float(values.mean())) < 1e-3 and float(values.std()) == pytest.approx(0.02, rel=0.02)


def test_its_run_is_bound_to_what_loading_finds(folder: Path) -> None:
    """The fingerprint from the files, a tensor at a time, is that of the loaded model."""
    trained = load_trained(open_run(folder / "run"))  # refuses another base, tokenizer or template
    assert trained.base.print == open_run(folder / "run").base_print
    layers = dict(linear4bit_modules(trained.base.model))
    adapter = load_file(folder / "run" / "adapter" / "adapter_model.safetensors")
    assert len(layers) == 14 and len(adapter) == 28 and all(bool(t.any()) for t in adapter.values())


def test_no_two_tensors_are_alike(folder: Path) -> None:
    tensors = {}
    for path in (folder / "model").glob("*.safetensors"):
        tensors |= load_file(path)
    wide = [tensor.flatten()[:4096] for tensor in tensors.values() if tensor.ndim > 1]
    assert not any(torch.equal(a, b) for i, a in enumerate(wide) for b in wide[:i])


@pytest.mark.parametrize(("size", "billions"), [("1B", 1.24), ("8B", 8.03)])
def test_sizes_are_those_of_llama(size: str, billions: float) -> None:
    hidden, mlp, layers, heads, kv_heads, vocabulary, tied = SIZES[size]
    attention = hidden * hidden * 2 + hidden * (hidden // heads) * kv_heads * 2
    total = layers * (attention + 3 * hidden * mlp) + vocabulary * hidden * (1 if tied else 2)
    assert total / 1e9 == pytest.approx(billions, abs=0.01)
