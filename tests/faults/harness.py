"""`qlora-train` in processes of its own that are killed, starved of disk space or signalled at chosen places.

One process imports everything once and forks a child for each run, which saves some ten seconds of imports. It has one
thread and has computed nothing when it forks: a child of a process whose thread pools are running would hang.

strace stops a child at the system call that a fault belongs to. It kills before a call is made, so the points before
all calls that change files, the last one's successor included, are all the states that a kill can leave behind.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from qlora_train.artifacts.folders import manifest_faults
from tests.commandline import chat_rows, write_recipe, write_rows
from tests.faults import children

ROOT = Path(__file__).resolve().parents[2]
CHANGING = (
    *("openat", "open", "creat", "write", "writev", "pwrite64", "fsync", "fdatasync", "ftruncate", "fallocate"),
    *("rename", "renameat", "renameat2", "link", "linkat", "symlink", "symlinkat", "mkdir", "mkdirat"),
    *("unlink", "unlinkat", "rmdir", "chmod", "fchmod", "fchmodat", "copy_file_range", "sendfile"),
)
_CALL = re.compile(r"^(?:\d+ +)?(\w+)\((.*)$")
_READ_ONLY = re.compile(r"O_RDONLY(?!.*O_CREAT)")
_UNLOGGED = ("step_s", "peak_memory_gib")  # of a line of metrics.jsonl: not the same in two equal runs
STEP = 6  # whose checkpoint is attacked: an evaluation goes before it, and an older one is retired after it
SETTINGS: dict[str, Any] = {
    "train__epochs": 2,
    "train__max_steps": 9,
    "train__checkpointing": "full",
    "eval__every": 3,
    "eval__generate_rows": 0,
}


@dataclass(frozen=True)
class Ended:
    """How a child ended, and what it printed."""

    code: int | None
    signal: int | None
    said: str


class Child:
    """A run in a process of its own."""

    def __init__(self, launcher: Launcher, pid: int, log: Path) -> None:
        self._launcher, self.pid, self.log = launcher, pid, log

    def stopped(self) -> None:
        """Wait until it has stopped itself."""
        status = self._launcher.wait(self.pid)
        assert status["stopped"], (status, self.log.read_text(encoding="utf-8"))

    def go(self) -> None:
        """Let it go on."""
        os.kill(self.pid, signal.SIGCONT)

    def said(self, words: str) -> None:
        """Wait until it has printed these words."""
        until = time.monotonic() + children.SECONDS
        while words not in self.log.read_text(encoding="utf-8"):
            assert time.monotonic() < until, self.log.read_text(encoding="utf-8")
            time.sleep(0.005)

    def ended(self) -> Ended:
        """Wait for its end."""
        status = self._launcher.wait(self.pid)
        assert not status["stopped"], self.log.read_text(encoding="utf-8")
        return Ended(status["code"], status["signal"], self.log.read_text(encoding="utf-8"))


class Launcher:
    """Starts `qlora-train ARGUMENTS` in forked children. Close it in the end."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._count = 0
        self._lock = threading.Lock()
        # Progress bars write as often as time allows, and calls are counted.
        environment = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
        # pyarrow's allocator would start a thread of its own, in the process that forks.
        environment |= {"QLORA_TRAIN_CACHE": str(folder / "cache"), "JE_ARROW_MALLOC_CONF": "background_thread:false"}
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.children"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env=os.environ | environment,
            text=True,
        )

    def close(self) -> None:
        """End the process that forks; it has nothing to clean up."""
        self._server.kill()
        self._server.wait()

    def start(
        self,
        *arguments: str | Path,
        cwd: Path = ROOT,
        environment: Mapping[str, str | None] | None = None,
        setups: Sequence[tuple[str, Mapping[str, Any]]] = (),
    ) -> Child:
        """A child that runs `qlora-train ARGUMENTS` after the functions of tests/faults/children.py in `setups`."""
        with self._lock:
            self._count += 1
            log = self.folder / f"child-{self._count}.log"
        log.write_bytes(b"")
        request = {"arguments": [str(argument) for argument in arguments], "log": str(log), "cwd": str(cwd)}
        answer = self._ask({**request, "environment": dict(environment or {}), "setups": list(setups)})
        return Child(self, answer["pid"], log)

    def run(self, *arguments: str | Path, **options: Any) -> Ended:
        """Start a child and wait for its end."""
        return self.start(*arguments, **options).ended()

    def wait(self, pid: int) -> dict[str, Any]:
        """Wait until a child has ended or stopped itself."""
        while not (status := self._ask({"wait": pid}))["known"]:
            time.sleep(0.005)
        return status

    def learn(self, names: Path) -> None:
        """Import what a finished child had imported too (see `children.list_modules`), so that later ones need not."""
        answer = self._ask({"import": json.loads(names.read_text(encoding="utf-8"))})
        assert answer["threads"] == 1, "a process with several threads must not fork"

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        assert self._server.stdin is not None and self._server.stdout is not None
        with self._lock:
            self._server.stdin.write(json.dumps(request) + "\n")
            self._server.stdin.flush()
            answer: dict[str, Any] = json.loads(self._server.stdout.readline())
        return answer


# ---- what a run came to


def outcome_of(run: Path) -> dict[str, str]:
    """SHA-256 of adapter, optimiser and last steps at the end and of the published adapter, and every logged value."""
    last = max((run / "ckpt").glob("step-*"))
    files = (*sorted(last.glob("*.safetensors")), run / "adapter" / "adapter_model.safetensors")
    found = {f"{path.parent.name}/{path.name}": _tensors_digest(path) for path in files}
    found["last_steps.json"] = hashlib.sha256((last / "last_steps.json").read_bytes()).hexdigest()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    logged = [{key: value for key, value in line.items() if key not in _UNLOGGED} for line in lines]
    return found | {"logged": "\n".join(map(repr, logged))}


def _tensors_digest(path: Path) -> str:
    """Over name, dtype, shape and bytes of every tensor, sorted: the bytes of the file may differ by its metadata."""
    from safetensors.numpy import load_file

    digest = hashlib.sha256()
    for name, array in sorted(load_file(path).items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return digest.hexdigest()


def steps_of(run: Path) -> list[int]:
    """The steps that there are checkpoints of."""
    return sorted(int(path.name[5:]) for path in (run / "ckpt").glob("step-*"))


def damaged(run: Path) -> list[str]:
    """Checkpoints that do not verify."""
    return [f"{path.name}: {faults}" for path in (run / "ckpt").glob("step-*") if (faults := manifest_faults(path))]


def leftovers(folder: Path) -> list[str]:
    """Temporary names below a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob(".*") if path.name != ".lock")


class Scene:
    """An undisturbed run, and copies of its folder as it was before the checkpoint of STEP was saved."""

    def __init__(self, launcher: Launcher, folder: Path, model: Path) -> None:
        self.launcher, self.folder, self._copies = launcher, folder, itertools.count(1)
        straight = folder / "straight"
        write_rows(straight / "train.jsonl", chat_rows(24))
        self.recipe = write_recipe(straight, model, **SETTINGS)
        modules = folder / "modules.json"
        started = time.monotonic()
        setups = [("stop_at_save", {"step": STEP}), ("list_modules", {"path": str(modules)})]
        child = launcher.start("train", self.recipe, setups=setups)
        child.stopped()
        shutil.copytree(straight, folder / "before")
        child.go()
        ended = child.ended()
        assert ended.code == 0, ended.said
        self.seconds = time.monotonic() - started
        self.expected = outcome_of(straight / "run")
        launcher.learn(modules)

    def before_save(self) -> Path:
        """A new folder with the run as it was before that save."""
        return self._copy("before")

    def before_start(self) -> Path:
        """A new folder with recipe and rows, without a run."""
        copy = self._copy("before")
        shutil.rmtree(copy / "run")
        return copy

    def finished(self) -> Path:
        """A new folder with the whole run."""
        return self._copy("straight")

    def _copy(self, name: str) -> Path:
        target = self.folder / f"case-{next(self._copies)}"
        shutil.copytree(self.folder / name, target)
        return target

    def train(self, folder: Path, *arguments: str, **options: Any) -> Ended:
        """`qlora-train train RECIPE ARGUMENTS` in a copy."""
        return self.launcher.run("train", folder / "recipe.yaml", *arguments, **options)

    def start(self, folder: Path, *arguments: str, **options: Any) -> Child:
        """The same, not waited for."""
        return self.launcher.start("train", folder / "recipe.yaml", *arguments, **options)

    def finish(self, folder: Path, **options: Any) -> str:
        """Resume a run, or start it again where it has no checkpoint; what is not as in the straight run then."""
        ended = self.train(folder, "--resume", **options)
        if ended.code == 5 and not steps_of(folder / "run"):
            ended = self.train(folder, **options)
        if ended.code != 0:
            return f"exit code {ended.code}, signal {ended.signal}: {ended.said}"
        found = outcome_of(folder / "run")
        differing = [name for name in self.expected if found.get(name) != self.expected[name]]
        return ", ".join([*differing, *damaged(folder / "run"), *leftovers(folder / "run")])


# ---- strace


@dataclass(frozen=True)
class Point:
    """The n-th call of one name since tracing began."""

    call: str
    number: int
    arguments: str

    @property
    def kill(self) -> str:
        """strace's words for a kill -9 before it."""
        return f"inject={self.call}:signal=KILL:when={self.number}"

    def fail(self, error: str) -> str:
        """strace's words for an error that it ends with."""
        return f"inject={self.call}:error={error}:when={self.number}"


@cache
def why_not_traceable() -> str:
    """Why strace cannot be used on this machine; empty where it can."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    with subprocess.Popen(["sleep", "60"], preexec_fn=children.allow_tracing) as sleeper:
        try:
            with tracing(sleeper.pid, Path(os.devnull)):
                return ""
        except RuntimeError as error:
            return str(error)
        finally:
            sleeper.kill()


@contextmanager
def tracing(pid: int, log: Path, *options: str, path: Path | None = None, alone: bool = False) -> Iterator[None]:
    """strace on a running process, or on its calls on `path` alone: the trace goes to `log`. On leaving it lets go.

    `alone`: on its main thread, without those of its children, each of which strace counts the calls of by itself.
    """
    command = ["strace", "-y", "-s", "80", "-p", str(pid), "-o", str(log), *(("-P", str(path)) if path else ())]
    command += [] if alone else ["-f"]
    for option in options:
        command += ["-e", option]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as tracer:
        try:
            while _tracer_of(pid) != tracer.pid:
                if tracer.poll() is not None:
                    assert tracer.stderr is not None
                    raise RuntimeError(f"strace may not attach: {tracer.stderr.read().strip()}")
                time.sleep(0.002)
            yield
        finally:
            with suppress(ProcessLookupError):
                tracer.terminate()


def _tracer_of(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return int(status.partition("TracerPid:")[2].split()[0])


def changing_points(trace: Path) -> list[Point]:
    """The calls of a trace that change files, and the marks between them."""
    counts: dict[str, int] = {}
    points = []
    for line in trace.read_text(encoding="utf-8").splitlines():
        if (found := _CALL.match(line)) is None:
            continue
        call, arguments = found.groups()
        counts[call] = counts.get(call, 0) + 1
        reads = call in ("open", "openat") and _READ_ONLY.search(arguments)
        if not reads:
            points.append(Point(call, counts[call], arguments))
    return points


def points_of_save(points: list[Point]) -> list[Point]:
    """Those up to the first mark, with it: a kill there comes after all of them."""
    return points[: 1 + next(index for index, point in enumerate(points) if point.call == children.END_MARK)]


def trace_of_save(scene: Scene) -> Path:
    """A trace from the beginning of the save of STEP to the end of the run, with a mark when older ones are retired."""
    folder = scene.before_save()
    trace = folder / "trace"
    child = scene.start(folder, "--resume", setups=[("stop_at_save", {"step": STEP})])
    child.stopped()
    with tracing(child.pid, trace, f"trace={','.join((*CHANGING, children.END_MARK))}"):
        child.go()
        ended = child.ended()
    assert ended.code == 0, ended.said
    return trace


_BEGINNING = "qlora_train.export.run:finished_shards"
_EXPORT_BEGINS = ("signal_at", {"where": _BEGINNING, "call": 1, "numbers": [signal.SIGSTOP]})


def trace_of_export(scene: Scene) -> Path:
    """A trace of an export from its first call that changes a file on; the export lies beside it, as `merged`."""
    folder = scene.finished()
    trace = folder / "trace"
    ended = _export_traced(scene, folder, f"trace={','.join(CHANGING)}")
    assert ended.code == 0, ended.said
    return trace


def export_with_fault(scene: Scene, fault: str) -> tuple[Path, Ended]:
    """An export that meets a fault; the folder of run and target, and how it ended."""
    folder = scene.finished()
    return folder, _export_traced(scene, folder, fault)


def _export_traced(scene: Scene, folder: Path, *options: str) -> Ended:
    child = scene.launcher.start("export", folder / "run", folder / "merged", setups=[_EXPORT_BEGINS])
    child.stopped()
    with tracing(child.pid, folder / "trace", *options, alone=True):
        child.go()
        return child.ended()


def with_fault(scene: Scene, fault: str, *more: str) -> tuple[Path, Ended]:
    """A run that meets a fault while the checkpoint of STEP is saved; its folder, and how it ended."""
    folder = scene.before_save()
    child = scene.start(folder, "--resume", setups=[("stop_at_save", {"step": STEP})])
    child.stopped()
    with tracing(child.pid, folder / "trace", fault, *more):
        child.go()
        return folder, child.ended()
