"""A small byte-level tokenizer whose merges are written out, so that every expected token can be told by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from qlora_train.data.table import TokenRow, TokenTable

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# A word is one token with and without the space before it; so are two spaces. All other bytes stand for themselves.
WORDS = ("assistant", "user", "system", "list", "files", "ls", "the")


def _build_tokenizer(trim_offsets: bool = True, nested: bool = False, **named: str | None) -> PreTrainedTokenizerFast:
    """The tokenizer with pad == eos == <|im_end|>, trimming offsets as GPT-2's and SmolLM2's do."""
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    # Letter by letter to the word, then the space before it: no other merge, so no other piece.
    merges = [(word[:stop], word[stop]) for word in WORDS for stop in range(1, len(word))]
    merges = [*dict.fromkeys(merges), *(("Ġ", word) for word in WORDS), ("Ġ", "Ġ")]
    pieces += [left + right for left, right in merges]
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    stage = processors.ByteLevel(trim_offsets=trim_offsets)
    backend.post_processor = processors.Sequence([stage]) if nested else stage
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|bos|>"])
    names = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>", **named}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.chat_template = CHATML
    tokenizer.name_or_path = "tiny"
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return _build_tokenizer()


@pytest.fixture(scope="session")
def build_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """Builds a tokenizer that a test may change."""
    return _build_tokenizer


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes a file from bytes, or from objects as JSON lines; gives its path."""

    def _write(content: bytes | Sequence[object], name: str = "train.jsonl") -> Path:
        path = tmp_path / name
        data = content if isinstance(content, bytes) else "".join(json.dumps(row) + "\n" for row in content).encode()
        path.write_bytes(data)
        return path

    return _write


def _table_of(lengths: Sequence[int]) -> TokenTable:
    """A table whose row i holds only the id i + 1, with every position but the first supervised."""
    rows = []
    for index, length in enumerate(lengths):
        span, weights = np.array([1, length], dtype=np.int32), np.ones(1, dtype=np.float32)
        rows.append(TokenRow(np.full(length, index + 1, dtype=np.int32), span[:1], span[1:], weights))
    return TokenTable.of_rows(rows)


@pytest.fixture(scope="session")
def table_of() -> Callable[[Sequence[int]], TokenTable]:
    """Builds a table from the lengths of its rows."""
    return _table_of
