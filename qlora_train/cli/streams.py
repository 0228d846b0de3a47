"""Output that may be refused: a run outlives its terminal and its pipe; a result that is not written is said to be."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast

from qlora_train.errors import MachineError

# The reader is gone for good: a pipe that nobody reads, a terminal that was closed.
_GONE = frozenset({errno.EPIPE, errno.EIO, errno.EBADF})


class SteadyStream:
    """A text stream that never fails: what cannot be written is lost, and nothing else."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, or do nothing."""
        if text != "":  # click asks with one what kind of stream this is, and takes any error for an answer
            self._attempt("write", text)
        return len(text)

    def flush(self) -> None:
        """Flush, or do nothing."""
        self._attempt("flush")

    def _attempt(self, name: str, *arguments: str) -> None:
        try:
            getattr(self._stream, name)(*arguments)
        except OSError as error:
            self._refused(error)
        except ValueError:  # the stream is closed
            pass

    def _refused(self, error: OSError) -> None:
        if error.errno in _GONE:
            discard(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class ResultStream(SteadyStream):
    """A text stream for results, which must not be lost unseen; a reader that went away stays a BrokenPipeError."""

    def _refused(self, error: OSError) -> None:
        if isinstance(error, BrokenPipeError):
            raise error
        discard(self._stream)
        raise MachineError(
            f"cannot write the result to standard output: {error.strerror}",
            fix="let the output go elsewhere; what the command had made is there",
        ) from error


@contextlib.contextmanager
def steady_streams() -> Iterator[None]:
    """Standard output as a ResultStream and standard error as a SteadyStream, both open.

    Where one of the three streams is closed, the next file to be opened would get its number, and then whatever a
    library prints: it is opened on the null device.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "r" if name == "stdin" else "w", closefd=False))
    results, notices = ResultStream(sys.stdout), SteadyStream(sys.stderr)
    with contextlib.redirect_stdout(cast(TextIO, results)), contextlib.redirect_stderr(cast(TextIO, notices)):
        yield


def discard(stream: TextIO) -> None:
    """Let what is still to be written go nowhere: Python would fail again when it flushes at the end."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
