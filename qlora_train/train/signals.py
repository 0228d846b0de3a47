"""SIGINT and SIGTERM end a run after the step in hand; a second SIGINT ends it at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from qlora_train.errors import Interrupted


class StopRequest:
    """Set by a signal, read by the loop at the end of each step."""

    def __init__(self) -> None:
        self.signal_number: int | None = None

    def check(self) -> None:
        """Between the phases before step 1: end the run, which has nothing to save yet."""
        if self.signal_number is not None:
            raise Interrupted(
                self.signal_number, "stopped before the next step; no checkpoint was written by this call"
            )

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if number == signal.SIGINT and self.signal_number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_number = number


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Catch SIGINT, SIGTERM and SIGHUP inside the block. Outside the main thread no request ever comes."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    caught = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    previous = {number: signal.signal(number, request.handle) for number in caught}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
