"""Constants that one layer writes and another reads."""

from __future__ import annotations

IGNORE_INDEX = -100
"""The label of a position that is not supervised. torch's cross-entropy skips it by default."""
