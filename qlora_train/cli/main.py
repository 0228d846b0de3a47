"""The verbs of the command line. Nothing heavy is imported before a verb runs, so that `--help` is quick."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn, ParamSpec

import typer

from qlora_train import __version__
from qlora_train.errors import Interrupted, UserError

app = typer.Typer(
    name="qlora-train",
    help="Fine-tune language models in 4 bit, with evidence: every merge is compared with the model that was trained.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    add_completion=False,
)

P = ParamSpec("P")
INTERNAL_ERROR = 1
INTERRUPTED_AT_ONCE = 130

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe file, e.g. recipes/quickstart.yaml.")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder: the recipe's run.dir.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Values in place of the recipe's, e.g. train.epochs=2."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object; everything else to stderr.")]


def _quiet_libraries() -> None:
    """No telemetry, no progress bars of libraries, set before any of them loads."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TQDM_DISABLE", "1")


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise Interrupted(number, "stopped; nothing half-written was left")


def verb(function: Callable[P, None]) -> Callable[P, None]:
    """Turn the errors of a verb into a message and an exit code."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        _quiet_libraries()
        from qlora_train.cli.console import silence_libraries

        silence_libraries()
        # A verb without a handler of its own must still run its clean-up: temporary folders go.
        signal.signal(signal.SIGTERM, _terminate)
        try:
            function(*args, **kwargs)
        except UserError as error:
            print(error, file=sys.stderr)
            raise typer.Exit(error.exit_code) from None
        except Interrupted as error:
            print(error, file=sys.stderr)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            print("interrupted; what was saved before is intact", file=sys.stderr)
            raise typer.Exit(INTERRUPTED_AT_ONCE) from None
        except BrokenPipeError:
            # The reader of our output went away; Python would complain again while flushing at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(INTERNAL_ERROR) from None

    return run


@app.command()
@verb
def check(
    recipe: RecipePath,
    overrides: Overrides = None,
    list_modules: Annotated[
        bool, typer.Option("--list-modules", help="Show the linear layers that can be adapted.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Find every mistake in a recipe and its data before anything is loaded, and show rows as they will be trained."""
    from qlora_train import api
    from qlora_train.cli import show

    result = api.check(recipe, overrides or ())
    show.json_or(as_json, result, lambda: show.check(result, list_modules=list_modules))


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
