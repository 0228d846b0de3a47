"""`qlora-train adapter`: what an adapter is, and one adapter made out of others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from qlora_train.cli.verbs import AsJson, verb

adapter_app = typer.Typer(
    help="Tools for adapters: what one is, and new ones made of others. Nothing is written over.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
)

AdapterPath = Annotated[
    Path, typer.Argument(metavar="ADAPTER", help="A run folder, one of its checkpoints, or a folder that PEFT saved.")
]
Target = Annotated[
    Path, typer.Argument(metavar="DIR", help="The folder to write, laid out like a run's; it must not exist.")
]
CombinationType = Literal["cat", "ties", "dare"]
Modules = Annotated[bool, typer.Option("--modules", help="A line for every module, not one for every name.")]
Seed = Annotated[int, typer.Option(min=0, help="Of what is drawn at random.")]


@adapter_app.command("info")
@verb
def info(
    adapter: AdapterPath,
    modules: Modules = False,
    as_json: AsJson = False,
) -> None:
    """Method, rank, scaling, targets, norms and effective ranks, and the base that it belongs to."""
    from qlora_train import api
    from qlora_train.cli import show, show_adapter

    result = api.adapter_info(adapter)
    show.json_or(as_json, result, lambda: show_adapter.info(result, every_module=modules))


@adapter_app.command("combine")
@verb
def combine(
    adapters: Annotated[list[Path], typer.Argument(metavar="ADAPTER", help="Adapters of one base.")],
    target: Target,
    weight: Annotated[
        list[float] | None, typer.Option(help="Once for each adapter, in order; may be negative. Else 1 each.")
    ] = None,
    combination_type: Annotated[
        CombinationType,
        typer.Option(
            "--type",
            help="cat: the exact sum, ranks add up; ties, dare: values are taken out of each first, by --density.",
        ),
    ] = "cat",
    r: Annotated[int | None, typer.Option("--r", help="The nearest of this rank; its error is printed.")] = None,
    density: Annotated[float | None, typer.Option(help="Share of values that stay, for ties and dare.")] = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """The weighted sum of adapters."""
    from qlora_train import api
    from qlora_train.cli import show, show_adapter

    result = api.adapter_combine(
        adapters, target, weights=weight, combination_type=combination_type, r=r, density=density, seed=seed
    )
    show.json_or(as_json, result, lambda: show_adapter.made(result))


@adapter_app.command("resize")
@verb
def resize(
    adapter: AdapterPath,
    target: Target,
    r: Annotated[int | None, typer.Option("--r", help="This rank for every module; a larger one adds room.")] = None,
    energy: Annotated[
        float | None, typer.Option(help="The rank with which every module keeps this share of its energy, e.g. 0.95.")
    ] = None,
    error: Annotated[
        float | None, typer.Option(help="The rank whose error over all modules stays below this share, e.g. 0.1.")
    ] = None,
    per_module: Annotated[
        bool, typer.Option("--per-module", help="Each module its own rank (PEFT's rank_pattern): a smaller file.")
    ] = False,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """The nearest adapter of another rank; its error is known beforehand, measured, and printed."""
    from qlora_train import api
    from qlora_train.cli import show, show_adapter

    result = api.adapter_resize(adapter, target, r=r, energy=energy, error=error, per_module=per_module, seed=seed)
    show.json_or(as_json, result, lambda: show_adapter.resized(result))


@adapter_app.command("fold")
@verb
def fold(adapter: AdapterPath, target: Target, as_json: AsJson = False) -> None:
    """The same update as plain LoRA with scaling 1, for programs that know nothing else."""
    from qlora_train import api
    from qlora_train.cli import show, show_adapter

    result = api.adapter_fold(adapter, target)
    show.json_or(as_json, result, lambda: show_adapter.made(result))


@adapter_app.command("diff")
@verb
def diff(
    first: AdapterPath,
    second: Annotated[Path, typer.Argument(metavar="ADAPTER2", help="Another one, of the same base.")],
    modules: Modules = False,
    as_json: AsJson = False,
) -> None:
    """How far two adapters are from each other: distance, cosine and shared directions."""
    from qlora_train import api
    from qlora_train.cli import show, show_adapter

    result = api.adapter_diff(first, second)
    show.json_or(as_json, result, lambda: show_adapter.diff(result, every_module=modules))
