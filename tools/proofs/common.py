"""What the proofs share: bars, runs through the real command line, and runs that may be used again."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
WORK = ROOT / "runs" / "prove"


@dataclass(frozen=True)
class Bar:
    """One measured figure against what it has to reach. `bar` None: shown, not judged."""

    what: str
    value: float
    unit: str = ""
    at_most: float | None = None
    at_least: float | None = None
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether the bar is met; NaN meets none."""
        above = self.at_least is None or self.value >= self.at_least
        return above and (self.at_most is None or self.value <= self.at_most)

    @property
    def bar(self) -> str:
        """The bar as people write it."""
        if self.at_most is not None:
            return f"<= {self.at_most:g}"
        return f">= {self.at_least:g}" if self.at_least is not None else ""


def verb(*arguments: str | Path) -> tuple[dict[str, Any], float]:
    """Run `qlora-train ARGUMENTS --json` as a user would; its result and its seconds. Ends the proof when it fails."""
    command = [sys.executable, "-m", "qlora_train", *map(str, arguments), "--json"]
    print(f"$ qlora-train {' '.join(map(str, arguments))}", flush=True)
    started = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"the command above ended with {done.returncode}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result, time.perf_counter() - started


def verb_here(*arguments: str | Path) -> dict[str, Any]:
    """As `verb`, in this process, which has paid for its imports; only the result. Stages go to stderr."""
    from qlora_train.cli.main import app

    print(f"$ qlora-train {' '.join(map(str, arguments))}", flush=True)
    out, code = io.StringIO(), 0
    with contextlib.redirect_stdout(out):
        try:
            app(args=[*map(str, arguments), "--json"])
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    if code:
        sys.exit(f"the command above ended with {code}")
    result: dict[str, Any] = json.loads(out.getvalue())
    return result


def fresh(folder: Path) -> Path:
    """An absent folder to run into."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def earlier(folder: Path, recipe: Path) -> dict[str, Any] | None:
    """The result of an earlier run of the same code, libraries, recipe, data and model, if all verify; else None."""
    from qlora_train.artifacts.folders import manifest_faults
    from qlora_train.artifacts.layout import RunDir
    from qlora_train.data.sources.open import open_source
    from qlora_train.environment import environment
    from qlora_train.errors import UserError
    from qlora_train.model.source import resolve_source
    from qlora_train.recipe.load import load_recipe, load_resolved

    run = RunDir(folder)
    try:
        result: dict[str, Any] = json.loads(run.summary.read_text(encoding="utf-8"))
        then, now = json.loads(run.environment.read_text(encoding="utf-8")), environment()
        if any(then.get(key) != now[key] for key in ("code_sha256", "versions", "cpu", "cpu_capability")):
            return None  # what other code wrote may be laid out otherwise
        wanted = load_recipe(recipe, [f"run.dir={folder}"]).recipe
        files = json.loads(run.data.read_text(encoding="utf-8"))["files"]
        base = json.loads(run.base.read_text(encoding="utf-8"))["source"]
        same = (
            load_resolved(run.recipe) == wanted,
            all(entry["sha256"] == open_source(entry["name"]).digest() for entry in files),
            base["file_sha256"] == resolve_source(wanted.model).file_sha256,
            not manifest_faults(run.adapter),
        )
    except (OSError, ValueError, KeyError, UserError):
        return None
    return result if all(same) else None


def tests_pass(tests: Mapping[str, Sequence[str]]) -> list[Bar]:
    """Run the tests that hold what has no figure: files by what they are tests of."""
    bars = []
    for what, files in tests.items():
        in_parallel = ("--numprocesses=logical", "--maxprocesses=4", "--dist=worksteal")  # as the Makefile does
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *in_parallel, *files]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        found = re.search(r"(\d+) passed", done.stdout)
        bars.append(Bar(f"tests of {what}: passed", int(found.group(1)) if found else 0, "tests", at_least=1))
        bars.append(Bar(f"tests of {what}: exit status", done.returncode, at_most=0))
    return bars
