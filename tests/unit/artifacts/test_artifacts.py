"""Files and folders that are whole or absent, manifests that see any damage, and the lock."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError
from tokenizers import Tokenizer, models

import qlora_train
from qlora_train.artifacts.files import (
    TEMPORARY_PREFIX,
    append_json_line,
    explained,
    is_full,
    read_json,
    write_file,
    write_json,
)
from qlora_train.artifacts.folders import (
    MANIFEST,
    REPLACED_PREFIX,
    TRASH_PREFIX,
    _sealed,
    locked,
    manifest_faults,
    publishing,
    read_manifest,
    retire,
    sweep,
)
from qlora_train.artifacts.layout import RunDir
from qlora_train.errors import MachineError

WEIGHTS = bytes(range(256)) * 5


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_names_of_a_run_are_all_different_and_inside_it(tmp_path: Path) -> None:
    properties = [name for name, value in vars(RunDir).items() if isinstance(value, property)]
    paths = [getattr(RunDir(tmp_path), name) for name in properties]
    assert len(set(paths)) == len(paths) >= 10
    assert {path.parent for path in paths} == {tmp_path}


def test_write_file_replaces_the_content_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for content in (b"", b"old", WEIGHTS):
        write_file(path, content)
        assert path.read_bytes() == content and names(tmp_path) == {"a.json"}


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_content_and_no_temporary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "a.json"
    write_file(path, b"old")
    monkeypatch.setattr(*((os, "fsync") if call == "fsync" else (Path, "replace")), full_disk)
    with pytest.raises(MachineError, match="No space left on device") as caught:
        write_file(path, b"new")
    assert str(path) in str(caught.value)
    assert path.read_bytes() == b"old" and names(tmp_path) == {"a.json"}


def test_write_json_is_readable_and_refuses_what_is_not_finite(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"é": [1, 2.5, None]})
    assert read_json(path) == {"é": [1, 2.5, None]} and path.read_bytes().endswith(b"}\n")
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"loss": float("nan")})
    assert read_json(path) == {"é": [1, 2.5, None]} and names(tmp_path) == {"a.json"}


@pytest.mark.parametrize("content", [None, b"", b'{"a": 1', b"\xff\xfe"])
def test_read_json_names_the_file_it_cannot_read(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "base.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(MachineError, match=r"cannot read .*base\.json"):
        read_json(path)


def test_explained_says_what_where_and_how_much_room() -> None:
    full = Path("/dev/full")
    pattern = r"cannot write /dev/full: No space left on device \([\d,]+ MiB free\)"
    with pytest.raises(MachineError, match=pattern), explained(full), full.open("w") as file:
        file.write("x")


def test_what_tokenizers_raises_on_a_full_disk_is_explained(tmp_path: Path) -> None:
    """It has no class of its own, and would pass for a bug; any other error of this kind is one."""
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(MachineError, match="No space left on device") as caught, explained(tmp_path):
        tokenizer.save("/dev/full")
    assert is_full(caught.value)
    with pytest.raises(Exception, match="a bug") as other, explained(tmp_path):
        raise Exception("a bug")
    assert type(other.value) is Exception


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, [r"\(12\.5 MiB needed, [\d,]+ MiB free\)", "free space there"]),
        (errno.EDQUOT, [r"quota exceeded \(12\.5 MiB needed\)", "within your quota"]),
        (errno.EFBIG, [r"too large \(12\.5 MiB needed\)", "ulimit -f"]),
        (errno.EROFS, ["Read-only file system", "mount the file system writable"]),
        (errno.EACCES, [r"is d[rwx-]{9} of \S+; this process runs as \S+\)", "change the permissions"]),
        (errno.EIO, [r"Input/output error \(12\.5 MiB needed\)", "the disk or the way to it fails"]),
        (errno.EXDEV, ["cross-device", "choose another folder"]),
    ],
)
def test_each_cause_has_its_own_way_out(tmp_path: Path, number: int, words: list[str]) -> None:
    """The same words whether Python's error, safetensors' or tokenizers' says it."""
    said = []
    rust = f"x (os error {number})"
    for error in (OSError(number, "x"), SafetensorError(f"Error while serializing: {rust}"), Exception(rust)):
        with pytest.raises(MachineError) as caught, explained(tmp_path, num_bytes=25 * 2**19):
            raise error
        said.append(str(caught.value))
        assert is_full(caught.value) == (number in (errno.ENOSPC, errno.EDQUOT))
    assert said[0] == said[1] == said[2] and str(tmp_path) in said[0]
    assert ("MiB free" in said[0]) == (number == errno.ENOSPC)
    for word in words:
        assert re.search(word, said[0]), (word, said[0])


def test_explained_leaves_other_exceptions_alone(tmp_path: Path) -> None:
    for error in (KeyError("ours"), SafetensorError("header too large")):
        with pytest.raises(type(error)), explained(tmp_path):
            raise error


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    pattern = rf"cannot write {tmp_path}/run/.*: (Not a directory|File exists)\. Fix"
    with pytest.raises(MachineError, match=pattern):
        write_file(tmp_path / "run" / "a.json", b"x")
    with (
        pytest.raises(MachineError, match=pattern),
        publishing(tmp_path / "run" / "ckpt", manifest={}),
    ):
        pytest.fail("the block must not run")
    with (
        pytest.raises(MachineError, match=pattern),
        locked(RunDir(tmp_path / "run")),
    ):
        pytest.fail("the block must not run")
    assert names(tmp_path) == {"run"} and (tmp_path / "run").read_text() == "a file"


def publish(target: Path) -> Path:
    with publishing(target, manifest={"step": 7}) as folder:
        (folder / "weights.bin").write_bytes(WEIGHTS)
        (folder / "sub").mkdir()
        (folder / "sub" / "empty").write_bytes(b"")
    return target


def test_publishing_appears_whole_with_a_manifest_of_sizes_and_hashes(tmp_path: Path) -> None:
    target = tmp_path / "new" / "step-000007"
    with publishing(target, manifest={"step": 7}) as folder:
        (folder / "weights.bin").write_bytes(WEIGHTS)
        assert not target.exists() and folder.parent == target.parent
        assert folder.name.startswith(TEMPORARY_PREFIX)
    assert names(target.parent) == {"step-000007"} and names(target) == {"weights.bin", MANIFEST}
    manifest = json.loads((target / MANIFEST).read_text())
    digest = hashlib.sha256(WEIGHTS).hexdigest()
    said = {"schema": 2, "step": 7, "files": {"weights.bin": {"bytes": 1280, "sha256": digest}}}
    seal = hashlib.sha256(json.dumps(said, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    assert manifest == {**said, "sha256": seal} == read_manifest(target)
    assert manifest_faults(target) == []


@pytest.mark.parametrize("error", [ValueError("ours"), KeyboardInterrupt(), OSError(errno.ENOSPC, "full")])
def test_publishing_leaves_nothing_when_the_block_fails(tmp_path: Path, error: BaseException) -> None:
    """A block that fails publishes nothing; only an OSError becomes a MachineError."""
    expected = MachineError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected), publishing(tmp_path / "target", manifest={}) as folder:
        (folder / "half").write_bytes(WEIGHTS)
        raise error
    assert names(tmp_path) == set()


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_publishing_leaves_nothing_when_the_disk_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    monkeypatch.setattr(*((os, "fsync") if call == "fsync" else (Path, "rename")), full_disk)
    with pytest.raises(MachineError, match="No space left"):
        publish(tmp_path / "target")
    assert names(tmp_path) == set()


def test_publishing_never_mixes_with_what_is_there(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "kept").write_text("old")
    with pytest.raises(MachineError, match="cannot write"):
        publish(target)
    assert names(tmp_path) == {"target"} and names(target) == {"kept"}


def _cut(num_bytes: int) -> Callable[[Path], None]:
    return lambda folder: (folder / "weights.bin").write_bytes(WEIGHTS[:num_bytes]) and None


def _flip(folder: Path) -> None:
    (folder / "weights.bin").write_bytes(bytes([WEIGHTS[0] ^ 1]) + WEIGHTS[1:])


def _link(folder: Path) -> None:
    """The same content, but outside the folder."""
    outside = folder.parent / "outside.bin"
    (folder / "weights.bin").rename(outside)
    (folder / "weights.bin").symlink_to(outside)


def _extra(folder: Path) -> None:
    (folder / "sub" / "extra").write_text("x")


def _edit(change: Callable[[dict[str, Any]], object], *, seal: bool = False) -> Callable[[Path], None]:
    """Change the manifest, and its own hash too where `seal` says so."""

    def edit(folder: Path) -> None:
        manifest = json.loads((folder / MANIFEST).read_text())
        change(manifest)
        write_json(folder / MANIFEST, _sealed(manifest) if seal else manifest)

    return edit


def _set_hash(manifest: dict[str, Any]) -> None:
    manifest["files"]["weights.bin"]["sha256"] = "0" * 64


def _cut_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_bytes((folder / MANIFEST).read_bytes()[:-1])


def _add_outside(manifest: dict[str, Any]) -> None:
    manifest["files"]["../x"] = manifest["files"]["weights.bin"]


EDITED = f"{MANIFEST}: changed since it was written"


def _manifest(content: str | None) -> Callable[[Path], None]:
    def replace(folder: Path) -> None:
        (folder / MANIFEST).unlink()
        if content is not None:
            (folder / MANIFEST).write_text(content)

    return replace


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut to nothing": (_cut(0), "weights.bin: 0 of 1,280 bytes"),
    "cut in half": (_cut(640), "weights.bin: 640 of 1,280 bytes"),
    "last byte gone": (_cut(1279), "weights.bin: 1,279 of 1,280 bytes"),
    "flipped bit": (_flip, "weights.bin: SHA-256 mismatch"),
    "missing": (lambda f: (f / "sub" / "empty").unlink(), "sub/empty: missing"),
    "extra": (_extra, f"sub/extra: not in {MANIFEST}"),
    "link": (_link, "weights.bin: missing"),
    "edited hash": (_edit(lambda m: m["files"]["weights.bin"].update(sha256="0" * 64)), EDITED),
    "edited size": (_edit(lambda m: m["files"]["weights.bin"].update(bytes=1)), EDITED),
    "edited step": (_edit(lambda m: m.update(step=8)), EDITED),
    "entry removed": (_edit(lambda m: m["files"].pop("weights.bin")), EDITED),
    "another hash, sealed": (_edit(_set_hash, seal=True), "weights.bin: SHA-256 mismatch"),
    "entry removed, sealed": (_edit(lambda m: m["files"].pop("weights.bin"), seal=True), "weights.bin: not in"),
    "entry added, sealed": (_edit(_add_outside, seal=True), "../x: missing"),
    "entry without hash, sealed": (_edit(lambda m: m["files"]["weights.bin"].pop("sha256"), seal=True), MANIFEST),
    "manifest without its last byte": (_cut_manifest, EDITED),
    "schema of another build": (_edit(lambda m: m.update(schema=3)), f"{MANIFEST}: schema 3, this build knows 2"),
    "no manifest": (_manifest(None), MANIFEST),
    "empty manifest": (_manifest(""), MANIFEST),
    "torn manifest": (_manifest('{"files": {'), MANIFEST),
    "manifest of another kind": (_manifest("[]"), MANIFEST),
    "manifest without files": (_manifest("{}"), MANIFEST),
    "files as a list": (_manifest('{"files": []}'), MANIFEST),
    "files as null": (_manifest('{"files": null}'), MANIFEST),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_manifest_sees_all_damage(tmp_path: Path, damage: str) -> None:
    spoil, expected = DAMAGE[damage]
    target = publish(tmp_path / "target")
    assert manifest_faults(target) == []
    spoil(target)
    faults = manifest_faults(target)
    assert len(faults) == 1 and faults[0].startswith(expected), faults


@pytest.mark.parametrize("name", [MANIFEST, "weights.bin"])
def test_what_cannot_be_read_is_not_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    target = publish(tmp_path / "target")
    real = io.open

    def refusing(file: Any, *arguments: Any, **options: Any) -> Any:
        if Path(str(file)).name == name:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return real(file, *arguments, **options)

    monkeypatch.setattr(io, "open", refusing)
    with pytest.raises(MachineError, match=f"cannot read .*{name}: Stale file handle.*try again; nothing was changed"):
        manifest_faults(target)


def test_retire_removes_the_folder_and_its_trash(tmp_path: Path) -> None:
    retire(publish(tmp_path / "target"))
    assert names(tmp_path) == set()


def test_replacing_leaves_the_new_folder_alone(tmp_path: Path) -> None:
    target = publish(tmp_path / "target")
    with publishing(target, manifest={"step": 8}, replace=True) as folder:
        (folder / "other").write_text("x")
    assert names(tmp_path) == {"target"} and names(target) == {"other", MANIFEST}
    assert read_manifest(target)["step"] == 8


def test_a_replacement_that_fails_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = publish(tmp_path / "target")
    rename = Path.rename

    def failing(self: Path, to: Path) -> Path:
        return full_disk() if self.name.startswith(TEMPORARY_PREFIX) else rename(self, to)  # type: ignore[func-returns-value, return-value]

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(MachineError), publishing(target, manifest={"step": 8}, replace=True):
        pass
    assert names(tmp_path) == {"target"} and manifest_faults(target) == []


def test_a_killed_replacement_does_not_block_the_next(tmp_path: Path) -> None:
    """Killed after the second rename: the former holder is left beside the new one."""
    target = publish(tmp_path / "target")
    publish(tmp_path / f"{REPLACED_PREFIX}target")
    with publishing(target, manifest={"step": 8}, replace=True):
        pass
    assert names(tmp_path) == {"target"} and read_manifest(target)["step"] == 8


def test_sweep_leaves_a_folder_that_is_being_filled(tmp_path: Path) -> None:
    with publishing(tmp_path / "target", manifest={}) as folder:
        (folder / "half").write_text("x")
        sweep(tmp_path)
        assert names(folder) == {"half"}
    assert manifest_faults(tmp_path / "target") == []


def test_sweep_gives_a_replaced_folder_its_name_back_only_where_the_place_is_empty(tmp_path: Path) -> None:
    """What a kill between the two renames of a replacement leaves; and one after them."""
    publish(tmp_path / f"{REPLACED_PREFIX}one")
    publish(tmp_path / f"{REPLACED_PREFIX}two")
    publish(tmp_path / "two")
    (tmp_path / "two" / "new").write_text("x")
    sweep(tmp_path)
    assert names(tmp_path) == {"one", "two"} and "new" in names(tmp_path / "two")
    assert manifest_faults(tmp_path / "one") == []


def test_sweep_removes_leftovers_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / f"{TEMPORARY_PREFIX}step-1").mkdir()
    (tmp_path / f"{TEMPORARY_PREFIX}step-1" / "half").write_text("x")
    (tmp_path / f"{TRASH_PREFIX}step-2").mkdir()
    (tmp_path / f"{TEMPORARY_PREFIX}base.json").write_text("x")
    kept = {".tmp", ".train", ".trash", "tmp-x", "step-000001", ".lock"}
    for name in kept:
        (tmp_path / name).write_text("kept")
    sweep(tmp_path)
    assert names(tmp_path) == kept


def test_the_lock_names_its_holder_and_is_freed(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "run")
    with locked(run_dir):
        pattern = rf"in use by pid {os.getpid()} on \S+ since \d{{4}}-\d\d-\d\d"
        with pytest.raises(MachineError, match=pattern), locked(run_dir):
            pytest.fail("two holders")
        with locked(RunDir(tmp_path / "other")):
            pass
    with pytest.raises(ValueError, match="ours"), locked(run_dir):
        raise ValueError("ours")
    with locked(run_dir):
        assert run_dir.lock.read_text().count("pid") == 1


HOLDER = """
import sys
from pathlib import Path
from qlora_train.artifacts.folders import locked
from qlora_train.artifacts.layout import RunDir
with locked(RunDir(Path(sys.argv[1]))):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_killed_process_frees_the_lock(tmp_path: Path) -> None:
    root = Path(str(qlora_train.__file__)).parents[1]
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root, text=True) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == "held\n"
            with pytest.raises(MachineError, match=f"pid {holder.pid} "), locked(RunDir(tmp_path)):
                pytest.fail("two holders")
        finally:
            holder.send_signal(signal.SIGKILL)
    with locked(RunDir(tmp_path)):
        pass


def test_what_a_killed_process_left_is_swept_by_the_next_of_this_name(tmp_path: Path) -> None:
    """A folder in which a living process works stays, as do those of other names."""
    dead, foreign = tmp_path / ".tmp-out-99999-00000000", tmp_path / ".tmp-other-99999-00000000"
    for folder in (dead, foreign, tmp_path / ".tmp-out-shards"):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
    with publishing(tmp_path / "out", manifest={}) as first:
        assert not dead.exists()
        with publishing(tmp_path / "out", manifest={}) as second:
            assert first.exists() and second != first, "somebody works in it"
        retire(tmp_path / "out")
        (first / "a").write_bytes(b"a")
    assert (tmp_path / "out" / "a").exists()
    assert sorted(path.name for path in tmp_path.glob(".tmp-*")) == [foreign.name, ".tmp-out-shards"]


def test_lines_are_appended_whole(tmp_path: Path) -> None:
    """After a line that a killed process left torn, too."""
    path = tmp_path / "lines.jsonl"
    append_json_line(path, {"a": 1})
    path.write_bytes(path.read_bytes() + b'{"b":')
    append_json_line(path, {"c": 3})
    assert path.read_text().splitlines() == ['{"a": 1}', '{"b":', '{"c": 3}']
