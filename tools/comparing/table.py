"""The comparison as plain figures, as a table on the terminal and as Markdown: one row a method, ordered by loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from comparing.entrants import REFERENCE, VERDICT
from comparing.sweep import Compared

COLUMNS = (
    "method",
    "rate",
    "held-out loss",
    "similarity",
    "spelling",
    "trained",
    "step time",
    "memory",
    "KL of export",
)
NOTES = (
    "rate: the best of a grid of factors of two, tried on a quarter of the training rows and chosen by other training "
    "rows; * the best one tried is at the end of the grid",
    "held-out loss: nats per supervised token of `shell`, mean over the seeds and half their distance",
    "similarity: characters of generated commands in common with the reference; spelling: exact match",
    "trained: parameters, in millions; step time and memory: as a multiple of LoRA's, in turns at the same packs; "
    "memory counts the tensors of a training step, the base included",
    "KL of export: merged model from trained model, nats per token; in brackets its share of the adapter's effect",
)


def figures(compared: Sequence[Compared]) -> list[dict[str, Any]]:
    """One entry an entrant, the least held-out loss first; what was not measured is None, what failed says why."""
    memory = next((_mean(each, "memory_bytes") for each in compared if each.entrant.name == REFERENCE), None)
    rows = [_figure(each, memory) for each in compared]
    return sorted(rows, key=lambda row: (row["loss"] is None, row["loss"] or 0.0))


def _figure(each: Compared, reference_memory: float | None) -> dict[str, Any]:
    results = [entry.result for entry in each.finals if entry.result is not None]
    losses = [float(result["loss"]) for result in results]
    scores = [result["scores"]["char_similarity"] for result in results if result.get("scores")]
    export = next((result["export"] for result in results if "export" in result), None)
    memory = _mean(each, "memory_bytes")
    spelling = each.spelling.result if each.spelling else None
    cost = each.cost.result if each.cost else None
    return {
        "name": each.entrant.name,
        "title": each.entrant.title,
        "note": each.entrant.note,
        "rates": {f"{rate:g}": loss if loss < float("inf") else None for rate, loss in sorted(each.rates.items())},
        "rate": each.rate,
        "rate_is_inside": each.rate_is_inside if each.rates else None,  # None: not searched, the first guess
        "loss": mean(losses) if losses else None,
        "loss_spread": (max(losses) - min(losses)) / 2 if len(losses) > 1 else None,
        "losses": losses,
        "base_loss": results[0]["base_loss"] if results else None,
        "similarity": mean(scores) if scores else None,
        "exact_match": spelling["scores"]["exact_match"] if spelling and spelling.get("scores") else None,
        "num_trainable": int(results[0]["num_trainable"]) if results else None,
        "time_ratio": 1.0 if each.entrant.name == REFERENCE else (cost["time_ratio"] if cost else None),
        "time_spread": [cost["lowest"], cost["highest"]] if cost else None,
        "memory_ratio": memory / reference_memory if memory and reference_memory else None,
        "export": export,
        "failures": [entry.failed for entry in each.entries() if entry.failed] + _crash(export),
    }


def _crash(export: Mapping[str, Any] | None) -> list[str]:
    return [f"its export {export['crashed']}"] if export and "crashed" in export else []


def _mean(each: Compared, key: str) -> float | None:
    values = [entry.result[key] for entry in each.finals if entry.result and entry.result.get(key)]
    return mean(values) if values else None


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row as people read it; what was not measured is empty."""
    loss = "" if row["loss"] is None else f"{row['loss']:.3f}"
    if row["loss_spread"] is not None:
        loss += f" ± {row['loss_spread']:.3f}"
    if row["loss"] is None and row["failures"]:
        loss = row["failures"][0].partition(":")[0]
    mark = {True: "", False: " *", None: " (guess)"}[row["rate_is_inside"]]
    kl = ""
    if row["export"]:
        kl = _kl(row["export"])
    return [
        row["title"],
        f"{row['rate']:.2g}{mark}",
        loss,
        _number(row["similarity"], "{:.3f}"),
        _number(row["exact_match"], "{:.3f}") if row["name"] in VERDICT else "",
        _number(row["num_trainable"], "{:.2f}", 1e-6),
        _number(row["time_ratio"], "{:.2f}"),
        _number(row["memory_ratio"], "{:.2f}"),
        kl,
    ]


def _kl(export: Mapping[str, Any]) -> str:
    if "kl" not in export:
        return "no merge" if "refused" in export else "crashed"
    share = export["kl"] / export["effect_kl"] if export["effect_kl"] else float("inf")
    return f"{export['kl']:.1e} ({share:.2%})"


def _number(value: float | None, form: str, scale: float = 1.0) -> str:
    return "" if value is None else form.format(value * scale)


def markdown(report: Mapping[str, Any]) -> str:
    """The table for a page, from what `compare_methods.py` wrote: its notes, and what is missing, below it."""
    rows = report["rows"]
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells(row)) + " |" for row in rows]
    lines += ["", *(f"* {note}." for note in NOTES)]
    lines += [f"* {row['title']}: {row['note']}." for row in rows if row["note"]]
    lines += [f"* {row['title']}: {failure}." for row in rows for failure in row["failures"]]
    if report["sample"]:
        lines.append(
            "* A sample: few rows, one seed, no search for rates. It shows that all of this runs, not who wins."
        )
    if sources := report.get("sources"):
        lines.append(f"* Made with: {'; '.join(sources)}.")
    if (cost := report.get("cost_sources")) and cost != sources:
        lines.append(f"* Step times were taken with: {'; '.join(cost)}.")
    if report["missing"]:
        lines.append(f"* Not measured yet: {', '.join(report['missing'])}.")
    return "\n".join(lines)
