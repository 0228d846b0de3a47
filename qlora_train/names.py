"""Constants that one layer writes and another reads."""

from __future__ import annotations

IGNORE_INDEX = -100
"""The label of a position that is not supervised. torch's cross-entropy skips it by default."""

PEFT_PREFIX = "base_model.model."
"""What PEFT puts before the name of every module of the model that it wraps."""
