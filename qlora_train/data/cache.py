"""Tables of tokens kept between runs, by everything that decides what is in them."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
import weakref
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa

from qlora_train.artifacts.files import explained
from qlora_train.artifacts.folders import manifest_faults, publishing, retire
from qlora_train.artifacts.layout import cache_dir
from qlora_train.data.build import FACTS, FAULTS, TOKENS, Facts, Reading, build
from qlora_train.data.encode import Encoder
from qlora_train.data.sources.base import Source
from qlora_train.data.table import Encode, TokenTable
from qlora_train.environment import code_sha256, versions
from qlora_train.errors import MachineError

LIMIT_ENVIRONMENT, DEFAULT_LIMIT_GIB = "QLORA_TRAIN_CACHE_GIB", "50"
_ABANDONED_S = 24 * 3600
_LIBRARIES = ("tokenizers", "transformers", "jinja2", "pyarrow")


@dataclass(frozen=True, eq=False)
class CachedSource:
    """One source's folder in the cache. Everything in it verified against its manifest when it was opened."""

    source: Source
    reading: Reading
    folder: Path
    facts: Facts
    digest: str  # of the source's content
    lock: TextIO  # shared, held as long as this object lives: nobody removes the folder

    def table(self, encode: Encode | None = None) -> TokenTable:
        """The tokens of its rows, memory-mapped."""
        with pa.memory_map(str(self.folder / TOKENS)) as file:
            table = pa.ipc.open_file(file).read_all()
        return TokenTable(table, [self.source.place], self.facts.digest, encode=encode)

    def faults(self) -> Iterator[dict[str, Any]]:
        """Rows that did not become tokens: number, kind, what, fix, num_tokens, num_chars, row."""
        with (self.folder / FAULTS).open(encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)


def cached(source: Source, reading: Reading, encoder: Encoder) -> CachedSource:
    """The source's table, from the cache where its content, tokenizer, template, reading and our code are the same."""
    limit_gib, digest, library_versions = _limit_gib(), source.digest(), versions()
    parts = [
        source.kind,
        digest,
        asdict(reading),
        encoder.fingerprint,
        code_sha256("data"),
        [library_versions[name] for name in _LIBRARIES],
    ]
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
    folder = cache_dir() / "data" / key
    lock = _open_lock(folder, "lock")
    _take(lock, fcntl.LOCK_SH)  # held while the table is in use: nobody removes the folder
    with _open_lock(folder, "build") as building:
        _take(building, fcntl.LOCK_EX)  # another process that makes the same table is waited for
        if folder.is_dir() and manifest_faults(folder):
            retire(folder)  # a disk fault, or a hand in the cache: make it again
        if not folder.is_dir():
            with publishing(folder, manifest={"source": source.name}) as temporary:
                build(source, reading, encoder, temporary)
    with contextlib.suppress(OSError):  # a cache that others own too
        os.utime(folder)
    facts = Facts(**json.loads((folder / FACTS).read_text(encoding="utf-8")))
    with contextlib.suppress(MachineError, OSError):  # of others, or removed by another process: no reason to stop
        _shrink(folder.parent, limit_gib * 2**30)
    opened = CachedSource(source, reading, folder, facts, digest, lock)
    weakref.finalize(opened, lock.close)
    return opened


def _open_lock(folder: Path, name: str) -> TextIO:
    """A lock of a folder, open; it lies beside it, so that it is there before and after the folder."""
    path = folder.with_name(f"{folder.name}.{name}")
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("a")


def _take(lock: TextIO, how: int) -> None:
    try:
        fcntl.flock(lock, how)
    except OSError as error:
        raise MachineError(
            f"cannot lock {lock.name}: {error.strerror}",
            fix="set QLORA_TRAIN_CACHE to a folder on a file system with locks",
        ) from error


def _limit_gib() -> float:
    written = os.environ.get(LIMIT_ENVIRONMENT, DEFAULT_LIMIT_GIB)
    try:
        limit = float(written)
    except ValueError:
        limit = -1.0
    if not limit >= 0:
        raise MachineError(f"{LIMIT_ENVIRONMENT} is {written!r}, not a number of GiB", fix="give a number, such as 50")
    return limit


def _shrink(parent: Path, limit_bytes: float) -> None:
    """Remove the folders that were not used for longest until the cache is below its limit; none that is in use.

    What a killed process left half-made counts too: it has a temporary name, and goes first when it is a day old.
    """
    found: list[tuple[float, int, Path]] = []
    for folder in parent.iterdir():
        with contextlib.suppress(OSError):  # removed by another process in this moment
            if folder.is_dir():
                num_bytes = sum(path.stat().st_size for path in folder.iterdir())
                found.append((folder.stat().st_mtime, num_bytes, folder))
    total = sum(num_bytes for _, num_bytes, _ in found)
    for used_at, num_bytes, folder in sorted(found):
        if folder.name.startswith("."):
            if time.time() - used_at > _ABANDONED_S:
                shutil.rmtree(folder, ignore_errors=True)
        elif total > limit_bytes:
            with _open_lock(folder, "lock") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue  # in use
                retire(folder)
                total -= num_bytes
