"""The verbs of the command line. Nothing heavy is imported before a verb runs, so that `--help` is quick."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from functools import partial, wraps
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn, ParamSpec, TextIO, cast

import typer

from qlora_train import __version__
from qlora_train.cli import complete
from qlora_train.cli.streams import SteadyStream, discard
from qlora_train.errors import Interrupted, OutOfMemory, UserError
from qlora_train.printable import fit_to_show

app = typer.Typer(
    name="qlora-train",
    help="Fine-tune language models in 4 bit, with evidence: every merge is compared with the model that was trained.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
)

P = ParamSpec("P")
INTERRUPTED_AT_ONCE = 128 + signal.SIGINT
NOBODY_READS = 128 + signal.SIGPIPE

RecipePath = Annotated[
    Path,
    typer.Argument(
        metavar="RECIPE", help="A recipe file, e.g. recipes/quickstart.yaml.", autocompletion=complete.recipes
    ),
]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder: the recipe's run.dir.")]
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
        with redirect_stderr(cast(TextIO, SteadyStream(sys.stderr))):
            _leave_removed_folder()
            _run(partial(function, *args, **kwargs))

    return run


def _run(function: Callable[[], None]) -> None:
    """Call a verb; typer.Exit with the exit code of what went wrong."""
    try:
        from qlora_train.cli.console import silence_libraries

        silence_libraries()
        function()
        sys.stdout.flush()
    except UserError as error:
        print(fit_to_show(str(error)), file=sys.stderr)
        raise typer.Exit(error.exit_code) from None
    except Interrupted as error:
        print(fit_to_show(str(error)), file=sys.stderr)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        print("interrupted; what was saved before is intact", file=sys.stderr)
        raise typer.Exit(INTERRUPTED_AT_ONCE) from None
    except BrokenPipeError:
        discard(sys.stdout)  # the reader of our output went away
        raise typer.Exit(NOBODY_READS) from None


@app.command()
@verb
def check(
    recipe: RecipePath,
    overrides: Overrides = None,
    list_modules: Annotated[
        bool, typer.Option("--list-modules", help="Show the linear layers that can be adapted.")
    ] = False,
    deep: Annotated[
        bool, typer.Option("--deep", help="Load the model too, and measure what training relies on: seconds.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Find every mistake in a recipe and its data before anything is loaded, and show rows as they will be trained."""
    from qlora_train import api
    from qlora_train.cli import show

    if deep:
        print("loading the model and measuring it ...", file=sys.stderr)
    result = api.check(recipe, overrides or (), deep=deep)
    show.json_or(as_json, result, lambda: show.check(result, list_modules=list_modules))
    result.refuse_failed()


@app.command()
@verb
def data(recipe: RecipePath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Account for every row of a recipe's data: kept, cut, dropped, rejected, duplicate; and show what is trained."""
    from qlora_train import api
    from qlora_train.cli import show

    result = api.data(recipe, overrides or ())
    show.json_or(as_json, result, lambda: show.data(result))


@app.command()
@verb
def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    gpu: Annotated[
        list[str] | None, typer.Option(help="A card, e.g. 'RTX 4090'. With --table it may be repeated.")
    ] = None,
    vram: Annotated[str | None, typer.Option(help="Memory of a card, e.g. 24GiB.")] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(help="In place of model.path: folder, hub id, GGUF file or config.json. Repeatable with --table."),
    ] = None,
    table: Annotated[bool, typer.Option("--table", help="Models x cards x sequence lengths: what fits.")] = False,
    as_json: AsJson = False,
) -> None:
    """Tell whether a run fits, before anything is downloaded: bytes by cause, what to change. Exits 9 if not."""
    from qlora_train import api
    from qlora_train.cli import show, show_plan

    gpus, models = gpu or [], model or []
    if table:
        if vram is not None:
            raise typer.BadParameter("--table takes cards by name: --gpu")
        cards = api.plan_cards(recipe, overrides or (), gpus=gpus, models=models)
        show.json_or(as_json, cards.as_dict(), lambda: show_plan.table(cards))
        return
    if len(gpus) > 1 or len(models) > 1:
        raise typer.BadParameter("several cards or models need --table")
    result = api.plan(recipe, overrides or (), vram=vram, gpu=next(iter(gpus), None), model=next(iter(models), None))
    show.json_or(as_json, result.as_dict(), lambda: show_plan.planned(result))
    if result.fits is False:
        raise typer.Exit(OutOfMemory.exit_code)


@app.command()
@verb
def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint that verifies.")] = False,
    from_step: Annotated[
        int | None, typer.Option("--from", metavar="STEP", help="With --resume: from this step.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train a recipe into its run folder."""
    from qlora_train import api
    from qlora_train.cli import show
    from qlora_train.cli.console import display

    if from_step is not None and not resume:
        raise typer.BadParameter("--from needs --resume")
    with display() as reporter:
        result = api.train(recipe, overrides or (), resume=resume, from_step=from_step, reporter=reporter)
    show.json_or(as_json, result, lambda: show.trained(result))


@app.command("eval")
@verb
def evaluate(
    run: RunPath,
    overrides: Overrides = None,
    rows: Annotated[Path | None, typer.Option(help="A JSONL file in place of the recipe's held-out rows.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure base and adapter side by side on held-out rows."""
    from qlora_train import api
    from qlora_train.cli import show

    result = api.evaluate(run, overrides or (), rows=rows)
    show.json_or(as_json, result, lambda: show.sides(result.base, result.adapter))


@app.command()
@verb
def export(
    run: RunPath,
    target: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to write; it must not exist.")],
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Merge the adapter, compare the result with the trained model, and publish it if it is the same."""
    from qlora_train import api
    from qlora_train.cli import show

    result = api.export(run, target, overrides or ())
    show.json_or(as_json, result, lambda: show.exported(result))


@app.command()
@verb
def chat(
    folder: Annotated[Path, typer.Argument(metavar="RUN_OR_DIR", help="A run folder or an exported model.")],
    once: Annotated[str | None, typer.Option(help="Answer this one message and end; for scripts.")] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    adapter: Annotated[list[Path] | None, typer.Option(help="A further run on the same base; may be repeated.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the most likely token.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the sampling, where temperature is above 0.")] = 0,
) -> None:
    """Talk to a trained model. /adapter NAME and /base switch who answers, /clear forgets, /exit ends."""
    from qlora_train import api
    from qlora_train.cli.talk import talk

    session = api.open_chat(folder, adapters=adapter or (), system=system)
    talk(session, once=once, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)


@app.command()
@verb
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN [RUN2]...", help="Run folders; several come side by side.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="The page; else report.html in the run folder, or here for several runs.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write one page about a run: curves, answers, memory, data, adapter, merge, recipe, versions."""
    from qlora_train import api
    from qlora_train.cli import show, show_report

    result = api.report(runs, out)
    show.json_or(as_json, result, lambda: show_report.reported(result))


@app.command()
@verb
def env(as_json: AsJson = False) -> None:
    """Print versions and machine, as a bug report needs them."""
    from qlora_train import api
    from qlora_train.cli import show

    result = api.env()
    show.json_or(as_json, result, lambda: show.environment(result))


@app.callback(invoke_without_command=True)
def version(
    show_version: Annotated[bool, typer.Option("--version", help="Print the version and end.")] = False,
) -> None:
    """Options before a verb."""
    if show_version:
        print(__version__)
        raise typer.Exit


def main(arguments: Sequence[str] | None = None) -> Any:
    """Entry point of `qlora-train`; ends the process."""
    return app(args=list(arguments) if arguments is not None else None)
