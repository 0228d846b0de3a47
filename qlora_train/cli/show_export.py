"""What came of an export: the verdict, what was measured to choose the base, the noise, the time."""

from __future__ import annotations

import sys

from rich.table import Table
from rich.text import Text

from qlora_train.api import ExportResult
from qlora_train.cli.results import new_table, stdout
from qlora_train.export.card import ONTO_WORDS
from qlora_train.export.choice import Choice
from qlora_train.export.noise import Noise, Quantiles
from qlora_train.export.verify import MAX_DEVIATION, Verdict
from qlora_train.printable import printable


def stage(line: str) -> None:
    """What the export is doing, on stderr."""
    print(f"{printable(line)} ...", file=sys.stderr, flush=True)


def exported(result: ExportResult) -> None:
    """Everything that a user decides by, the verdict last."""
    if result.choice is not None:
        choice(result.choice)
    if result.noise is not None:
        _noise(result.noise)
    _verdict(result.verdict)
    if result.left_out:
        names = ", ".join(map(printable, result.left_out[:3])) + (", ..." if len(result.left_out) > 3 else "")
        _say(f"left out: {len(result.left_out)} tensors of the base's files that the model does not use ({names})")
    _say(f"{result.num_golden_prompts} golden prompts: the exported tokenizer gives them the token ids of training")
    if result.licence is not None:
        _say(
            f"licence of the base: {printable(result.licence.own_name or result.licence.name)}"
            if result.licence.name
            else "licence: the base's files name none; export.license=NAME puts one into the card"
        )
    spent = ", ".join(f"{what} {seconds:,.1f} s" for what, seconds in result.seconds.items() if seconds >= 0.05)
    _say(f"{spent}; peak memory {result.peak_memory_bytes / 2**30:.2f} GiB")
    if result.num_taken_over:
        _say(f"{result.num_taken_over} finished shards of an export that was killed were taken over")
    _say(f"{result.num_modules} layers merged, {result.num_bytes / 2**20:,.0f} MiB: {result.folder}")
    if result.pushed_to:
        _say(f"uploaded: {result.pushed_to}")


def _verdict(verdict: Verdict) -> None:
    """Distances from the trained model, and what follows."""
    table = new_table("distance from the trained model", "merged", "adapter off")
    merged, off = verdict.merged, verdict.adapter_off
    table.add_row("mean KL (nats per token)", f"{merged.mean_kl:.2e}", f"{off.mean_kl:.2e}")
    table.add_row("same most likely token", f"{merged.top1_agreement:.2%}", f"{off.top1_agreement:.2%}")
    losses = (f"{merged.candidate_nll:.4f}", f"{off.candidate_nll:.4f}")
    table.add_row(f"loss (trained: {merged.reference_nll:.4f})", *losses)
    stdout.print(table)
    how = "" if verdict.how == "whole" else ", one layer at a time"
    where = f"on {merged.num_tokens:,} tokens of {verdict.num_rows} {verdict.split} rows, in float32{how}"
    if verdict.onto == "original":
        _say(
            f"accepted as another model than the trained one: merged onto the original weights, its loss differs by "
            f"{verdict.loss_rise:+.4f} nats per token (limit {verdict.max_loss_rise:+.4f}), {where}"
        )
    else:
        _say(
            f"accepted: the merged model's KL is {verdict.kl_frac:.3%} of the adapter's effect (limit "
            f"{verdict.max_kl_frac:.1%}), {where}"
        )
    if verdict.worst_layer is not None:
        _say(
            f"every layer by itself is off by what rounding explains: at most {verdict.worst_layer.ratio:.1f} times "
            f"(limit {MAX_DEVIATION:g}), in {printable(verdict.worst_layer.name)}"
        )


def choice(measured: Choice) -> None:
    """The ways to merge side by side."""
    table = new_table("merged onto", "mean KL", "same next token", "loss", "exact match")
    trained = measured.candidates[0].distance.reference_nll
    table.add_row("(the trained model)", "0", "100.00%", f"{trained:.4f}", _share(measured.trained_exact_match))
    for candidate in measured.candidates:
        found = candidate.distance
        table.add_row(
            ONTO_WORDS[candidate.onto],
            f"{found.mean_kl:.2e}",
            f"{found.top1_agreement:.2%}",
            f"{found.candidate_nll:.4f}",
            _share(candidate.exact_match),
        )
    stdout.print(table)
    answers = f"; exact match on {measured.num_answers} answers" if measured.num_answers else ""
    _say(f"{measured.num_rows} {measured.split} rows{answers}. {measured.sentence}\n")


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _noise(found: Noise) -> None:
    """Quantiles over the adapted weights, the five that are nearest to the noise, and a sentence."""
    table = new_table("the change of a weight, over", "least", "quarter", "median", "3 quarters", "most")
    _quantiles(table, "its own norm", found.over_weight)
    _quantiles(table, "its quantisation error", found.over_quant_error)
    _quantiles(table, "its rounding here", found.over_rounding)
    stdout.print(table)
    nearest = ", ".join(
        f"{printable(row.name.removesuffix('.weight'))} ({row.delta_norm / row.rounding_norm:.1f} x rounding)"
        if row.rounding_norm
        else printable(row.name.removesuffix(".weight"))
        for row in found.worst
    )
    _say(f"nearest to the noise: {nearest}")
    _say(f"{found.num_modules} weights: {found.reading}.\n")


def _quantiles(table: Table, name: str, values: Quantiles | None) -> None:
    if values is not None:
        cells = (values.least, values.quarter, values.median, values.three_quarters, values.most)
        table.add_row(name, *(f"{value:.3g}" for value in cells))


def _say(line: str) -> None:
    stdout.print(Text(line), soft_wrap=True)
