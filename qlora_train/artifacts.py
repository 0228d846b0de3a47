"""The run folder: its layout, its lock, and writes that are either whole or absent."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import pwd
import re
import secrets
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError

from qlora_train.errors import MachineError

MANIFEST = "MANIFEST.json"
SCHEMA_VERSION = 2
TEMPORARY_PREFIX = ".tmp-"  # not published yet
TRASH_PREFIX = ".trash-"  # no longer published
REPLACED_PREFIX = ".old-"  # the former holder of a name, until the new one has it

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
# How a file system that cannot sync folders (some over FUSE and SMB) says so; there is nothing to be done about it.
_NO_FOLDER_SYNC = frozenset({errno.EINVAL, errno.ENOTSUP, errno.ENOSYS})


@dataclass(frozen=True)
class RunDir:
    """The names inside a run folder. Every path of a run is asked for here."""

    root: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe, with the origin of every value."""
        return self.root / "recipe.resolved.yaml"

    @property
    def environment(self) -> Path:
        """Versions, device and threads."""
        return self.root / "environment.json"

    @property
    def base(self) -> Path:
        """Fingerprint of the base and the table of what was quantised."""
        return self.root / "base.json"

    @property
    def data(self) -> Path:
        """The account of the data: counts, sources, duplicates, packing."""
        return self.root / "data.json"

    @property
    def fates(self) -> Path:
        """One JSON line for each row that is not trained on whole, with the reason."""
        return self.root / "fates.jsonl"

    @property
    def rejected(self) -> Path:
        """The rows that `data.bad_rows: skip` left out, as they were written, with the reason."""
        return self.root / "rejected.jsonl"

    @property
    def audit_page(self) -> Path:
        """The account of the data as a page to read."""
        return self.root / "audit.html"

    @property
    def metrics(self) -> Path:
        """One JSON line per logged step or evaluation."""
        return self.root / "metrics.jsonl"

    @property
    def trackers(self) -> Path:
        """Folder of what trackers (run.trackers) keep on this machine."""
        return self.root / "trackers"

    @property
    def chat_template(self) -> Path:
        """The chat template that the rows were rendered with, where there is one."""
        return self.root / "chat_template.jinja"

    @property
    def evaluation(self) -> Path:
        """Base against adapter on held-out rows."""
        return self.root / "eval.json"

    @property
    def memory(self) -> Path:
        """What the run planned to hold in memory, and what it held: train/memory.py says how it is laid out."""
        return self.root / "memory.json"

    @property
    def summary(self) -> Path:
        """What came of the run; written last: its presence says that the run is complete."""
        return self.root / "run.json"

    @property
    def exports(self) -> Path:
        """One JSON line per export: what was merged, and the verdict."""
        return self.root / "exports.jsonl"

    @property
    def report_page(self) -> Path:
        """The run as a page to read."""
        return self.root / "report.html"

    @property
    def checkpoints(self) -> Path:
        """Folder of `step-000012` folders."""
        return self.root / "ckpt"

    @property
    def adapter(self) -> Path:
        """The adapter that export, eval and chat use, in PEFT's format: the best by held-out loss, else the last."""
        return self.root / "adapter"

    @property
    def resumes(self) -> Path:
        """One JSON line each time that the run went on: from where, and what was not as before."""
        return self.root / "resumes.jsonl"

    @property
    def errors(self) -> Path:
        """One JSON line for each error that ended a process which held the folder."""
        return self.root / "errors.jsonl"

    @property
    def flights(self) -> Path:
        """Folder of `step-000012` folders: what is known of steps that came to no finite number."""
        return self.root / "flight"

    @property
    def lock(self) -> Path:
        """Held while a process writes to the folder."""
        return self.root / ".lock"

    def facts(self) -> tuple[Path, ...]:
        """What a run writes before its first checkpoint, and writes anew when it starts again."""
        return (
            *(self.recipe, self.environment, self.base, self.evaluation, self.metrics, self.memory),
            *(self.data, self.fates, self.rejected, self.audit_page, self.errors, self.flights),
            *(self.chat_template, self.checkpoints, self.trackers, self.report_page, self.lock),
        )


def cache_dir() -> Path:
    """QLORA_TRAIN_CACHE, else the XDG cache, else a folder of this user under the temporary directory."""
    if explicit := os.environ.get("QLORA_TRAIN_CACHE"):
        return Path(explicit)
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg) / "qlora_train"
    try:
        return Path.home() / ".cache" / "qlora_train"
    except RuntimeError:  # no HOME and no entry in the user database
        return Path(tempfile.gettempdir()) / f"qlora_train-{os.getuid()}"


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


def make_folder(folder: Path) -> None:
    """A folder and those above it, each durable as an entry of the one above."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for made in missing:
        fsync_dir(made.parent)


@contextlib.contextmanager
def _appearing(path: Path) -> Iterator[BinaryIO]:
    """A file that appears whole or not at all: temporary name beside it, fsync, rename, fsync of the folder."""
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with explained(path):
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
    with _appearing(path) as file:
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
    with explained(path), path.open("a+b", buffering=0) as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else b"\n" + line
        file.write(line)
        os.fsync(file.fileno())


def write_json(path: Path, value: Any) -> None:
    """Write plain data as indented JSON; a number that is not finite is our bug and raises ValueError."""
    write_file(path, _json_bytes(value))


def _json_bytes(value: Any) -> bytes:
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
    """Turn an error of writing `path` into a MachineError: what, where, and bytes needed and free on a full disk.

    safetensors hides the number of an OSError in its message; it is found there.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = _errno(error)
        if number is None and isinstance(error, SafetensorError):
            raise
        reason = os.strerror(number) if number is not None else str(error)
        raise MachineError(
            f"cannot write {path}: {reason}{_circumstances(path, number, num_bytes)}",
            fix=f"{_FIXES.get(number or 0, 'choose another folder')}; what was complete before is untouched",
        ) from error


def is_full(error: MachineError) -> bool:
    """Whether a write failed because there was no room, which may come back."""
    cause = error.__cause__
    return isinstance(cause, OSError | SafetensorError) and _errno(cause) in _NO_ROOM


def _errno(error: OSError | SafetensorError) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found.group(1)) if found else None


def _circumstances(path: Path, number: int | None, num_bytes: int | None) -> str:
    """In brackets: who may write there, or how much room is needed and left, where that is the question."""
    folder = next((p for p in [path, *path.absolute().parents] if p.exists()), Path("/"))
    if number in (errno.EACCES, errno.EPERM):
        found = folder.stat()
        return f" ({folder} is {stat.filemode(found.st_mode)} of {_user(found.st_uid)}; this process runs as {_user()})"
    needed = "" if num_bytes is None else f"{num_bytes / 2**20:,.1f} MiB needed, "
    return f" ({needed}{shutil.disk_usage(folder).free / 2**20:,.0f} MiB free)" if number in _NO_ROOM else ""


def _user(number: int | None = None) -> str:
    number = os.geteuid() if number is None else number
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"uid {number}"


@contextlib.contextmanager
def publishing(
    target: Path, *, manifest: Mapping[str, Any], num_bytes: int | None = None, replace: bool = False
) -> Iterator[Path]:
    """A folder that appears whole or not at all: fill the yielded temporary folder; leaving the block publishes it.

    On leaving: every file is fsynced, MANIFEST.json (`manifest`, sizes, SHA-256, and one of its own) is written last,
    the folders are fsynced, the temporary one is renamed to `target`, and the parent fsynced. With `replace`, a former
    `target` is deleted after that; a process killed in between leaves one of the two, once `sweep` has run. On an
    exception the temporary folder is removed; that of a killed process by the next that publishes under this name.
    `num_bytes`: what will be written, for a full disk's message. Killed at each call by tests/faults/test_kill_save.py.
    """
    with explained(target, num_bytes=num_bytes):
        make_folder(target.parent)
        _sweep_unfinished(target)
        temporary = target.parent / f"{TEMPORARY_PREFIX}{target.name}-{os.getpid()}-{secrets.token_hex(4)}"
        temporary.mkdir()
    try:
        with explained(target, num_bytes=num_bytes), _held(temporary):
            yield temporary
            files = _synced_files(temporary)
            write_json(temporary / MANIFEST, _sealed({"schema": SCHEMA_VERSION, **manifest, "files": files}))
            for folder in temporary.rglob("*/"):
                fsync_dir(folder)
            fsync_dir(temporary)
            _take_name(temporary, target, replace=replace)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Lock a folder while a process works in it, if nobody else does; whether it could be. The kernel frees it."""
    descriptor, held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY), False
    try:
        with contextlib.suppress(OSError):  # somebody works in it, or the file system has no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
        yield held
    finally:
        os.close(descriptor)


def _sweep_unfinished(target: Path) -> None:
    """Remove the temporary folders of `target` in which no process works any more."""
    for folder in target.parent.glob(f"{TEMPORARY_PREFIX}{glob.escape(target.name)}-[0-9]*-????????"):
        _remove_idle(folder)


def _remove_idle(folder: Path) -> None:
    """Remove a folder, unless a process works in it."""
    with contextlib.suppress(OSError), _held(folder) as held:
        if held:
            shutil.rmtree(folder, ignore_errors=True)


def _synced_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file in a folder, each of them on disk."""
    entries = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
        entries[file.relative_to(folder).as_posix()] = {"bytes": file.stat().st_size, "sha256": digest}
    return entries


def _sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest with the SHA-256 of all that it says."""
    said = json.loads(json.dumps({name: value for name, value in manifest.items() if name != "sha256"}))
    text = json.dumps(said, sort_keys=True, separators=(",", ":"))
    return {**said, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def _take_name(temporary: Path, target: Path, *, replace: bool) -> None:
    """Rename a finished folder to `target`, and delete the one that had this name."""
    former = target.with_name(f"{REPLACED_PREFIX}{target.name}")
    replaced = replace and target.exists()
    if replaced:
        shutil.rmtree(former, ignore_errors=True)  # that of a killed replacement: a name's holder takes its place
        target.rename(former)
    try:
        temporary.rename(target)
    except OSError:
        if replaced:
            former.rename(target)
        raise
    fsync_dir(target.parent)
    if replaced:
        shutil.rmtree(former, ignore_errors=True)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a published folder; ValueError when it is not as it was written, OSError when it is not there."""
    content = (folder / MANIFEST).read_bytes()
    manifest = json.loads(content)
    if not isinstance(manifest, dict) or "schema" not in manifest:
        raise ValueError("not a manifest")
    if manifest["schema"] != SCHEMA_VERSION:
        raise ValueError(f"schema {manifest['schema']}, this build knows {SCHEMA_VERSION}")
    if content != _json_bytes(_sealed(manifest)):
        raise ValueError("changed since it was written: its own SHA-256 does not match")
    return manifest


def manifest_faults(folder: Path) -> list[str]:
    """Why a published folder is not what its manifest says; empty when every byte verifies."""
    try:
        files: dict[str, dict[str, Any]] = read_manifest(folder)["files"]
        expected = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
        present = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - {MANIFEST}
    except FileNotFoundError:
        return [f"{MANIFEST}: missing"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return [f"{MANIFEST}: {error}"]
    faults = [f"{name}: not in {MANIFEST}" for name in sorted(present - set(expected))]
    for name, (num_bytes, digest) in sorted(expected.items()):
        path = folder / name
        try:
            if name not in present or path.is_symlink():
                faults.append(f"{name}: missing")
            elif path.stat().st_size != num_bytes:
                faults.append(f"{name}: {path.stat().st_size:,} of {num_bytes:,} bytes")
            elif sha256_file(path) != digest:
                faults.append(f"{name}: SHA-256 mismatch")
        except OSError as error:
            faults.append(f"{name}: {error.strerror}")
    return faults


def retire(folder: Path) -> None:
    """Delete a published folder so that no reader can meet half of it: rename first, then remove.

    Raises MachineError when it cannot be renamed; what cannot be removed then is left to `sweep`.
    """
    trash = folder.with_name(f"{TRASH_PREFIX}{folder.name}-{secrets.token_hex(4)}")
    with explained(folder):
        folder.rename(trash)
        fsync_dir(folder.parent)
    shutil.rmtree(trash, ignore_errors=True)


def is_leftover(name: str) -> bool:
    """Whether a name is one that only an interrupted write leaves behind."""
    return name.startswith((TEMPORARY_PREFIX, TRASH_PREFIX, REPLACED_PREFIX))


def sweep(folder: Path) -> None:
    """Holding the run's lock: remove what the killed left behind; a replaced folder without successor is put back."""
    for leftover in sorted(path for path in folder.glob(".*") if is_leftover(path.name)):
        name = leftover.name.removeprefix(REPLACED_PREFIX)
        if name != leftover.name and not (folder / name).exists():
            leftover.rename(folder / name)
        elif leftover.is_dir():
            _remove_idle(leftover)
        else:
            leftover.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(run_dir: RunDir) -> Iterator[None]:
    """Hold the run folder for this process; MachineError names the holder. The kernel frees it when a process dies."""
    with explained(run_dir.lock):
        make_folder(run_dir.root)
        handle = run_dir.lock.open("a+")
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            handle.seek(0)
            raise MachineError(
                f"{run_dir.root} is in use by {handle.read().strip() or 'another process'}",
                fix="wait for it, stop it, or choose another run.dir",
            ) from error
        except OSError as error:
            raise MachineError(
                f"cannot lock {run_dir.root}: {error.strerror}; two runs in it would spoil each other",
                fix="choose a folder on a file system with locks (NFS: mount it with them)",
            ) from error
        with explained(run_dir.lock):
            handle.truncate(0)
            handle.write(f"pid {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
            handle.flush()
        yield
