"""The command line answers at once: help needs no torch."""

from __future__ import annotations

import subprocess
import sys
import time

from tests.structure.source_tree import ROOT

HEAVY = ("torch", "transformers", "peft", "datasets", "bitsandbytes", "numpy", "pydantic", "rich")
MAX_HELP_S = 0.5


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


def test_help_is_fast() -> None:
    """Best of five: the other four may have met a busy machine."""
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        done = run_python("-m", "qlora_train", "--help")
        seconds.append(time.perf_counter() - started)
        assert done.returncode == 0, done.stderr
        assert "train" in done.stdout
    assert min(seconds) < MAX_HELP_S, seconds


def test_command_line_imports_nothing_heavy() -> None:
    done = run_python("-c", f"import sys, qlora_train.cli.main; print(*[m for m in {HEAVY} if m in sys.modules])")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
