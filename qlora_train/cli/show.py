"""Results as tables on stdout, or as one JSON object."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from rich.text import Text

from qlora_train.api import CheckResult, DataResult, TrainResult
from qlora_train.cli.results import new_table, stdout
from qlora_train.data.audit import Audit
from qlora_train.data.preview import PreviewRow
from qlora_train.evaluate.sides import SideScores
from qlora_train.plain import to_plain
from qlora_train.printable import printable
from qlora_train.train.deepcheck import Finding
from qlora_train.units import size_text

SAMPLES = 3


def json_or(as_json: bool, result: Any, show: Callable[[], None]) -> None:
    """Print a result for a machine or for a person."""
    if as_json:
        print(json.dumps(to_plain(result)))  # as ASCII: nothing in it steers a terminal
    else:
        show()


def check(result: CheckResult, *, list_modules: bool) -> None:
    """The audit lines, and the first rows with what is trained in bold green."""
    for audit in result.audits:
        _audit(audit)
    steps = _count(result.num_steps, "optimiser step", "optimiser steps")
    stdout.print(Text(f"{result.num_params / 1e6:,.1f}M parameters; {steps}"))
    for notice in result.notices:
        stdout.print(Text(notice))
    if list_modules:
        table = new_table("linear layer", "layers")
        for name, count in result.linear_layers.items():
            table.add_row(name, str(count))
        stdout.print(table)
    _rows(result.preview)
    if result.findings:
        _findings(result.findings)
    if all(finding.ok for finding in result.findings):
        stdout.print(Text("The recipe is sound."))


def _findings(findings: Sequence[Finding]) -> None:
    """A line for each check of a deep check."""
    table = new_table("measured on the model", "", "must be", "", of_words=("", "must be"))
    for finding in findings:
        verdict = Text("ok", "green") if finding.ok else Text("FAILS", "bold red")
        table.add_row(*(Text(printable(text)) for text in (finding.what, finding.measured, finding.bar)), verdict)
    stdout.print(Text())
    stdout.print(table)


def data(result: DataResult) -> None:
    """The account of the data: fates, sources, duplicates, overlap, batching, and rows with what is trained."""
    account = result.account
    for split in account.splits:
        _audit(split.audit)
        table = new_table("source", "format", "weight", "rows", "used")
        for source in split.audit.sources:
            counts = (f"{source.weight:g}", f"{source.num_rows:,}", f"{source.num_trained:,}")
            table.add_row(printable(source.name), source.format, *counts)
        stdout.print(table)
        near = split.near_duplicates
        stdout.print(
            Text(
                f"{_count(split.duplicates.num_duplicates, 'row repeats', 'rows repeat')} an earlier one, "
                f"{_count(near.num_near, 'nearly does', 'nearly do')} "
                f"({near.num_compared:,} compared{', a random sample' if near.sampled else ''}; "
                f"{near.num_too_short:,} too short to compare)"
            )
        )
        for pair in (*split.duplicates.examples[:3], *near.examples[:3]):
            stdout.print(Text(f"  {printable(pair.second)} is like {printable(pair.first)} ({pair.similarity:.0%})"))
        stdout.print()
    if account.overlap:
        found = account.overlap
        stdout.print(
            Text(
                f"of {found.num_eval_rows:,} held-out rows {found.num_rows:,} are trained on too, and "
                f"{found.num_prompts:,} ask what a training row asks"
            )
        )
    batching = account.batching
    stdout.print(
        Text(
            f"{batching.kind}: {batching.num_lines:,} {'packs' if batching.kind == 'packed' else 'rows'} an epoch, "
            f"{batching.padding_frac:.2%} padding; {batching.num_steps:,} optimiser steps in all"
        )
    )
    if batching.num_unreached_rows:
        what = "kept rows come in none of these steps: raise train.epochs, train.max_steps or a source's weight"
        stdout.print(Text(f"{batching.num_unreached_rows:,} {what}"))
    for split in account.splits[:1]:
        _rows(split.rows)
    stdout.print(Text(f"the whole account: {result.page}"), soft_wrap=True)


def _count(number: int, one: str, many: str) -> str:
    """A number with its words.

    >>> _count(1, "row repeats", "rows repeat"), _count(0, "row repeats", "rows repeat")
    ('1 row repeats', '0 rows repeat')
    """
    return f"{number:,} {one if number == 1 else many}"


def _audit(audit: Audit) -> None:
    """A split's line, and the reasons of the rows that are not trained on whole."""
    stdout.print(Text(audit.summary()))
    for entry in audit.reasons[:20]:
        if entry.fate not in ("held_out", "not_selected"):
            stdout.print(Text(f"  {entry.count:,} {entry.fate}: {printable(entry.examples[0])}"))
    if audit.num_plain_specials:
        stdout.print(Text(f"  {audit.num_plain_specials:,} special tokens written in content are encoded as text"))
    if audit.num_control_specials:
        what = "special tokens written in verbatim rows are control tokens"
        stdout.print(Text(f"  {audit.num_control_specials:,} {what}"))
    if audit.num_context_turns:
        what = "earlier answers are not trained: the chat template drops their reasoning"
        stdout.print(Text(f"  {audit.num_context_turns:,} {what}"))


def _rows(rows: Sequence[PreviewRow]) -> None:
    stdout.print(Text("\nRows as they are trained: tokens between bars, supervised ones in brackets and green."))
    for row in rows:
        line = Text(f"{printable(row.where)}{f' ({row.reason})' if row.reason else ''}\n  ")
        for part in (row.tokens, row.tail):
            for text, weight in part:
                line.append(f"[{text}]" if weight else f"{text}|", "bold green" if weight else "dim")
            if part is row.tokens and row.num_left_out:
                line.append(f" ... {row.num_left_out:,} tokens ... ")
        stdout.print(line, soft_wrap=True)


def sides(base: SideScores, adapter: SideScores) -> None:
    """Base against adapter, and a few answers of both."""
    table = new_table("", "base", "adapter")
    table.add_row("held-out loss (nats per supervised token)", f"{base.loss:.4f}", f"{adapter.loss:.4f}")
    table.add_row("perplexity", f"{base.perplexity:.2f}", f"{adapter.perplexity:.2f}")
    if base.scores and adapter.scores:
        for label, field in (
            ("exact match", "exact_match"),
            ("first word", "first_word"),
            ("character similarity", "char_similarity"),
        ):
            values = (getattr(base.scores, field), getattr(adapter.scores, field))
            table.add_row(label, *(f"{v:.3f}" if field == "char_similarity" else f"{v:.1%}" for v in values))
    stdout.print(table)
    stdout.print(
        Text(
            f"{adapter.num_rows} rows, {adapter.num_supervised_tokens:,} supervised tokens"
            + (f"; {adapter.scores.num_answers} generated answers" if adapter.scores else "")
        )
    )
    for before, after in list(zip(base.answers, adapter.answers, strict=True))[:SAMPLES]:
        stdout.print()
        rows = (
            ("asked", before.asked),
            ("before", before.text),
            ("after", after.text),
            ("wanted", after.reference),
        )
        for label, text in rows:
            stdout.print(Text(f"{label:>7}: ", "bold") + Text(_one_line(text)), soft_wrap=True)


def _one_line(text: str, limit: int = 160) -> str:
    flat = printable(" ".join(text.split()))
    return flat if len(flat) <= limit else flat[:limit] + "..."


def trained(result: TrainResult) -> None:
    """What came of a run."""
    if result.base and result.adapter:
        sides(result.base, result.adapter)
        stdout.print()
    best = f", best at step {result.best_step}" if result.best_step else ""
    stdout.print(
        Text(
            f"{result.num_steps} steps{best}; {result.supervised_tokens_per_s:,.0f} supervised tokens/s "
            f"({result.tokens_per_s:,.0f} in all); peak memory {result.peak_memory_bytes / 2**30:.2f} GiB; "
            f"{result.wall_s:,.0f} s"
        )
    )
    if result.planned_memory_bytes and result.measured_memory_bytes:
        off = result.measured_memory_bytes / result.planned_memory_bytes - 1
        planned, measured = size_text(result.planned_memory_bytes), size_text(result.measured_memory_bytes)
        stdout.print(Text(f"tensors of a training step: {planned} planned, {measured} measured ({off:+.1%})"))
    stdout.print(Text(f"run folder: {result.run_dir}"), soft_wrap=True)


def environment(facts: dict[str, Any]) -> None:
    """One fact per line."""
    for key, value in facts.items():
        if isinstance(value, dict):
            for name, version in value.items():
                stdout.print(Text(printable(f"{name:<16} {version}")), soft_wrap=True)
        else:
            stdout.print(Text(printable(f"{key:<16} {value}")), soft_wrap=True)
