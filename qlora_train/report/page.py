"""The report as one HTML page: no scripts, nothing from elsewhere, safe whatever stands in the run folders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qlora_train.data.page import percent, templates
from qlora_train.report import story, tables
from qlora_train.report.answers import answer_groups, balance
from qlora_train.report.charts import heat_map
from qlora_train.report.curves import Chart, curve_charts, marks_of
from qlora_train.report.facts import RunFacts
from qlora_train.report.flights import flight_views
from qlora_train.report.happened import advice, ending, numbered
from qlora_train.report.memory import memory_view
from qlora_train.report.method import method_charts
from qlora_train.report.norms import norm_grid
from qlora_train.report.svg import COLOURS, page_style
from qlora_train.report.words import plain

GENERATOR = "qlora-train report"
"""What the page's head says it was made by: only such a page is written over."""
MAX_RUNS = COLOURS  # side by side
MAX_REASONS = 12

Json = dict[str, Any]


def render_page(runs: Sequence[RunFacts]) -> str:
    """The page of one run, or of up to MAX_RUNS side by side; the same runs give the same bytes."""
    assert 1 <= len(runs) <= MAX_RUNS
    return templates("qlora_train.report").get_template("page.html.jinja").render(_view(runs))


def _view(runs: Sequence[RunFacts]) -> Json:
    """Everything the template shows, as texts without control characters."""
    happened = numbered(runs)
    with page_style():
        marks = marks_of(happened)
        charts = [*curve_charts(runs, marks), *method_charts(runs, marks)]
        memory = [memory_view(run, f"memory{index}") for index, run in enumerate(runs)]
        norms = [_norms(run, f"norms{index}", _top(runs)) for index, run in enumerate(runs)]
    return {
        "generator": GENERATOR,
        "names": [run.name for run in runs],
        "sentences": [story.sentence(run) for run in runs],
        "notes": [[plain(note) for note in run.notes] for run in runs],
        "tiles": story.tiles(runs[0]) if len(runs) == 1 else [],
        "warnings": story.comparability(runs) if len(runs) > 1 else [],
        "figures": tables.figures(runs),
        "differing": tables.differing_settings(runs) if len(runs) > 1 else [],
        "endings": [plain(advice(end)) if (end := ending(run)) else "" for run in runs],
        "charts": charts,
        "happened": happened,
        "flights": [flight_views(run) for run in runs],
        "answers": answer_groups(runs),
        "balances": [balance(run) for run in runs],
        "memory": memory,
        "splits": [(name, tables.split_rows(runs, name)) for name in ("train", "eval")],
        "overlap": tables.overlap_rows(runs),
        "reasons": [_reasons(run) for run in runs],
        "sources": [_sources(run) for run in runs],
        "norms": norms,
        "merge": tables.merge_rows(runs),
        "stale_exports": [_stale(run) for run in runs],
        "settings": [
            [(plain(s.key), plain(s.value), plain(s.origin), s.is_default) for s in run.settings] for run in runs
        ],
        "versions": tables.version_rows(runs),
        "fingerprints": tables.fingerprint_rows(runs),
    }


def _top(runs: Sequence[RunFacts]) -> dict[str, float]:
    """The largest value of each norm in any run: the full colour of all heat maps."""
    return {
        factor: max(
            (
                value
                for run in runs
                if run.adapter
                for row in norm_grid(run.adapter.norms, factor).values
                for value in row
                if value is not None
            ),
            default=0.0,
        )
        for factor in _FACTORS
    }


_FACTORS = {
    "delta_weight": ("||scaling \N{MIDDLE DOT} B A||", "The update of the weights. "),
    "lora_A": ("||A||", "Random at the start of plain LoRA. "),
    "lora_B": ("||B||", "Zero at the start of plain LoRA. "),
}
_FOLDED = "Of the update as one product of two factors; what trained were others. "


def _norms(run: RunFacts, slug: str, top: dict[str, float]) -> Json | None:
    """Heat maps and a table of one run's adapter; None where there is none to read."""
    if run.adapter is None or not run.adapter.norms:
        return None
    grid = norm_grid(run.adapter.norms)
    whole = sum(value * value for row in grid.values for value in row if value is not None) or 1.0
    maps: list[Chart | None] = [
        heat_map(
            run.adapter.norms,
            factor,
            top[factor],
            f"{slug}-{factor}",
            title,
            f"{note if run.adapter.trains_factors or factor == 'delta_weight' else _FOLDED}"
            f"Full colour: {top[factor]:.3g}.",
        )
        for factor, (title, note) in _FACTORS.items()
    ]
    rows = [
        (plain(norm.module), f"{norm.lora_A:.4g}", f"{norm.lora_B:.4g}", f"{norm.delta_weight:.4g}")
        for norm in run.adapter.norms
    ]
    by_name = [
        (
            plain(name),
            len(present),
            f"{min(present):.3g}",
            f"{max(present):.3g}",
            percent(sum(v * v for v in present) / whole),
        )
        for name, values in zip(grid.names, grid.values, strict=True)
        if (present := [value for value in values if value is not None])
    ]
    of_checkpoint = "" if run.adapter.is_published else f"of the checkpoint at step {run.adapter.step:,}"
    return {"maps": [chart for chart in maps if chart], "by_name": by_name, "rows": rows, "of": of_checkpoint}


def _reasons(run: RunFacts) -> list[tuple[str, str, str]]:
    """Why rows are not trained on whole, the commonest first."""
    splits = run.data.splits if run.data else ()
    found = sorted((entry for split in splits for entry in split.reasons), key=lambda entry: -entry.count)
    return [(entry.fate.replace("_", " "), plain(entry.reason), f"{entry.count:,}") for entry in found[:MAX_REASONS]]


def _sources(run: RunFacts) -> list[tuple[str, str, str, str, str]]:
    """Where the rows come from."""
    return [
        (split.split, plain(source.name), plain(source.format), f"{source.num_rows:,}", f"{source.num_trained:,}")
        for split in (run.data.splits if run.data else ())
        for source in split.sources
    ]


def _stale(run: RunFacts) -> int:
    """How many exports are known of adapters that the folder no longer holds."""
    return sum(run.adapter is None or export.adapter_sha256 != run.adapter.sha256 for export in run.exports)
