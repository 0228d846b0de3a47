"""A file of rows on disk: opened, hashed, known to be the same as at first use, and its faults in our words."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from qlora_train.data.problems import SourceFault
from qlora_train.errors import MachineError

_CHUNK_BYTES = 2**20


@contextmanager
def system_errors(path: Path) -> Iterator[None]:
    """What the operating system refuses, as MachineError with the file's name."""
    try:
        yield
    except OSError as error:
        fix = "give this user the right to read it" if isinstance(error, PermissionError) else "check the path and disk"
        raise MachineError(f"cannot be read: {error.strerror or error}", fix=fix, where=str(path)) from error


class DataFile:
    """One file that is opened again and again, and must not change meanwhile."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: tuple[int, int] | None = None

    @contextmanager
    def opened(self) -> Iterator[BinaryIO]:
        """The open file. Do nothing but read inside: every OSError is taken for this file's."""
        with system_errors(self.path), self.path.open("rb") as file:
            status = os.fstat(file.fileno())
            self._check(status.st_size, status.st_mtime_ns)
            yield file

    def check_unchanged(self) -> None:
        """SourceFault if the file is not what it was at first use."""
        with system_errors(self.path):
            status = self.path.stat()
        self._check(status.st_size, status.st_mtime_ns)

    def _check(self, *seen: int) -> None:
        if self._seen is None:
            self._seen = seen[0], seen[1]
        elif self._seen != seen:
            what = f"has changed since it was first read: {self._seen[0]:,} bytes then, {seen[0]:,} now"
            raise SourceFault(what, "start again, and leave the file as it is meanwhile")


class TextFile:
    """What all sources of one text file do alike."""

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self._path = str(path)
        self._file = DataFile(path)

    def place(self, number: int) -> str:
        return f"{self._path}:{number}"

    def digest(self) -> str:
        return digest_of([self._file])


def digest_of(files: Sequence[DataFile], with_names: bool = False) -> str:
    """SHA-256 of the bytes; of several files, of their names (unless alone) and the SHA-256 of each."""
    digests = []
    for data_file in files:
        digest = hashlib.sha256()
        with data_file.opened() as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
        digests.append(digest.hexdigest())
    if not with_names:
        return digests[0]
    lines = (f"{digest}  {data_file.path.name}\n" for data_file, digest in zip(files, digests, strict=True))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def no_rows() -> SourceFault:
    """The fault of a source in which nothing stands."""
    return SourceFault("holds no rows", "fill the file, or take it out of the recipe")


def gone(locator: int) -> SourceFault:
    """The fault of a place where there is no row any more."""
    return SourceFault(f"no row stands at {locator:,} any more", "start again, and leave the data as it is meanwhile")
