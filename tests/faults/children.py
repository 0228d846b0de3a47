"""The process that tests/faults/harness.py forks runs from: `python -m tests.faults.children`.

It reads a JSON object per line and answers with one: {"arguments", "log", "cwd", "environment", "setups"} starts a
child, {"wait": PID} asks for its state, {"import": [names]} imports. Functions that a child may call before its command
runs stand below: they put the marks that the harness waits for, and break what a negative control wants broken.
"""

from __future__ import annotations

import atexit
import ctypes
import errno
import fcntl
import importlib
import itertools
import json
import os
import resource
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

SECONDS = 120  # then SIGALRM ends a child
END_MARK = "getppid"  # a call that nothing else makes
_PR_SET_PTRACER, _ANY = 0x59616D61, ctypes.c_ulong(-1)  # linux/prctl.h
_CLONE_NEWNS = 0x20000  # linux/sched.h
_MS_RDONLY, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18  # sys/mount.h


def allow_tracing() -> None:
    """Let a process that is no ancestor trace this one, where the kernel asks (Yama)."""
    ctypes.CDLL(None).prctl(_PR_SET_PTRACER, _ANY, 0, 0, 0)


# ---- called in a child before its command


def stop_at_save(step: int) -> None:
    """Stop before the checkpoint of a step is saved; leave END_MARK when it is saved and older ones are retired."""
    from qlora_train.train import loop

    save, retire = loop.save_checkpoint, loop.retire_old

    def stopping(run_dir: Any, state: Any, *rest: Any) -> Any:
        if state.step == step:
            os.kill(os.getpid(), signal.SIGSTOP)
        return save(run_dir, state, *rest)

    def marking(*arguments: Any) -> None:
        retire(*arguments)
        os.getppid()

    loop.save_checkpoint, loop.retire_old = stopping, marking


def list_modules(path: str) -> None:
    """Write the names of all modules that the command imported."""
    atexit.register(lambda: Path(path).write_text(json.dumps(sorted(sys.modules)), encoding="utf-8"))


def limit_file_size(num_bytes: int) -> None:
    """No file may grow beyond this: the kernel refuses the rest of a write."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


def fill_disk(times: int) -> None:
    """Refuse the first attempts to write a checkpoint, as a full disk does; and do not wait long for room."""
    from qlora_train.train import checkpoint

    save, left = checkpoint.write_checkpoint, itertools.count(1)

    def refusing(folder: Path, *rest: Any) -> None:
        save(folder, *rest)
        if next(left) <= times:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    checkpoint.write_checkpoint, checkpoint.WAIT_S = refusing, 0.1


def fail_reading(path: str) -> None:
    """Let a file be one that the disk does not hand out, when its hash is taken."""
    from qlora_train.artifacts import folders

    real = folders.sha256_file

    def failing(file: Path) -> str:
        if str(file) == path:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(file)

    folders.sha256_file = failing


def report_free_space(num_bytes: int) -> None:
    """Let the disk seem to have so much room."""
    real = shutil.disk_usage
    shutil.disk_usage = lambda path: real(path)._replace(free=num_bytes)  # type: ignore[assignment]


def refuse_locks() -> None:
    """As a file system does that has no locks."""

    def refusing(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    fcntl.flock = refusing  # type: ignore[assignment]


def kill_template_worker(call: int) -> None:
    """kill -9 the process that renders templates, just before it is given rows for the n-th time."""
    from qlora_train.data.sandbox import Sandbox

    submit, count = Sandbox.submit, itertools.count(1)

    def killing(self: Any, *arguments: Any) -> Any:
        if next(count) == call:
            os.kill(self._worker._process.pid, signal.SIGKILL)
            print("a template worker was killed", file=sys.stderr)
        return submit(self, *arguments)

    Sandbox.submit = killing  # type: ignore[method-assign]


def mount_read_only(path: str) -> None:
    """Let this process see a folder as a read-only file system."""
    libc = ctypes.CDLL(None, use_errno=True)
    folder, none = path.encode(), b"none"
    steps = (
        lambda: libc.unshare(_CLONE_NEWNS),
        lambda: libc.mount(none, b"/", None, _MS_REC | _MS_PRIVATE, None),
        lambda: libc.mount(folder, folder, None, _MS_BIND, None),
        lambda: libc.mount(folder, folder, None, _MS_BIND | _MS_REMOUNT | _MS_RDONLY, None),
    )
    for step in steps:
        if step():
            sys.exit(f"cannot mount a folder read-only here: {os.strerror(ctypes.get_errno())}")


def signal_at(where: str, call: int, numbers: list[int]) -> None:
    """Send this process signals just before the n-th call of `module:function` or `module:Class.function`."""
    module, _, dotted = where.partition(":")
    *parents, name = dotted.split(".")
    owner = importlib.import_module(module)
    for parent in parents:
        owner = getattr(owner, parent)
    original, count = getattr(owner, name), itertools.count(1)

    def signalling(*arguments: Any, **options: Any) -> Any:
        if next(count) == call:
            for number in numbers:
                os.kill(os.getpid(), number)
        return original(*arguments, **options)

    setattr(owner, name, signalling)


def ignore_signal(number: int) -> None:
    """As `nohup` does with SIGHUP."""
    signal.signal(number, signal.SIG_IGN)


def close_pipe(descriptor: int) -> None:
    """Let stdout or stderr be a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.dup2(writing, descriptor)
    os.close(reading)
    os.close(writing)


def leave_removed_folder(path: str) -> None:
    """Run in a folder that is no longer there."""
    folder = Path(path)
    folder.mkdir()
    os.chdir(folder)
    folder.rmdir()


# Negative controls: what a resume must not lose, lost.


def lose_moments() -> None:
    """The optimiser begins anew."""
    from qlora_train.train import checkpoint

    checkpoint.restore_optimizer = lambda *_: None


def restart_rows() -> None:
    """The rows come from the first on again."""
    _change_rows(lambda step, first: step - first)


def shift_rows() -> None:
    """The rows come one step too early."""
    _change_rows(lambda step, first: step + 1)


def _change_rows(change: Callable[[int, int], int]) -> None:
    from qlora_train.data.loader import Loader

    original, called = Loader.step, []

    def changed(self: Loader, step: int) -> Any:
        called.append(step)
        return original(self, change(step, called[0]))

    Loader.step = changed  # type: ignore[method-assign]


def swap_micro_batches() -> None:
    """The micro-batches of a step come in another order."""
    from qlora_train.data.loader import Loader

    original = Loader.step
    Loader.step = lambda self, step: original(self, step)[::-1]  # type: ignore[method-assign]


def count_dropout() -> None:
    """Dropout draws by how many draws there were in this process, not by the step."""
    from qlora_train.seeds import derive_seed
    from qlora_train.train import step

    count = itertools.count()
    step.derive_seed = lambda seed, purpose, *_: derive_seed(seed, purpose, next(count))


def fuse_optimizer() -> None:
    """Another implementation of AdamW, which rounds otherwise."""
    from qlora_train.train import setup

    original = setup.build_optimizer

    def fused(*arguments: Any) -> Any:
        optimizer = original(*arguments)
        optimizer.param_groups[0].update(foreach=False, fused=True)
        return optimizer

    setup.build_optimizer = fused


SETUPS: dict[str, Callable[..., None]] = {
    function.__name__: function
    for function in (
        *(stop_at_save, list_modules, limit_file_size, fill_disk, fail_reading, report_free_space, mount_read_only),
        *(refuse_locks, kill_template_worker),
        *(signal_at, ignore_signal, close_pipe, leave_removed_folder),
        *(lose_moments, restart_rows, shift_rows, swap_micro_batches, count_dropout, fuse_optimizer),
    )
}


# ---- the process that forks


def serve() -> None:
    """Import, then answer the lines of stdin."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    from qlora_train import api  # noqa: F401
    from qlora_train.cli import console, results, show  # noqa: F401

    get_checkpoint_conversion_mapping("llama")  # a second of regular expressions, once for all children
    for line in sys.stdin:
        request = json.loads(line)
        if "import" in request:
            for name in request["import"]:
                with suppress(Exception):
                    importlib.import_module(name)
            answer: dict[str, Any] = {"threads": sum(1 for _ in Path("/proc/self/task").iterdir())}
        elif "wait" in request:
            answer = _state_of(request["wait"])
        else:
            answer = {"pid": os.fork()}
            if answer["pid"] == 0:
                _run_child(request)
        print(json.dumps(answer), flush=True)


def _state_of(pid: int) -> dict[str, Any]:
    found, status = os.waitpid(pid, os.WUNTRACED | os.WNOHANG)
    exited, killed = os.WIFEXITED(status), os.WIFSIGNALED(status)
    return {
        "known": found == pid,
        "stopped": os.WIFSTOPPED(status),
        "code": os.WEXITSTATUS(status) if exited else None,
        "signal": os.WTERMSIG(status) if killed else None,
    }


def _run_child(request: Mapping[str, Any]) -> NoReturn:
    """The command line, as the console script calls it."""
    code = 1
    try:
        signal.alarm(SECONDS)
        # Ignored where this was started by nohup, or in the background.
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        allow_tracing()
        log = os.open(request["log"], os.O_WRONLY | os.O_APPEND)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for target, source in ((0, nothing), (1, log), (2, log)):
            os.dup2(source, target)
        os.chdir(request["cwd"])
        for name, value in request["environment"].items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
        for name, options in request["setups"]:
            SETUPS[name](**options)
        from qlora_train.cli.main import main

        main(request["arguments"])
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
