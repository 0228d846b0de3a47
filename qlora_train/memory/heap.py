"""Freed blocks of the C library's heap, given back to the system before they pile up."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable

import psutil

# A step may grow the process by so much more than a step on a trimmed heap does.
GROWTH_FRAC = 0.1


def trim_heap() -> None:
    """Give the pages of freed blocks back. Nothing happens where the C library has no such call."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _resident_bytes() -> int:
    resident: int = psutil.Process().memory_info().rss
    return resident


class HeapKeeper:
    """Keeps a training process on a CPU small. To be told of the end of each step.

    glibc keeps freed blocks of up to 32 MiB in its heap, where they split up: a process grew from step to step to three
    times what its tensors take. Trimmed after each step it stays small, but takes every page anew in the next one:
    100,000 page faults, a tenth of the time of a step without checkpointing. So the heap is trimmed where the process
    has grown by GROWTH_FRAC more than a step takes from a trimmed heap.
    """

    def __init__(
        self, resident_bytes: Callable[[], int] = _resident_bytes, trim: Callable[[], None] = trim_heap
    ) -> None:
        self._resident_bytes, self._trim = resident_bytes, trim
        self._trimmed: int | None = None  # resident bytes after the last trim
        self._needed = 0  # above them after the step that followed; the most seen
        self._is_fresh = False

    def after_step(self) -> None:
        """Trim where it is due. Costs a read of the process's size, some 20 microseconds."""
        grown = 0 if self._trimmed is None else self._resident_bytes() - self._trimmed
        if self._is_fresh:
            self._needed, self._is_fresh = max(self._needed, grown), False
        elif self._trimmed is None or grown > (1 + GROWTH_FRAC) * self._needed:
            self._trim()
            self._trimmed, self._is_fresh = self._resident_bytes(), True


HEAP = HeapKeeper()  # of this process, which has one heap
