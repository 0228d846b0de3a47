"""Every gate in one command: a line per verdict, and non-zero when any failed. `--static` leaves pytest out."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
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
TESTS = (Gate("pytest", "pytest", ("-q", "-m", "not slow", "tests/unit", "tests/structure")),)


def run_gate(gate: Gate) -> bool:
    """Run one gate, print its verdict, and what it said only when it failed."""
    started = time.monotonic()
    command = [sys.executable, "-m", gate.module, *gate.arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    verdict = "ok" if done.returncode == 0 else "FAILED"
    print(f"{gate.name:<12} {verdict:<7} {time.monotonic() - started:6.1f} s", flush=True)
    if done.returncode != 0:
        print(done.stdout + done.stderr, flush=True)
    return done.returncode == 0


def main() -> int:
    """Run the gates asked for; 1 when any failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--static", action="store_true", help="ruff and mypy only, no pytest")
    gates = STATIC if parser.parse_args().static else STATIC + TESTS
    verdicts = [run_gate(gate) for gate in gates]
    return 0 if all(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
