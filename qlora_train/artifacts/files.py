"""Files that are either whole or absent, and errors of writing that say what, where, and what to do."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import pwd
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError

from qlora_train.errors import MachineError
from qlora_train.units import size_text

TEMPORARY_PREFIX = ".tmp-"  # not published yet

# What to do about a failed write, by errno.
_FIXES = {
    errno.ENOSPC: "free space there, or choose a folder on another disk",
    errno.EDQUOT: "free space within your quota there, or choose a folder on another disk",
    errno.EFBIG: "raise the limit on the size of files (`ulimit -f unlimited`), or choose another file system",
    errno.EROFS: "mount the file system writable, or choose another folder",
    errno.EACCES: "change the permissions, or choose another folder",
    errno.EPERM: "change the permissions, or choose another folder",
    errno.EIO: "the disk or the way to it fails: see the system's log (`dmesg`), and choose another disk",
}
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})
_OF_SIZE = _NO_ROOM | {errno.EFBIG, errno.EIO}  # a smaller file might have been written
# How a file system that cannot sync folders (some over FUSE and SMB) says so; there is nothing to be done about it.
_NO_FOLDER_SYNC = frozenset({errno.EINVAL, errno.ENOTSUP, errno.ENOSYS})


def fsync_dir(folder: Path) -> None:
    """Make the entries of a folder durable, where its file system can."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)


def fsync_file(path: Path) -> None:
    """Put the content of a file on disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def make_folder(folder: Path) -> None:
    """A folder and those above it, each durable as an entry of the one above."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for made in missing:
        fsync_dir(made.parent)


@contextlib.contextmanager
def _appearing(path: Path, *, num_bytes: int | None = None) -> Iterator[BinaryIO]:
    """A file that appears whole or not at all: temporary name beside it, fsync, rename, fsync of the folder."""
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with explained(path, num_bytes=num_bytes):
            with temporary.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            fsync_dir(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_file(path: Path, content: bytes) -> None:
    """Write one file whole."""
    with _appearing(path, num_bytes=len(content)) as file:
        file.write(content)


def write_json_lines(path: Path, entries: Iterable[Mapping[str, Any]]) -> None:
    """Write plain data as a JSON line each, one at a time; the file appears whole or not at all."""
    with _appearing(path) as file:
        for entry in entries:
            # A lone surrogate of a rejected row cannot be UTF-8; as an escape it is what its file held.
            file.write((json.dumps(entry, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))


def append_json_line(path: Path, value: Mapping[str, Any]) -> None:
    """Add a line of plain data to a file, on disk when this returns; a torn last line of a killed process is ended."""
    line = (json.dumps(value) + "\n").encode()
    with explained(path, num_bytes=len(line)), path.open("a+b", buffering=0) as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else b"\n" + line
        file.write(line)
        os.fsync(file.fileno())


def write_json(path: Path, value: Any) -> None:
    """Write plain data as indented JSON; a number that is not finite is our bug and raises ValueError."""
    write_file(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """The form in which JSON is written here; ValueError for a number that is not finite."""
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def read_json(path: Path) -> Any:
    """The content of a JSON file that we wrote. A missing or damaged file is a MachineError naming it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MachineError(f"cannot read {path}: {error}", fix="check that this is a complete run folder") from error


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def explained(path: Path, *, num_bytes: int | None = None) -> Iterator[None]:
    """Turn an error of writing `path` into a MachineError: what, where, bytes needed, and bytes free on a full disk."""
    try:
        yield
    except Exception as error:
        number = _errno(error)
        if number is None and not isinstance(error, OSError):
            raise
        reason = os.strerror(number) if number is not None else str(error)
        raise MachineError(
            f"cannot write {path}: {reason}{_circumstances(path, number, num_bytes)}",
            fix=f"{_FIXES.get(number or 0, 'choose another folder')}; what was complete before is untouched",
        ) from error


@contextlib.contextmanager
def legible(path: Path) -> Iterator[None]:
    """Turn an error of reading `path` into a MachineError, unless no file is there: who reads it knows what that means.

    What the machine does not hand out is not damaged by that, and may be whole tomorrow.
    """
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise
    except OSError as error:
        raise MachineError(
            f"cannot read {path}: {error.strerror or error}{_circumstances(path, error.errno, None)}",
            fix="see to the disk (`dmesg`), the way to it, or who may read there, and try again; nothing was changed",
        ) from error


def is_full(error: MachineError) -> bool:
    """Whether a write failed because there was no room, which may come back."""
    return _errno(error.__cause__) in _NO_ROOM


def _errno(error: BaseException | None) -> int | None:
    """The number of a failed call; None for another error.

    safetensors and tokenizers (0.8 and 0.23) tell of it in their text alone, and what tokenizers raises has no class.
    """
    if isinstance(error, OSError):
        return error.errno
    is_of_rust = isinstance(error, SafetensorError) or type(error) is Exception
    found = re.search(r"\(os error (\d+)\)", str(error)) if is_of_rust else None
    return int(found.group(1)) if found else None


def _circumstances(path: Path, number: int | None, num_bytes: int | None) -> str:
    """In brackets: who may write there, or how much was to be written, and how much room a full disk has left.

    Room on the disk says nothing of a quota.
    """
    # Not Path.exists, which raises where a folder may not be entered or a name is too long.
    folder = next((p for p in [path, *path.absolute().parents] if os.access(p, os.F_OK)), Path("/"))
    if number in (errno.EACCES, errno.EPERM):
        found = folder.stat()
        return f" ({folder} is {stat.filemode(found.st_mode)} of {_user(found.st_uid)}; this process runs as {_user()})"
    known = []
    if number in _OF_SIZE and num_bytes is not None:
        known.append(f"{size_text(max(num_bytes, 2**10))} needed")
    if number == errno.ENOSPC:
        known.append(f"{shutil.disk_usage(folder).free / 2**20:,.0f} MiB free")
    return f" ({', '.join(known)})" if known else ""


def _user(number: int | None = None) -> str:
    number = os.geteuid() if number is None else number
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"uid {number}"
