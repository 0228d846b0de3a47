"""metrics.jsonl, and the events that a display may follow."""

from __future__ import annotations

import json
import math
import resource
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from qlora_train.artifacts.files import fsync_file, write_file
from qlora_train.train.state import TrainState
from qlora_train.train.step import StepResult


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

    @classmethod
    def of(
        cls,
        state: TrainState,
        num_steps: int,
        result: StepResult,
        learning_rate: float,
        step_s: float,
        peak_bytes: int,
    ) -> Progress:
        """The step that brought a run to `state`."""
        return cls(
            step=state.step,
            num_steps=num_steps,
            loss=result.loss,
            grad_norm=result.grad_norm,
            learning_rate=learning_rate,
            supervised_tokens_per_s=result.num_supervised_tokens / step_s,
            tokens_per_s=result.num_tokens / step_s,
            eta_s=state.train_s / state.step * (num_steps - state.step),
            memory_gib=peak_bytes / 2**30,
        )


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


class Follower(Protocol):
    """Whoever gets each line of metrics.jsonl too."""

    def log(self, kind: str, step: int, values: dict[str, Any], *, again: bool) -> None:
        """A line; `again` where one of this step or a later one was written before the run was resumed."""


def _kind_and_step(line: bytes) -> tuple[str, float]:
    """Kind and step of a line; infinity for one that a full disk left torn."""
    try:
        entry = json.loads(line)
        return str(entry["kind"]), float(entry["step"])
    except (ValueError, KeyError, TypeError):
        return "", math.inf


def last_logged_step(path: Path) -> int:
    """The last step that a metrics.jsonl holds a line of; 0 where there is none."""
    lines = path.read_bytes().splitlines() if path.is_file() else []
    return int(max((step for _, step in map(_kind_and_step, lines) if step < math.inf), default=0))


class Metrics:
    """Appends JSON lines. A line of a step is written once: a resume first drops those that will be written again.

    These are the lines past `after_step`, and, where its evaluation is due, those of this evaluation.

    A full disk does not end a run that is only logging. Lines that could not be written are kept, and written before
    the next one that can be; `failed` is None or says why there are such lines. `warn` is told once.
    """

    def __init__(
        self,
        path: Path,
        *,
        after_step: int,
        evaluation_due: bool = False,
        follower: Follower | None = None,
        warn: Callable[[str], None] | None = None,
    ) -> None:
        self._path, self._follower, self._warn = path, follower, warn
        self.failed: str | None = None
        self._unwritten = b""
        self._num_bytes = 0  # of whole lines in the file
        self._last_step = -1.0  # of the lines there were
        if path.exists():
            lines = path.read_bytes().splitlines(keepends=True)
            entries = [(line, *_kind_and_step(line)) for line in lines]
            self._last_step = max((step for _, _, step in entries if step < math.inf), default=-1.0)
            again = ("eval", after_step) if evaluation_due else None
            kept = b"".join(
                line
                for line, kind, step in entries
                if line.endswith(b"\n") and step <= after_step and (kind, step) != again
            )
            write_file(path, kept)
            self._num_bytes = len(kept)

    def write(self, kind: str, step: int, **values: Any) -> None:
        """One line, for the follower too."""
        self._append(kind, step, values)
        if self._follower is not None:
            self._follower.log(kind, step, values, again=step <= self._last_step)

    def event(self, step: int, what: str, **values: Any) -> None:
        """A line of kind `event`: something that a step should not do, in words and figures."""
        self._append("event", step, {"what": what, **values})

    def _append(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        self._unwritten += (json.dumps({"kind": kind, "step": step, **values}) + "\n").encode()
        try:
            with self._path.open("ab") as file:
                if file.tell() > self._num_bytes:  # a part of a line that could not be written whole
                    file.truncate(self._num_bytes)
                file.write(self._unwritten)
        except OSError as error:
            if self.failed is None and self._warn is not None:
                self._warn(
                    f"{self._path}: {error.strerror}; training goes on, and keeps the lines until it can write them"
                )
            self.failed = f"{self._path}: {error.strerror}"
        else:
            self._num_bytes += len(self._unwritten)
            self._unwritten, self.failed = b"", None

    def sync(self) -> None:
        """Put the lines on disk: a checkpoint that outlives a power cut has all of its steps logged."""
        with suppress(OSError):
            fsync_file(self._path)


def peak_memory_bytes(device: torch.device) -> int:
    """Highest use so far: torch's allocator on CUDA, resident memory of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
