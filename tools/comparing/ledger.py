"""What was measured, one JSON line for each run, so that an interrupted comparison goes on where it was.

A line counts for a run when settings, rows and code are the same; the code is that of the parts that decide what a run
computes. Of several lines the last counts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[2] / "qlora_train"
# What decides the figures of a run. Reports, pages and the command line do not.
PARTS = ("adapters", "data", "evaluate", "export", "kernels", "loss.py", "model", "quant", "seeds.py", "train")


@cache
def code_digest() -> str:
    """One hash over the parts of the package that decide what a run computes."""
    digest = hashlib.sha256()
    for part in PARTS:
        path = PACKAGE / part
        for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
            digest.update(file.relative_to(PACKAGE).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Entry:
    """One run: what it was asked for, and what came of it. `failed` says why there is no result."""

    settings: Mapping[str, Any]
    code: str
    result: Mapping[str, Any] | None = None
    failed: str | None = None

    @property
    def is_settled(self) -> bool:
        """Whether another try would come to the same; crashes, slow runs and full disks may have been mended."""
        crashed = "crashed" in (self.result or {}).get("export", {})
        return not crashed and (self.failed is None or self.failed.startswith(("diverged", "refused")))


@dataclass
class Ledger:
    """The lines of a file. `any_code`: take lines of other states of the code too."""

    path: Path
    any_code: bool = False
    _entries: list[Entry] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.path.is_file():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    self._entries.append(Entry(**json.loads(line)))
                except (ValueError, TypeError):
                    continue  # torn by a killed process: that run is made again

    def find(self, settings: Mapping[str, Any]) -> Entry | None:
        """The last line of a run; None where it is still to be made."""
        wanted = _plain(settings)
        for entry in reversed(self._entries):
            if entry.settings == wanted and (self.any_code or entry.code == code_digest()):
                return entry
        return None

    def add(self, settings: Mapping[str, Any], *, result: Mapping[str, Any] | None = None, failed: str = "") -> Entry:
        """Write a line; it is on disk when this returns."""
        from qlora_train.artifacts.files import append_json_line

        entry = Entry(_plain(settings), code_digest(), None if result is None else _plain(result), failed or None)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        append_json_line(self.path, entry.__dict__)
        self._entries.append(entry)
        return entry


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives it back: tuples are lists."""
    plain: dict[str, Any] = json.loads(json.dumps(values))
    return plain
