"""What came of exporting formats: the distance of each from the trained model, and how to serve it."""

from __future__ import annotations

from dataclasses import replace

from rich.text import Text

from qlora_train.api import FormatResult, FormatsResult, Heard
from qlora_train.cli import show_export
from qlora_train.cli.results import new_table, stdout
from qlora_train.printable import printable


def stages() -> Heard:
    """Only what the export is doing, on stderr."""
    return Heard(stage=show_export.stage)


def everything() -> Heard:
    """What was measured and what was published as well, as soon as it is known."""
    return Heard(stage=show_export.stage, choice=show_export.choice, published=published)


def exported(result: FormatsResult) -> None:
    """What is left to say at the end: the merged model, and what was uploaded."""
    if result.merged is not None:
        show_export.exported(replace(result.merged, choice=None))  # it was shown when it was measured
    for one in result.formats:
        if one.pushed_to is not None:
            _say(f"uploaded {one.format}: {printable(one.pushed_to)}")


def published(result: FormatResult) -> None:
    """One format, as it is published."""
    verdict, exported = result.verdict, result.verdict.merged
    table = new_table(result.format, "as published", "adapter off")
    table.add_row("mean KL (nats per token)", f"{exported.mean_kl:.2e}", f"{verdict.adapter_off.mean_kl:.2e}")
    table.add_row(
        "same most likely token", f"{exported.top1_agreement:.2%}", f"{verdict.adapter_off.top1_agreement:.2%}"
    )
    losses = (f"{exported.candidate_nll:.4f}", f"{verdict.adapter_off.candidate_nll:.4f}")
    table.add_row(f"loss (trained: {exported.reference_nll:.4f})", *losses)
    stdout.print(table)
    where = f"{exported.num_tokens:,} tokens of {verdict.num_rows} {verdict.split} rows, read back from the files"
    if verdict.onto == "original":
        said = f"accepted as another model than the trained one, {verdict.loss_rise:+.4f} nats per token of loss"
    elif verdict.kl_frac <= verdict.max_kl_frac:
        said = f"accepted: KL is {verdict.kl_frac:.3%} of the adapter's effect (limit {verdict.max_kl_frac:.1%})"
    else:
        said = (
            f"accepted by export.max_kl={verdict.max_kl:g}: KL is {verdict.kl_frac:.1%} of the adapter's effect: "
            "this is not quite the model that was trained"
        )
    _say(f"{said}, on {where}")
    for notice in result.notices:
        _say(f"note: {printable(notice)}")
    _say(f"{result.title}, {result.num_bytes / 2**20:,.0f} MiB: {printable(str(result.folder))}")
    for command in result.commands:
        _say(f"    {printable(command)}")
    _say("")


def _say(line: str) -> None:
    stdout.print(Text(line), soft_wrap=True)
