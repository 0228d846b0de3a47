"""Packs for tests: rows of given lengths, and tiny models of several families, in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen3Config,
)

from qlora_train.data.loader import MicroBatch, collate
from qlora_train.data.table import TokenRow, TokenTable
from qlora_train.model.attention import ATTENTION_NAME
from tests.tiny import SIZES

WINDOW = 8
_GROUPED: dict[str, Any] = {**SIZES, "num_key_value_heads": 2}
_LAYERS = ["sliding_attention", "full_attention"]
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**_GROUPED),
    "qwen3": Qwen3Config(**_GROUPED, head_dim=32),
    "gemma3": Gemma3TextConfig(**_GROUPED, head_dim=32, sliding_window=WINDOW, layer_types=_LAYERS),
    "mistral": MistralConfig(**_GROUPED, sliding_window=WINDOW),
    "phi3": Phi3Config(**_GROUPED),
    "neox": GPTNeoXConfig(**SIZES),
    # Half a unit caps the scores of random weights; the default, 50, would not show.
    "gemma2": Gemma2Config(**_GROUPED, head_dim=32, sliding_window=WINDOW, attn_logit_softcapping=0.5),
}


def tiny_model(family: str, attention: str = ATTENTION_NAME, dtype: torch.dtype = torch.float32) -> Any:
    """A frozen random model; the same weights for every attention."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[family], attn_implementation=attention, dtype=torch.float32)
    return model.to(dtype).eval().requires_grad_(False)


def table_of(lengths: Sequence[int], weights: Sequence[float] = (), seed: int = 0) -> TokenTable:
    """Random rows whose last two thirds are supervised, all of a row with one weight."""
    rng = np.random.default_rng(seed)
    rows = []
    for index, length in enumerate(lengths):
        start = np.array([max(1, length // 3)], dtype=np.int32)
        weight = np.array([weights[index] if weights else 1.0], dtype=np.float32)
        ids = rng.integers(3, 300, length).astype(np.int32)
        rows.append(TokenRow(ids, start, np.array([length], dtype=np.int32), weight))
    return TokenTable.of_rows(rows)


def packed(table: TokenTable, *packs: Sequence[int]) -> MicroBatch:
    """The rows of these packs as one micro-batch, padded with id 0."""
    return collate(table, packs, 0, packed=True)


def alone(table: TokenTable, row: int) -> MicroBatch:
    """One row by itself, without boundaries."""
    return collate(table, [[row]], 0)


def rows_of(batch: MicroBatch, values: torch.Tensor) -> list[torch.Tensor]:
    """The part of (B, T, ...) that belongs to each row."""
    assert batch.row_starts is not None
    flat = values.flatten(0, 1)
    return [flat[start : start + n] for start, n in zip(batch.row_starts, batch.row_lengths, strict=True)]
