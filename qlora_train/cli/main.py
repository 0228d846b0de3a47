"""The verbs of the command line. Nothing heavy is imported before a verb runs, so that `--help` is quick."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from qlora_train import __version__
from qlora_train.cli import complete
from qlora_train.cli.adapter_verbs import adapter_app
from qlora_train.cli.streams import steady_streams
from qlora_train.cli.verbs import AsJson, Overrides, RecipePath, RunPath, explained, show_bug, verb
from qlora_train.errors import OutOfMemory

app = typer.Typer(
    name="qlora-train",
    help="Fine-tune language models in 4 bit, with evidence: every merge is compared with the model that was trained.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
)
app.add_typer(adapter_app, name="adapter")


@app.command(short_help="Every mistake in recipe and data, before anything is loaded.")
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


@app.command(short_help="The fate of every row; writes a page.")
@verb
def data(recipe: RecipePath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Account for every row of a recipe's data: kept, cut, dropped, rejected, duplicate; and show what is trained."""
    from qlora_train import api
    from qlora_train.cli import show

    result = api.data(recipe, overrides or ())
    show.json_or(as_json, result, lambda: show.data(result))


@app.command(short_help="Memory by cause, before anything is downloaded.")
@verb
def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    gpu: Annotated[
        list[str] | None,
        typer.Option(help="A card, e.g. 'RTX 4090'. With --table it may be repeated.", autocompletion=complete.cards),
    ] = None,
    vram: Annotated[str | None, typer.Option(help="Memory of a card, e.g. 24GiB (24GB is 22.35GiB).")] = None,
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
    if not result.fits:
        raise typer.Exit(OutOfMemory.exit_code)


@app.command()
@verb
def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint that verifies.")] = False,
    from_step: Annotated[
        int | None,
        typer.Option("--from", metavar="STEP", help="With --resume: from this step; later ones go."),
    ] = None,
    allow_change: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SECTION.KEY",
            help="With --resume: go on although this key is not as it was, as a recorded fork. Repeatable.",
        ),
    ] = None,
    replay: Annotated[
        bool,
        typer.Option("--replay", help="With --resume: only make logged steps again, and compare."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train a recipe into its run folder."""
    from qlora_train import api
    from qlora_train.cli import show, show_replay
    from qlora_train.cli.console import display

    given = (("--from", from_step is not None), ("--allow-change", bool(allow_change)), ("--replay", replay))
    if missing := [option for option, is_given in given if is_given and not resume]:
        raise typer.BadParameter(f"{', '.join(missing)} needs --resume")
    if replay and allow_change:
        raise typer.BadParameter("--replay compares a run with itself: --allow-change has no place in it")
    if replay:
        with display() as reporter:
            found = api.replay(recipe, overrides or (), from_step=from_step, reporter=reporter)
        show.json_or(as_json, found, lambda: show_replay.replayed(found))
        found.refuse_other()
        return
    with display() as reporter:
        result = api.train(
            recipe,
            overrides or (),
            resume=resume,
            from_step=from_step,
            allow_change=allow_change or (),
            reporter=reporter,
        )
    show.json_or(as_json, result, lambda: show.trained(result))


@app.command("eval")
@verb
def evaluate(
    run: RunPath,
    overrides: Overrides = None,
    rows: Annotated[Path | None, typer.Option(help="A source of rows in place of the recipe's held-out ones.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure base and adapter side by side on held-out rows."""
    from qlora_train import api
    from qlora_train.cli import show

    result = api.evaluate(run, overrides or (), rows=rows)
    show.json_or(as_json, result, lambda: show.sides(result.base, result.adapter))


@app.command(short_help="Merge, compare with the trained model, publish.")
@verb
def export(
    run: RunPath,
    target: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to write; it must not exist.")],
    overrides: Overrides = None,
    push: Annotated[
        str | None,
        typer.Option(metavar="ORG/NAME", help="Upload it to the hub afterwards; a new repository is private."),
    ] = None,
    formats: Annotated[
        list[str] | None,
        typer.Option("--format", metavar="NAME", help="gguf-f16, gguf-q8_0, lora, w4a16, ...; may be repeated."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Merge the adapter, compare the result with the trained model, and publish it if it is the same.

    export.base=auto measures what to merge onto: the dequantised base, or the original weights. With --format, what
    servers load: a name that there is not lists them all. Several go into folders of their own below DIR, and --push
    uploads each but safetensors to a repository of its own, ORG/NAME-FORMAT.
    """
    from qlora_train import api
    from qlora_train.cli import show, show_export, show_formats

    if formats:
        heard = show_formats.stages() if as_json else show_formats.everything()
        found = api.export_formats(run, target, formats, overrides or (), push=push, heard=heard)
        show.json_or(as_json, found, lambda: show_formats.exported(found))
        return
    result = api.export(run, target, overrides or (), push=push, say=show_export.stage)
    show.json_or(as_json, result, lambda: show_export.exported(result))


@app.command(short_help="Talk to a run or an exported model.")
@verb
def chat(
    folder: Annotated[Path, typer.Argument(metavar="RUN_OR_DIR", help="A run folder or an exported model.")],
    once: Annotated[str | None, typer.Option(help="Answer this one message and end; for scripts.")] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    adapter: Annotated[list[Path] | None, typer.Option(help="A further run on the same base; may be repeated.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0: the most likely token; 1: as the model has it.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the sampling, where temperature is above 0.")] = 0,
) -> None:
    """Talk to a trained model. /adapter NAME and /base switch who answers, /clear forgets, /exit ends."""
    from qlora_train import api
    from qlora_train.cli.talk import talk

    session = api.open_chat(folder, adapters=adapter or (), system=system)
    talk(session, once=once, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)


@app.command(short_help="One page about a run, or several side by side.")
@verb
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN [RUN2]...", help="Run folders; several come side by side.", autocompletion=complete.runs
        ),
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
def analyze(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run folder, one of its checkpoints, or a folder that PEFT saved.")
    ],
    second: Annotated[
        Path | None, typer.Argument(metavar="[RUN2]", help="Another one, to compare their directions.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="A folder for the plots (SVG, PNG) and the figures; it must not exist.")
    ] = None,
    no_base: Annotated[
        bool, typer.Option("--no-base", help="Do not read the base: no amplification, no start; seconds.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Look inside an adapter: spectra, ranks, start, amplification; of two: which directions they share."""
    from qlora_train import api
    from qlora_train.cli import show, show_analysis

    if not no_base:
        print("reading the base ...", file=sys.stderr)
    result = api.analyze([run, *([second] if second else [])], out, with_base=not no_base)
    show.json_or(as_json, result, lambda: show_analysis.analysis(result, out))


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
    sys.excepthook = show_bug
    with steady_streams():
        try:
            with explained():  # what is printed outside of a verb: --help, --version
                try:
                    app(args=list(arguments) if arguments is not None else None)
                finally:
                    sys.stdout.flush()
        except typer.Exit as end:
            raise SystemExit(end.exit_code) from None
