"""Folders that are published whole, by a manifest of sizes and SHA-256 and a rename; and the lock of a run folder."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import json
import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qlora_train.artifacts.files import (
    TEMPORARY_PREFIX,
    explained,
    fsync_dir,
    fsync_file,
    json_bytes,
    legible,
    make_folder,
    sha256_file,
    write_json,
)
from qlora_train.artifacts.layout import RunDir
from qlora_train.errors import MachineError

MANIFEST = "MANIFEST.json"
SCHEMA_VERSION = 2
TRASH_PREFIX = ".trash-"  # no longer published
REPLACED_PREFIX = ".old-"  # the former holder of a name, until the new one has it


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
    with _unpublished(target, num_bytes) as temporary:
        yield temporary
        files = _synced_files(temporary)
        write_json(temporary / MANIFEST, _sealed({"schema": SCHEMA_VERSION, **manifest, "files": files}))
        _publish(temporary, target, replace=replace)


@contextlib.contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """As `publishing`, but without a manifest, since others add to the folder later, and never in another's place."""
    with _unpublished(target) as temporary:
        yield temporary
        for file in _files(temporary):
            fsync_file(file)
        _publish(temporary, target)


@contextlib.contextmanager
def _unpublished(target: Path, num_bytes: int | None = None) -> Iterator[Path]:
    """A temporary folder beside `target`, removed in the end unless it has another name by then."""
    with explained(target, num_bytes=num_bytes):
        make_folder(target.parent)
        _sweep_unfinished(target)
        temporary = target.parent / f"{TEMPORARY_PREFIX}{target.name}-{os.getpid()}-{secrets.token_hex(4)}"
        temporary.mkdir()
    try:
        with explained(target, num_bytes=num_bytes), _held(temporary):
            yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _publish(temporary: Path, target: Path, *, replace: bool = False) -> None:
    """Put a folder's entries on disk, all its files being there, and then its name."""
    for folder in temporary.rglob("*/"):
        fsync_dir(folder)
    fsync_dir(temporary)
    _take_name(temporary, target, replace=replace)


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
    for file in _files(folder):
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
        entries[file.relative_to(folder).as_posix()] = {"bytes": file.stat().st_size, "sha256": digest}
    return entries


def _files(folder: Path) -> list[Path]:
    """Every file in a folder and below."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


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


class OtherSchema(ValueError):
    """A manifest as another version of qlora-train wrote it: not known here, and nothing is wrong with it."""


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a published folder; ValueError when it is not as it was written, OSError when it is not there.

    OtherSchema, which is a ValueError, when it is as another version of qlora-train wrote it; MachineError when the
    machine does not let it be read.
    """
    path = folder / MANIFEST
    with legible(path):
        content = path.read_bytes()
    manifest = json.loads(content)
    if not isinstance(manifest, dict) or "schema" not in manifest:
        raise ValueError("not a manifest")
    is_whole, schema = content == json_bytes(_sealed(manifest)), manifest["schema"]
    if schema != SCHEMA_VERSION:
        raise (OtherSchema if is_whole else ValueError)(f"schema {schema}, this build knows {SCHEMA_VERSION}")
    if not is_whole:
        raise ValueError("changed since it was written: its own SHA-256 does not match")
    return manifest


def manifest_faults(folder: Path) -> list[str]:
    """Why a published folder is not what its manifest says; empty when every byte verifies.

    MachineError when the machine does not let a file of it be read: nobody knows then what is in it.
    """
    try:
        files: dict[str, dict[str, Any]] = read_manifest(folder)["files"]
        expected = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
        present = {p.relative_to(folder).as_posix() for p in _files(folder)} - {MANIFEST}
    except FileNotFoundError:
        return [f"{MANIFEST}: missing"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return [f"{MANIFEST}: {error}"]
    faults = [f"{name}: not in {MANIFEST}" for name in sorted(present - set(expected))]
    for name, (num_bytes, digest) in sorted(expected.items()):
        fault = _file_fault(folder / name, num_bytes, digest) if name in present else "missing"
        if fault is not None:
            faults.append(f"{name}: {fault}")
    return faults


def _file_fault(path: Path, num_bytes: int, digest: str) -> str | None:
    """Why a file is not the one of a manifest."""
    try:
        with legible(path):
            if path.is_symlink():
                return "missing"
            if path.stat().st_size != num_bytes:
                return f"{path.stat().st_size:,} of {num_bytes:,} bytes"
            return None if sha256_file(path) == digest else "SHA-256 mismatch"
    except FileNotFoundError:  # since the folder was listed
        return "missing"


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
        with explained(leftover):
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
