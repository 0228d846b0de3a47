"""Chat templates are untrusted: they render in a process of their own, with limits of time, memory and length."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

from qlora_train.errors import MachineError, ModelError, SecurityError

FROZEN_DATE = date(2024, 7, 26)  # what templates take for today; the date that Llama 3.1's own template falls back to
ROW_SECONDS = 10.0  # for the renderings of one row
START_SECONDS = 60.0  # to start Python on a busy machine; compiling has ROW_SECONDS of it to compute
MEMORY_BYTES = 512 * 2**20
MAX_CHARS = 16 * 2**20  # of one rendering
MAX_TEMPLATE_BYTES = 64 * 2**10
TEMPLATE_FIX = "give a template that fits: `chat_template: FILE.jinja` in the recipe's model section"
_WORKER = Path(__file__).with_name("sandbox_worker.py")
_PIPE_BYTES = 2**20
_SAID_CHARS = 500  # of what a worker says that does not start
_LINE_CHARS = 2**20  # but for a row that is longer


@dataclass(frozen=True)
class TemplateFacts:
    """What is known of a template before it renders anything."""

    literals: str  # its literal text, the pieces separated by NUL
    marks: bool  # whether it marks answers with {% generation %}


@dataclass(eq=False)
class Ticket:
    """A batch that was handed to the worker."""

    requests: Sequence[str]
    places: Sequence[str]
    lines: list[bytes] = field(default_factory=list)


class Sandbox:
    """One worker process. A batch is in its hands at a time, so that it can render while its parent does other work."""

    def __init__(self, templates: Sequence[str], variables: Mapping[str, str], name: str, where: str | None) -> None:
        """Start the worker and compile; ModelError if a template does not, at `where`, the first row that needs it."""
        for template in templates:
            if (size := len(template.encode("utf-8", "replace"))) > MAX_TEMPLATE_BYTES:
                raise _too_much(name, f"is {size:,} bytes long; the limit is {MAX_TEMPLATE_BYTES:,}", where)
        self._name = name
        self._setup = {
            "templates": list(templates),
            "variables": dict(variables),
            "today": FROZEN_DATE.isoformat(),
            "seconds": ROW_SECONDS,
            "memory_bytes": MEMORY_BYTES,
            "max_chars": MAX_CHARS,
        }
        self._current: Ticket | None = None
        self._worker = _Worker()
        try:
            answer = self._start(where)
        except BaseException:
            self.close()
            raise
        self.facts = [TemplateFacts(**facts) for facts in answer]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the worker."""
        self._worker.close()

    def submit(self, requests: Sequence[str], places: Sequence[str]) -> Ticket:
        """Begin to render rows; `sandbox_worker` says how a request is written. `places` are for messages."""
        self._finish()  # the worker is idle then, and reads what it is sent
        ticket = Ticket(requests, places)
        self._current = ticket
        for line in _lines(requests):
            self._worker.send(line)
        return ticket

    def collect(self, ticket: Ticket) -> list[Any]:
        """What the worker says of each row of a batch. SecurityError if the template went over a limit."""
        if ticket is self._current:
            self._finish()
        replies: list[Any] = json.loads(b"[" + b",".join(ticket.lines) + b"]")
        for reply, place in zip(replies, ticket.places, strict=True):
            if reply[0] == "limit":
                raise _too_much(self._name, reply[1], place)
        return replies

    def _start(self, where: str | None) -> list[dict[str, Any]]:
        self._worker.wait_until_ready()
        self._worker.send(json.dumps(self._setup))
        try:
            (line,) = self._worker.receive(START_SECONDS)
        except _GoneError as gone:
            raise _too_much(self._name, str(gone), where) from None
        answer = json.loads(line)
        if answer[0] == "limit":
            raise _too_much(self._name, answer[1], where)
        if answer[0] == "fault":
            raise ModelError(describe_fault(self._name, *answer[1:]), fix=TEMPLATE_FIX, where=where)
        return list(answer[1])

    def _finish(self) -> None:
        """Receive what is still to come of the batch in hand."""
        ticket, self._current = self._current, None
        if ticket is None:
            return
        try:
            while len(ticket.lines) < len(ticket.requests):
                ticket.lines += self._worker.receive(ROW_SECONDS)
        except _GoneError as gone:
            self._worker.close()
            self._one_by_one(ticket, gone)

    def _one_by_one(self, ticket: Ticket, gone: _GoneError) -> None:
        """Render the rows that a worker left behind when it ended, each alone, to learn which one is at fault."""
        left = list(zip(ticket.requests, ticket.places, strict=True))[len(ticket.lines) :]
        if len(left) == 1:
            raise _too_much(self._name, str(gone), left[0][1]) from None
        self._worker = _Worker()
        self._start(left[0][1])
        for request, place in left:
            self._worker.send(f"[{request}]")
            try:
                ticket.lines += self._worker.receive(ROW_SECONDS)
            except _GoneError as again:
                self._worker.close()
                raise _too_much(self._name, str(again), place) from None


class _GoneError(Exception):
    """The worker was ended, or ended by itself; the message says why, after "the chat template ..."."""


class _Worker:
    """The process and its pipes. A thread reads, so that a batch of any size never fills a pipe."""

    def __init__(self) -> None:
        inherited = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-W", "ignore", str(_WORKER), *_library_folders()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,  # read where it does not start, and shut before a template is near
            env=inherited,  # no tokens, no secrets
            cwd="/",
            start_new_session=True,  # a Ctrl-C is for the parent, which ends the worker in its own time
        )
        assert self._process.stdin and self._process.stdout and self._process.stderr
        self._in, self._out = self._process.stdin, self._process.stdout
        with contextlib.suppress(OSError):  # as large as the system lets it be
            fcntl.fcntl(self._out, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        self._chunks: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._partial: list[bytes] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait_until_ready(self) -> None:
        """Return when the worker has imported all that it needs. MachineError, in its own words, if it cannot."""
        assert self._process.stderr
        try:
            self.receive(START_SECONDS)
        except _GoneError:
            self._process.kill()
            said = " ".join(self._process.stderr.read().decode("utf-8", "replace").split())[-_SAID_CHARS:]
            raise MachineError(
                "the process that renders chat templates does not start: "
                + (said or f"it ends with code {self._process.wait()} and says nothing"),
                fix=f"reinstall Jinja2 beside {sys.executable}: pip install --force-reinstall jinja2 markupsafe",
            ) from None
        finally:
            self._process.stderr.close()

    def send(self, line: str) -> None:
        """Write a line. Where the worker has ended, `receive` tells."""
        with contextlib.suppress(BrokenPipeError):
            self._in.write(line.encode("utf-8", "surrogatepass") + b"\n")
            self._in.flush()

    def receive(self, seconds: float) -> list[bytes]:
        """At least one line. _GoneError if none comes in time."""
        while True:
            try:
                chunk = self._chunks.get(timeout=seconds)
            except queue.Empty:
                raise _GoneError(f"takes more than {seconds:g} s for one row, which is the limit") from None
            if not chunk:
                raise _GoneError(_why_ended(self._process.wait()))
            first, *lines = chunk.split(b"\n")
            self._partial.append(first)
            if lines:
                complete = [b"".join(self._partial), *lines[:-1]]
                self._partial = [lines[-1]]
                return complete

    def close(self) -> None:
        """End the process, now. It holds nothing that could be lost."""
        self._process.kill()
        self._process.wait()
        self._reader.join()
        self._out.close()
        with contextlib.suppress(BrokenPipeError):
            self._in.close()

    def _read(self) -> None:
        chunk = b"-"
        while chunk:
            chunk = os.read(self._out.fileno(), _PIPE_BYTES)
            self._chunks.put(chunk)


def _library_folders() -> list[str]:
    """Where Jinja lies here; isolated from the environment, the worker knows no PYTHONPATH and no user's packages."""
    specs = [find_spec(name) for name in ("jinja2", "markupsafe")]
    return list(dict.fromkeys(str(Path(spec.origin).parents[1]) for spec in specs if spec and spec.origin))


def _lines(requests: Sequence[str]) -> Iterator[str]:
    """Requests in lines that the worker has the memory to read."""
    start = num_chars = 0
    for index, request in enumerate(requests):
        num_chars += len(request)
        if num_chars > _LINE_CHARS and index > start:
            yield f"[{','.join(requests[start:index])}]"
            start, num_chars = index, len(request)
    yield f"[{','.join(requests[start:])}]"


def describe_fault(name: str, line: int | None, message: str) -> str:
    """What a template's own error says."""
    at = f" at line {line}" if line else ""
    return f"the chat template of {name!r} fails{at}: {message}"


def _why_ended(code: int) -> str:
    if code == -signal.SIGXCPU:
        return f"computes for more than {ROW_SECONDS:g} s for one row, which is the limit"
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    return f"ends its process ({how}); its memory is limited to {MEMORY_BYTES // 2**20} MiB"


def _too_much(name: str, what: str, where: str | None) -> SecurityError:
    return SecurityError(f"the chat template of {name!r} {what}", fix=TEMPLATE_FIX, where=where)
