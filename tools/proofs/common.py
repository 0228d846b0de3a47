"""What the proofs share: bars, runs through the real command line, and runs that may be used again."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_train.environment import versions

ROOT = Path(__file__).resolve().parent.parent.parent
WORK = ROOT / "runs" / "prove"
FINGERPRINT = "proof.json"


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


def fresh(folder: Path) -> Path:
    """An absent folder to run into."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def fingerprint(files: Sequence[Path]) -> dict[str, Any]:
    """What a run depends on: the package's code, the given files (recipe, data, model), and the libraries."""
    code = hashlib.sha256()
    for path in sorted((ROOT / "qlora_train").rglob("*.py")):
        code.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    inputs = {path.name + str(index): hashlib.sha256(path.read_bytes()).hexdigest() for index, path in enumerate(files)}
    return {"code": code.hexdigest(), "inputs": inputs, "versions": versions()}


def earlier(folder: Path, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """The result of an earlier run whose fingerprint is the wanted one and whose adapter verifies; else None."""
    from qlora_train.artifacts import manifest_faults

    try:
        stored = json.loads((folder / FINGERPRINT).read_text(encoding="utf-8"))
        if stored != wanted or manifest_faults(folder / "adapter"):
            return None
        result: dict[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return result


def remember(folder: Path, print_: dict[str, Any]) -> None:
    """Write beside a finished run what it depended on."""
    (folder / FINGERPRINT).write_text(json.dumps(print_, indent=1), encoding="utf-8")
