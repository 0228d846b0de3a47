"""Streams whose reader is gone, whose disk is full, or that are closed: notices are lost, a lost result is said."""

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


def run(arguments: str, redirections: str) -> subprocess.CompletedProcess[str]:
    """`qlora-train ARGUMENTS REDIRECTIONS` in a shell."""
    command = f"exec {sys.executable} -m qlora_train {arguments} {redirections}"
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, check=False)


@pytest.mark.parametrize("arguments", ["--version", "--help", "report nowhere --help"])
def test_a_result_that_finds_no_room_is_an_error_of_the_machine(arguments: str) -> None:
    done = run(arguments, "> /dev/full")
    assert done.returncode == 6 and "standard output: No space left on device" in done.stderr, done
    assert "Traceback" not in done.stderr


def test_closed_streams_are_no_files_of_ours(tmp_path: Path) -> None:
    """Without a cure the first file that is opened gets the number of standard output, and what is printed there."""
    done = run("--version", ">&- 2>&- <&-")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    code = (
        "import os, sys; from qlora_train.cli.streams import steady_streams\n"
        "with steady_streams():\n"
        f"    file = open({str(tmp_path / 'file')!r}, 'w'); os.write(1, b'lost'); print('lost')\n"
        "    sys.exit(file.fileno())"
    )
    done = subprocess.run(["bash", "-c", f'exec {sys.executable} -c "$0" >&- 2>&-', code], cwd=ROOT, check=False)
    assert done.returncode > 2 and (tmp_path / "file").read_text() == ""
