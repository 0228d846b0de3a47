"""What signals ask of a run: SIGINT, SIGTERM and SIGHUP end it with its state saved, SIGUSR1 saves and goes on."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import TypeVar

from qlora_train.errors import Interrupted

T = TypeVar("T")
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SAVING = signal.SIGUSR1  # what Slurm sends with --signal=USR1


class StopRequest:
    """What was asked for by a signal. It ends the run at once, but inside `waiting`, where the loop reads it.

    A second SIGINT ends the run at once wherever it is.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self.save_requested = False
        self._saved = "stopped before the first step of this call; start it again as before"
        self._waits = False

    @property
    def wants_checkpoint(self) -> bool:
        """Whether the state is to be saved after the step in hand."""
        return self.save_requested or self.signal_number is not None

    def saved_in(self, folder: Path) -> None:
        """The state was saved."""
        self.save_requested = False
        self._saved = f"saved {folder}; go on with --resume"

    def check(self) -> None:
        """Interrupted, with what there is to go on from, if the end of the run was asked for."""
        if self.signal_number is not None:
            raise Interrupted(self.signal_number, self._saved)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, a request to stop waits for `check`; leaving the block is one."""
        self._waits = True
        try:
            yield
        finally:
            self._waits = False
        self.check()

    def until_stopped(self, items: Iterable[T]) -> Iterator[T]:
        """The items one by one, with a `check` before each."""
        for item in items:
            self.check()
            yield item

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if number == SAVING:
            self.save_requested = True
            return
        first = self.signal_number is None
        if number == self.signal_number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_number = number
        if first and not self._waits:  # only the first: what cleans up after it is not to be disturbed
            self.check()


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Catch the signals inside the block, but those that are ignored, as `nohup` has it for SIGHUP.

    Outside the main thread no request ever comes.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    caught = [number for number in (*STOPPING, SAVING) if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, request.handle) for number in caught}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
