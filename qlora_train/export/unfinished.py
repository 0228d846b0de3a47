"""Shards that a killed merge had finished: kept beside the target, taken over by the next that would write the same."""

from __future__ import annotations

import fcntl
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qlora_train.artifacts.files import TEMPORARY_PREFIX, explained, make_folder, read_json, sha256_file, write_json
from qlora_train.errors import MachineError, ModelError, RecipeError

_LOCK = "lock"


class FinishedShards:
    """A hidden folder of shards, each with a file beside it that says what it is; that file is written last."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.num_taken_over = 0

    def take_over(self, name: str, key: Mapping[str, Any]) -> list[dict[str, Any]] | None:
        """The rows that were noted with a shard, if one of that name is whole and would be written again as it is.

        `key` holds whatever the bytes of a shard depend on.
        """
        note = self._note(name)
        if not note.is_file():
            return None
        try:
            noted = read_json(note)
            same = noted["key"] == dict(key) and sha256_file(self.folder / name) == noted["sha256"]
            rows: list[dict[str, Any]] = noted["rows"]
        except (MachineError, OSError, KeyError, TypeError):
            return None
        if same:
            self.num_taken_over += 1
        return rows if same else None

    def finish(self, name: str, key: Mapping[str, Any], sha256: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Say that a shard is whole."""
        write_json(self._note(name), {"key": dict(key), "sha256": sha256, "rows": [dict(row) for row in rows]})

    def _note(self, name: str) -> Path:
        return self.folder / f"{name}.json"


def shards_folder(target: Path) -> Path:
    """Where the finished shards of an export to `target` are."""
    return target.parent / f"{TEMPORARY_PREFIX}{target.name}-shards"


@contextmanager
def finished_shards(target: Path) -> Iterator[FinishedShards]:
    """The folder of finished shards of an export to `target`, for one process at a time.

    It goes when the block ends, or finds the result wrong. What was killed, stopped, or found no room or memory leaves
    it, and what a killed one left under other temporary names of this target goes. MachineError while another process
    exports there.
    """
    folder = shards_folder(target)
    with explained(target):
        make_folder(folder)
        handle = (folder / _LOCK).open("a")
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise MachineError(f"another process exports to {target}", fix="wait for it, or name another") from error
        except OSError:
            pass  # a file system without locks: two exports to one target would each take over from the other
        _sweep(target)
        try:
            yield FinishedShards(folder)
        except (ModelError, RecipeError):
            shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(target: Path) -> None:
    """Remove the folder of a killed export to this very target (`artifacts.folders.publishing` names it)."""
    abandoned = re.compile(re.escape(f"{TEMPORARY_PREFIX}{target.name}") + r"-\d+-[0-9a-f]{8}")
    for path in target.parent.iterdir():
        if abandoned.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)
