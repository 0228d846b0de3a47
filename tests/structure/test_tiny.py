"""The tiny models that other tests stand on load offline through the ordinary doors, and are the same every time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import build_tiny_llama, build_tiny_neox, build_tiny_phi3, build_tiny_tokenizer

BUILDERS: dict[str, Callable[[Path], Path]] = {
    "llama": build_tiny_llama,
    "llama-untied": lambda folder: build_tiny_llama(folder, tie=False),
    "neox": build_tiny_neox,
    "phi3": build_tiny_phi3,
}


@pytest.mark.parametrize("name", BUILDERS)
def test_loads_offline(name: str, tmp_path: Path) -> None:
    folder = BUILDERS[name](tmp_path / name)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer("List the files.", return_tensors="pt")["input_ids"]
    assert torch.isfinite(model(input_ids=tokens).logits).all()
    assert model.config.tie_word_embeddings == (name == "llama")
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            assert module.in_features % 64 == 0 and module.out_features % 64 == 0


def test_tokenizer_is_chatml_and_lossless() -> None:
    tokenizer = build_tiny_tokenizer()
    assert len(tokenizer) <= 512
    assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"
    text = "Grüße, 世界! \t<tab> \x00"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    assert chat == system + "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert "system" not in tokenizer.apply_chat_template([{"role": "system", "content": ""}], tokenize=False)[20:]


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    def digests(folder: Path) -> dict[str, str]:
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}

    first = digests(build_tiny_llama(tmp_path / "first"))
    assert digests(build_tiny_llama(tmp_path / "second")) == first
    other = digests(build_tiny_llama(tmp_path / "other", seed=1))
    assert {name for name in first if first[name] != other[name]} == {"model.safetensors"}
