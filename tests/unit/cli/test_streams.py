"""A stream whose reader is gone, whose disk is full, or that is closed: nothing is raised."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_train.cli.streams import SteadyStream, discard

ROOT = Path(__file__).resolve().parents[3]


def test_what_can_be_written_is_written() -> None:
    stream = io.StringIO()
    steady = SteadyStream(stream)
    assert steady.write("a") == 1
    steady.flush()
    assert stream.getvalue() == "a" and steady.isatty() is False


def test_a_full_disk_and_a_closed_stream_raise_nothing() -> None:
    with Path("/dev/full").open("w", buffering=1) as full:
        steady = SteadyStream(full)
        assert steady.write("a line\n") == 7
        steady.flush()
        discard(full)  # for `close`, which would flush
    steady.write("after the end")
    steady.flush()


@pytest.mark.parametrize("steady", [True, False])
def test_a_pipe_that_nobody_reads(steady: bool) -> None:
    """Python itself ends with 120 when it cannot flush at the end; the negative control shows it."""
    wrap = "sys.stderr = SteadyStream(sys.stderr)" if steady else ""
    code = f"import sys; from qlora_train.cli.streams import SteadyStream; {wrap}\nprint('x' * 99_999, file=sys.stderr)"
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-c", code], stderr=writing, cwd=ROOT, check=False)
    os.close(writing)
    assert (done.returncode == 0) == steady
