"""The terms of a plan: one cause of memory in one stage of a run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Stage = Literal["training", "evaluation", "generation", "export", "disk"]
How = Literal["traced", "formula", "constant"]

STAGES: tuple[Stage, ...] = ("training", "evaluation", "generation", "export", "disk")
ON_DEVICE: tuple[Stage, ...] = ("training", "evaluation", "generation")
"""Stages whose bytes lie on the device that trains. Those of `export` lie in host memory, those of `disk` on disk."""


@dataclass(frozen=True)
class Term:
    """One cause of memory in one stage."""

    stage: Stage
    cause: str  # e.g. "quantised base"; see CAUSES in memory/trace.py, and memory/constants.py
    num_bytes: int
    how: How
    source: str  # what was traced, the formula, or where the constant comes from

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)
