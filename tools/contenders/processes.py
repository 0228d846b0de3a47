"""The other end of a worker: starts the process, sends commands, reads answers, says why it died."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from typing import Any

from contenders.job import ROOT, Options


class Worker:
    """A contender's process. Leaving the context ends it."""

    def __init__(self, name: str, options: Options, threads: int) -> None:
        """`threads` bounds what its libraries may use; each step says how many it uses."""
        self.name = name
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  closed with the process
        path = os.pathsep.join([str(ROOT / "tools"), str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "contenders.worker", name, json.dumps(asdict(options))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
            cwd=ROOT,
            text=True,
        )
        self.facts: dict[str, Any] = {}

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exc: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def wait_until_loaded(self) -> None:
        """Read its first answer: settings, bytes resident when loaded, number of layers and of 4-bit weights."""
        self.facts = self.answer()

    def finish(self) -> None:
        """Wait until nothing of a set is left to do, so that the others run alone."""
        self.answer()

    def ask(self, **command: Any) -> dict[str, Any]:
        """Send a command and wait for its answer. RuntimeError with the process's last words when it is gone."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # told below, with the reason
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """The next answer; waits for it."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            words = self._errors.read().decode(errors="replace").strip().splitlines()[-15:]
            raise RuntimeError(f"contender {self.name} ended:\n" + "\n".join(words))
        answer: dict[str, Any] = json.loads(line)
        return answer
