"""Every gate in one command: a line per verdict, and non-zero when any failed. `--static` leaves pytest out.

Two gates run at a time: each is one thread, the tests of the data alone take as long as all others of the quick gate.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Gate:
    """One command that must end with 0."""

    name: str
    module: str
    arguments: tuple[str, ...]


STATIC = (
    Gate("ruff check", "ruff", ("check", ".")),
    Gate("ruff format", "ruff", ("format", "--check", ".")),
    Gate("mypy", "mypy", ("qlora_train", "tools")),
)
_PYTEST = ("-q", "-m", "not slow", "-p", "no:cacheprovider")
TESTS = (
    Gate("tests of data", "pytest", (*_PYTEST, "tests/unit/data")),
    Gate("other tests", "pytest", (*_PYTEST, "tests/unit", "tests/structure", "--ignore", "tests/unit/data")),
)
AT_ONCE = 2


def run_gate(gate: Gate) -> bool:
    """Run one gate, print its verdict, and what it said only when it failed."""
    started = time.monotonic()
    command = [sys.executable, "-m", gate.module, *gate.arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    verdict = "ok" if done.returncode == 0 else "FAILED"
    line = f"{gate.name:<13} {verdict:<7} {time.monotonic() - started:6.1f} s\n"
    print(line if done.returncode == 0 else line + done.stdout + done.stderr, end="", flush=True)
    return done.returncode == 0


def main() -> int:
    """Run the gates asked for; 1 when any failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--static", action="store_true", help="ruff and mypy only, no pytest")
    gates = STATIC if parser.parse_args().static else TESTS + STATIC  # the longest first
    with ThreadPoolExecutor(AT_ONCE) as pool:
        verdicts = list(pool.map(run_gate, gates))
    return 0 if all(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
