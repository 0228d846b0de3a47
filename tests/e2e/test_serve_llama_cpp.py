"""GGUF files of every family in llama.cpp itself: its logits, its tokens and its greedy answers are transformers'."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_train.export.formats.gguf_file import GgufModelWriter
from qlora_train.export.formats.vocabulary import read_vocabulary
from tests.clients import checks, llama_cpp
from tests.unit.export_formats.served import CONFIGS, random_model, tokenizer_for

pytestmark = pytest.mark.skipif(not llama_cpp.AVAILABLE, reason="needs xllamacpp (uv sync --group serve)")
TEXT = (
    "<|im_start|>user\nList the files, 0123456789 newest first; don't print  spaces\n\nor \u00e9, e\u0301, "
    "\u65e5\u672c\u8a9e \U0001f601<think>x</think><|im_end|>\n<|im_start|>assistant\n"
)
NUM_TOKENS = 12
# In float32 llama.cpp differs from transformers by rounding; its GELU comes from a table of float16 values.
MAX_KL, MAX_KL_GELU = 2e-6, 1e-5
VARIANTS = ("llama-3", "llama-linear", "qwen2-yarn", "phi3-long")  # of families that are there anyway
GELU = ("gemma2", "gemma3", "phi")


def write(path: Path, family: str, model: Any, file_type: str = "F32", **changed: torch.Tensor) -> Any:
    """The model in GGUF, with some parameters changed in the file; its tokenizer."""
    tokenizer = tokenizer_for(family)
    ends = [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    vocabulary = read_vocabulary(tokenizer, model.config.vocab_size, ends)
    parameters = {name: changed.get(name, value) for name, value in model.named_parameters()}
    shapes = {name: tuple(value.shape) for name, value in parameters.items()}
    writer = GgufModelWriter(path, model.config, vocabulary, shapes, file_type=file_type, name="tiny")
    for name, value in parameters.items():
        writer.add(name, value.float())
    writer.close()
    return tokenizer


def next_token(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """Log-probabilities of what comes next."""
    found: torch.Tensor = model(input_ids=torch.tensor([list(ids)])).logits[0, -1].double().log_softmax(-1)
    return found


def kl(reference: torch.Tensor, served: Sequence[float]) -> float:
    other = torch.tensor(served, dtype=torch.float64)
    assert torch.isfinite(other).all(), "the server told of every token"
    return float((reference.exp() * (reference - other)).sum())


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=pytest.mark.slow if name in VARIANTS else ()) for name in CONFIGS]
)
def test_a_family_computes_and_reads_text_as_transformers_does(family: str, tmp_path: Path) -> None:
    model = random_model(family)
    tokenizer = write(tmp_path / "m.gguf", family, model)
    ids = tokenizer(TEXT)["input_ids"]
    with llama_cpp.LlamaServer(tmp_path / "m.gguf", exact=True, context=256) as server:
        assert server.tokenize(TEXT) == tokenizer(TEXT, add_special_tokens=False)["input_ids"]
        assert server.tokenize(TEXT, add_special=True) == ids
        for length in (1, len(ids) // 2, len(ids)):  # up to several windows long
            served = server.log_probabilities(ids[:length], model.config.vocab_size)
            assert kl(next_token(model, ids[:length]), served) < (MAX_KL_GELU if family in GELU else MAX_KL), length
        greedy = model.generate(torch.tensor([ids]), max_new_tokens=NUM_TOKENS, do_sample=False)[0, len(ids) :]
        assert server.greedy(ids, NUM_TOKENS) == greedy.tolist()
        messages = [{"role": "user", "content": "What is 12 + 7?"}]
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert server.render(messages) == expected


@pytest.mark.slow
def test_a_longer_context_computes_short_texts_of_long_models_otherwise(tmp_path: Path) -> None:
    """Why the file says no more than the length of short texts, which is what a server takes by itself."""
    model = random_model("phi3-long")
    ids = write(tmp_path / "m.gguf", "phi3-long", model)(TEXT)["input_ids"]
    reference = next_token(model, ids)
    found = {}
    for context in (0, 512):  # 0: the file's own
        with llama_cpp.LlamaServer(tmp_path / "m.gguf", exact=True, context=context) as server:
            found[context] = kl(reference, server.log_probabilities(ids, model.config.vocab_size))
    assert found[0] < MAX_KL < 0.1 < found[512]


@pytest.mark.slow
@pytest.mark.parametrize(("file_type", "max_kl"), [("F16", 1e-4), ("BF16", 3e-3), ("Q8_0", 3e-2)])
def test_file_types_are_as_far_off_as_their_rounding(file_type: str, max_kl: float, tmp_path: Path) -> None:
    model = random_model("llama")
    tokenizer = write(tmp_path / "m.gguf", "llama", model, file_type)
    ids = tokenizer(TEXT)["input_ids"]
    with llama_cpp.LlamaServer(tmp_path / "m.gguf", exact=True, context=256) as server:
        assert 0 < kl(next_token(model, ids), server.log_probabilities(ids, model.config.vocab_size)) < max_kl


def test_swapped_queries_and_keys_show(tmp_path: Path) -> None:
    """The comparison's own negative control: rows of q in the order of transformers."""
    model = random_model("llama")
    name = "model.layers.0.self_attn.q_proj.weight"
    weight = dict(model.named_parameters())[name]
    tokenizer = write(
        tmp_path / "m.gguf", "llama", model, **{name: weight.unflatten(0, (4, 2, -1)).transpose(1, 2).flatten(0, 2)}
    )
    ids = tokenizer(TEXT)["input_ids"]
    with llama_cpp.LlamaServer(tmp_path / "m.gguf", exact=True, context=256) as server:
        assert kl(next_token(model, ids), server.log_probabilities(ids, model.config.vocab_size)) > 1e-3


def test_a_file_that_llama_cpp_refuses_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(llama_cpp.ServerFault, match="does not load"):
        llama_cpp.LlamaServer(tmp_path / "m.gguf")


def test_a_server_that_does_not_come_up_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It writes more to its errors than a pipe holds, and then hangs."""
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nhead -c 300000 /dev/zero | tr '\\0' x >&2\necho waiting >&2\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(llama_cpp, "START_S", 1)
    started = time.monotonic()
    with pytest.raises(llama_cpp.ServerFault, match=r"not within 1 s: x+waiting"):
        llama_cpp.LlamaServer(tmp_path / "m.gguf")
    assert time.monotonic() - started < 20


def test_a_models_own_penalties_do_not_change_what_is_compared() -> None:
    model, ids = random_model("llama"), list(range(5, 480))  # nearly all tokens: most answers repeat one
    plain = checks.transformers_greedy(model)(ids, NUM_TOKENS)
    model.generation_config.repetition_penalty, model.generation_config.no_repeat_ngram_size = 50.0, 1
    penalised = model.generate(torch.tensor([ids]), max_new_tokens=NUM_TOKENS, do_sample=False)[0, len(ids) :].tolist()
    assert checks.transformers_greedy(model)(ids, NUM_TOKENS) == plain != penalised
