"""Constants that one layer writes and another reads."""

from __future__ import annotations

IGNORE_INDEX = -100
"""The label of a position that is not supervised. torch's cross-entropy skips it by default."""

PEFT_PREFIX = "base_model.model."
"""What PEFT puts before the name of every module of the model that it wraps."""

TOKEN_ROWS = "token_adapter.trainable_tokens_delta"
"""PEFT's name, within an embedding or a head, of rows that are trained for single tokens."""

TOKEN_BASE = "token_adapter.base_layer"
"""PEFT's name of the embedding or head that it put such rows on."""
