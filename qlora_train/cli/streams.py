"""Output whose reader may go away: a run outlives its terminal and its pipe."""

from __future__ import annotations

import contextlib
import errno
import os
from typing import Any, TextIO

# The reader is gone for good: a pipe that nobody reads, a terminal that was closed.
_GONE = frozenset({errno.EPIPE, errno.EIO, errno.EBADF})


class SteadyStream:
    """A text stream that never fails: what cannot be written is lost, and nothing else."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, or do nothing."""
        self._attempt("write", text)
        return len(text)

    def flush(self) -> None:
        """Flush, or do nothing."""
        self._attempt("flush")

    def _attempt(self, name: str, *arguments: str) -> None:
        try:
            getattr(self._stream, name)(*arguments)
        except OSError as error:
            if error.errno in _GONE:
                discard(self._stream)
        except ValueError:  # the stream is closed
            pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def discard(stream: TextIO) -> None:
    """Let what is still to be written go nowhere: Python would fail again when it flushes at the end."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
