"""metrics.jsonl, and the events that a display may follow."""

from __future__ import annotations

import json
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from qlora_train.artifacts import write_file


@dataclass(frozen=True)
class Progress:
    """One finished step, as a display wants it. Rates are over this step."""

    step: int
    num_steps: int
    loss: float
    grad_norm: float
    learning_rate: float
    supervised_tokens_per_s: float
    tokens_per_s: float
    eta_s: float
    memory_gib: float


class Reporter(Protocol):
    """Whoever shows a run. The library itself never prints."""

    def message(self, text: str) -> None:
        """A line worth reading once."""

    def warning(self, text: str) -> None:
        """Something that can be acted on."""

    def step(self, progress: Progress) -> None:
        """A training step ended."""

    def evaluation(self, step: int, loss: float) -> None:
        """A held-out loss was measured."""


class Silent:
    """The reporter of library calls."""

    def message(self, text: str) -> None:
        """Say nothing."""

    def warning(self, text: str) -> None:
        """Say nothing."""

    def step(self, progress: Progress) -> None:
        """Say nothing."""

    def evaluation(self, step: int, loss: float) -> None:
        """Say nothing."""


def _step_of(line: bytes) -> float:
    """The step of a line; infinity for one that a full disk left torn."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


class Metrics:
    """Appends JSON lines. A line of a step is written once: a resume first drops the lines past its checkpoint."""

    def __init__(self, path: Path, *, after_step: int) -> None:
        self._path = path
        self.failed: str | None = None
        self._torn = False
        if path.exists():
            lines = path.read_bytes().splitlines(keepends=True)
            kept = [line for line in lines if line.endswith(b"\n") and _step_of(line) <= after_step]
            write_file(path, b"".join(kept))

    def write(self, kind: str, step: int, **values: Any) -> None:
        """One line. A full disk must not end a run that is only logging: the failure is kept in `failed`."""
        line = ("\n" if self._torn else "") + json.dumps({"kind": kind, "step": step, **values}) + "\n"
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line)
            self._torn = False
        except OSError as error:
            self._torn = True  # the next line must not be joined to a part of this one
            self.failed = self.failed or f"{self._path}: {error.strerror}"


def peak_memory_bytes(device: torch.device) -> int:
    """Highest use so far: torch's allocator on CUDA, resident memory of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
