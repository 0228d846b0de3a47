"""What an export is doing, and seconds by what they went to."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Clock:
    """Adds up wall time under names; a stretch inside another counts for the inner one alone."""

    def __init__(self, say: Callable[[str], None] = lambda line: None) -> None:
        self.say = say  # hears of each stage that may take minutes
        self.seconds: dict[str, float] = {}
        self._inner_s = 0.0

    @contextmanager
    def of(self, what: str) -> Iterator[None]:
        """Count the block."""
        outer_s, self._inner_s = self._inner_s, 0.0
        started = time.perf_counter()
        try:
            yield
        finally:
            whole_s = time.perf_counter() - started
            self.seconds[what] = self.seconds.get(what, 0.0) + whole_s - self._inner_s
            self._inner_s = outer_s + whole_s
