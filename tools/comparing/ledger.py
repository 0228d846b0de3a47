"""What was measured, one JSON line for each run, so that an interrupted comparison goes on where it was.

A line counts for a run when settings, rows and code are the same; the code is that of the parts that decide what a run
computes. Of several lines the last counts. The comparison takes hours: what its table is made of is kept beside the
figures (KEPT), so that another checkout on another day can go on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "qlora_train"
KEPT = ROOT / "tools" / "figures" / "compare-ledger.jsonl"
# What decides the figures of a run. Reports, pages and the command line do not.
PARTS = (
    *("adapters", "data", "evaluate", "export", "kernels", "loss.py", "model", "quant", "seeds.py", "train"),
    *("recipe/methods.py", "recipe/schema.py"),  # what a method is, and the defaults of keys that are not given
)


@cache
def code_digest() -> str:
    """One hash over the parts of the package that decide what a run computes."""
    digest = hashlib.sha256()
    for part in PARTS:
        path = PACKAGE / part
        for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
            digest.update(file.relative_to(PACKAGE).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


@cache
def machine_words() -> str:
    """What a run was made on, in brief."""
    from qlora_train.environment import environment, processor_text

    found = environment()
    return f"{', '.join(found['cuda_devices']) or processor_text(found)}, torch {found['versions']['torch']}"


@dataclass(frozen=True)
class Entry:
    """One run: what it was asked for, and what came of it. `failed` says why there is no result."""

    settings: Mapping[str, Any]
    code: str
    result: Mapping[str, Any] | None = None
    failed: str | None = None
    machine: str = ""

    @property
    def is_settled(self) -> bool:
        """Whether another try would come to the same; crashes, slow runs and full disks may have been mended."""
        crashed = "crashed" in (self.result or {}).get("export", {})
        return not crashed and (self.failed is None or self.failed.startswith(("diverged", "refused")))


@dataclass
class Ledger:
    """The lines of a file, after those of `kept`, which are only read. `any_code`: also of other states of the code."""

    path: Path
    any_code: bool = False
    kept: Path | None = None
    _entries: list[Entry] = field(default_factory=list)

    def __post_init__(self) -> None:
        for path in (self.kept, self.path):
            for line in path.read_text(encoding="utf-8").splitlines() if path and path.is_file() else ():
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

        failed = failed.replace(f"{ROOT}/", "")
        plain = None if result is None else _plain(result)
        entry = Entry(_plain(settings), code_digest(), plain, failed or None, machine_words())
        self.path.parent.mkdir(parents=True, exist_ok=True)
        append_json_line(self.path, entry.__dict__)
        self._entries.append(entry)
        return entry

    def keep(self, scale: str) -> int:
        """Write the runs of a scale, the last line of each that counts, into `kept`; how many there are."""
        assert self.kept is not None
        found: dict[str, Entry] = {}
        for entry in self._entries:
            is_counted = self.any_code or entry.code == code_digest()
            if is_counted and entry.is_settled and entry.settings["scale"]["name"] == scale:
                found[json.dumps(entry.settings, sort_keys=True)] = entry
        lines = [json.dumps(found[key].__dict__) for key in sorted(found)]
        self.kept.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return len(lines)

    def sources(self, entries: Iterable[Entry]) -> list[str]:
        """The machines, and in how many states of the code, that some runs were made with."""
        used = [entry for entry in entries if entry.code]
        codes = len({entry.code for entry in used})
        machines = sorted({entry.machine for entry in used if entry.machine})
        return [*machines, f"{codes} states of the code"] if codes > 1 else machines


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives it back: tuples are lists."""
    plain: dict[str, Any] = json.loads(json.dumps(values))
    return plain
