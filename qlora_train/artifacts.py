"""The run folder: its layout, its lock, and writes that are either whole or absent."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from qlora_train.errors import MachineError

MANIFEST = "MANIFEST.json"
SCHEMA_VERSION = 1
TEMPORARY_PREFIX = ".tmp-"
TRASH_PREFIX = ".trash-"


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
    def chat_template(self) -> Path:
        """The chat template that the rows were rendered with, where there is one."""
        return self.root / "chat_template.jinja"

    @property
    def evaluation(self) -> Path:
        """Base against adapter on held-out rows."""
        return self.root / "eval.json"

    @property
    def summary(self) -> Path:
        """What came of the run; written last: its presence says that the run is complete."""
        return self.root / "run.json"

    @property
    def checkpoints(self) -> Path:
        """Folder of `step-000012` folders."""
        return self.root / "ckpt"

    @property
    def adapter(self) -> Path:
        """The adapter that export, eval and chat use, in PEFT's format: the best by held-out loss, else the last."""
        return self.root / "adapter"

    @property
    def lock(self) -> Path:
        """Held while a process writes to the folder."""
        return self.root / ".lock"

    def facts(self) -> tuple[Path, ...]:
        """What a run writes before its first checkpoint, and writes anew when it starts again."""
        return (
            *(self.recipe, self.environment, self.base, self.evaluation, self.metrics),
            *(self.data, self.fates, self.rejected, self.audit_page),
            *(self.chat_template, self.checkpoints, self.lock),
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
    """Make the entries of a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


def write_json(path: Path, value: Any) -> None:
    """Write plain data as indented JSON; a number that is not finite is our bug and raises ValueError."""
    write_file(path, (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """The content of a JSON file that we wrote. A missing or damaged file is a MachineError naming it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MachineError(
            f"cannot read {path}: {error}", fix="check that the folder is a complete run folder"
        ) from error


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn an OSError of writing `path` into a MachineError that says what, where, and how much room is left."""
    try:
        yield
    except OSError as error:
        folder = next(p for p in [path, *path.parents] if p.exists())
        free_mib = shutil.disk_usage(folder).free / 2**20
        raise MachineError(
            f"cannot write {path}: {error.strerror or error} ({free_mib:,.0f} MiB free)",
            fix="free space or choose another folder; what was complete before is untouched",
        ) from error


@contextlib.contextmanager
def publishing(target: Path, *, manifest: dict[str, Any]) -> Iterator[Path]:
    """A folder that appears whole or not at all: fill the yielded temporary folder; leaving the block publishes it.

    On leaving: every file is fsynced, MANIFEST.json (sizes, SHA-256, and `manifest`) is written last, the folder is
    fsynced, renamed to `target`, and the parent fsynced. On an exception the temporary folder is removed.
    """
    with explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.parent / f"{TEMPORARY_PREFIX}{target.name}-{os.getpid()}-{secrets.token_hex(4)}"
        temporary.mkdir()
    try:
        with explained(target):
            yield temporary
            files = sorted(p for p in temporary.rglob("*") if p.is_file())
            entries = {}
            for file in files:
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
                    digest = hashlib.file_digest(handle, "sha256").hexdigest()
                entries[file.relative_to(temporary).as_posix()] = {"bytes": file.stat().st_size, "sha256": digest}
            write_json(temporary / MANIFEST, {"schema": SCHEMA_VERSION, **manifest, "files": entries})
            temporary.rename(target)
            fsync_dir(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def manifest_faults(folder: Path) -> list[str]:
    """Why a published folder is not what its manifest says; empty when every byte verifies."""
    try:
        files: dict[str, dict[str, Any]] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        expected = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{MANIFEST}: {type(error).__name__}: {error}"]
    present = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - {MANIFEST}
    faults = [f"{name}: not in {MANIFEST}" for name in sorted(present - set(expected))]
    for name, (num_bytes, digest) in sorted(expected.items()):
        path = folder / name
        if name not in present or path.is_symlink():
            faults.append(f"{name}: missing")
        elif path.stat().st_size != num_bytes:
            faults.append(f"{name}: {path.stat().st_size:,} of {num_bytes:,} bytes")
        elif sha256_file(path) != digest:
            faults.append(f"{name}: SHA-256 mismatch")
    return faults


def retire(folder: Path) -> None:
    """Delete a published folder so that no reader can meet half of it: rename first, then remove."""
    trash = folder.with_name(f"{TRASH_PREFIX}{folder.name}-{secrets.token_hex(4)}")
    folder.rename(trash)
    shutil.rmtree(trash, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove what a killed process left behind. Call it only while holding the run's lock."""
    for leftover in folder.glob(".t*"):
        if leftover.name.startswith((TEMPORARY_PREFIX, TRASH_PREFIX)):
            shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(run_dir: RunDir) -> Iterator[None]:
    """Hold the run folder for this process; MachineError names the holder. The kernel frees it when a process dies."""
    with explained(run_dir.lock):
        run_dir.root.mkdir(parents=True, exist_ok=True)
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
        handle.seek(0)
        handle.truncate()
        handle.write(f"pid {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        handle.flush()
        yield
