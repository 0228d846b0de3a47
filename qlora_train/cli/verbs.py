"""What every verb of the command line shares: its common arguments, its exit codes, and how errors end it."""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from types import FrameType, TracebackType
from typing import Annotated, NoReturn, ParamSpec

import typer

from qlora_train.cli import complete
from qlora_train.cli.streams import discard
from qlora_train.errors import Interrupted, UserError
from qlora_train.printable import fit_to_show

P = ParamSpec("P")
INTERRUPTED_AT_ONCE = 128 + signal.SIGINT
NOBODY_READS = 128 + signal.SIGPIPE

RecipePath = Annotated[
    Path,
    typer.Argument(
        metavar="RECIPE", help="A recipe file, e.g. recipes/quickstart.yaml.", autocompletion=complete.recipes
    ),
]
RunPath = Annotated[
    Path, typer.Argument(metavar="RUN", help="A run folder: the recipe's run.dir.", autocompletion=complete.runs)
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[SECTION.KEY=VALUE]...",
        help="Values in place of the recipe's, e.g. train.epochs=2.",
        autocompletion=complete.overrides,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object; everything else to stderr.")]


def _tame_libraries() -> None:
    """No telemetry, no progress bars, no code from the hub: set before any library loads."""
    # With `kernels` installed, bitsandbytes 0.50 fetches native code from the hub while it is imported (on CPUs with
    # AVX512-BF16), and transformers 5.23 for some models. To Python, None here means that it is not installed.
    sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TQDM_DISABLE", "1")


def _silence_libraries() -> None:
    """Keep third-party notices that a user cannot act on out of the display; ours go through the reporter.

    Before any library loads: bitsandbytes logs while it is imported.
    """
    warnings.filterwarnings("ignore", module=r"(torch|transformers|peft|bitsandbytes|accelerate|huggingface_hub)\b.*")
    for name in ("bitsandbytes", "transformers", "peft", "accelerate", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise Interrupted(number, "stopped; nothing half-written was left")


def _leave_removed_folder() -> None:
    """A scheduler may have removed the working folder; Intel's MKL ends a process that is in no folder."""
    try:
        Path.cwd()
    except FileNotFoundError:
        print("the working folder was removed: relative paths are taken from /", file=sys.stderr)
        os.chdir("/")


def verb(function: Callable[P, None]) -> Callable[P, None]:
    """Turn the errors of a verb into a message and an exit code."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        _tame_libraries()
        # A verb without handlers of its own must still run its clean-up: temporary folders go.
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as `nohup` has it
                signal.signal(number, _terminate)
        signal.signal(signal.SIGUSR1, lambda *_: None)  # asks `train` for a checkpoint; may come before it can be heard
        _leave_removed_folder()
        _run(partial(function, *args, **kwargs))

    return run


def _run(function: partial[None]) -> None:
    """Call a verb; typer.Exit with the exit code of what went wrong."""
    try:
        _silence_libraries()
        with explained():
            function()
            sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted; what was saved before is intact", file=sys.stderr)
        raise typer.Exit(INTERRUPTED_AT_ONCE) from None
    except (typer.Exit, typer.Abort, typer.BadParameter):
        raise
    except Exception as error:
        from qlora_train.cli.bug_report import write_bug_report

        error.add_note(write_bug_report(error, function.func.__name__, function.keywords))
        raise


@contextmanager
def explained() -> Iterator[None]:
    """typer.Exit with a message and an exit code, in place of what a user or the machine can cause."""
    try:
        yield
    except (UserError, Interrupted) as error:
        print(fit_to_show(str(error)), file=sys.stderr)
        raise typer.Exit(error.exit_code) from None
    except BrokenPipeError:
        discard(sys.stdout)  # the reader of our output went away
        raise typer.Exit(NOBODY_READS) from None


def show_bug(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """The traceback of a bug of ours, without what could steer the terminal and without secrets."""
    print(fit_to_show("".join(traceback.format_exception(kind, error, trace))), file=sys.stderr)
