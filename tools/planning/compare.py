"""The plan of every published row that states its settings, and how far it is off."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context

from planning.paper import COLUMNS, MB, PUBLISHED, breakdown
from planning.peers import COUNTS, config_of, peer_of, planned_bytes
from planning.published import CARD_SIZE, Row, stated_rows

PAPER = "QLoRA paper"
PAPER_STEP = "the paper's own sum: base, adapters, their gradients, moments and the CUDA context, no activations"


@dataclass(frozen=True)
class Comparison:
    """One row."""

    row: Row
    planned_bytes: int
    peer: str
    step: str
    counts: str
    causes: dict[str, int]  # at the peak of the tensors

    @property
    def error(self) -> float:
        """Planned to published, less one."""
        return self.planned_bytes / self.row.peak_bytes - 1

    @property
    def is_on_a_line(self) -> bool:
        """Whether the figure is a point of the vendor's straight line through its own measurements."""
        return self.row.mem_kind == CARD_SIZE


def compare(
    rows: Sequence[Row] | None = None, *, workers: int = 1, say: Callable[[Comparison], None] = lambda _: None
) -> list[Comparison]:
    """Trace each row, in so many processes. Rows that differ in nothing that is traced are traced once."""
    wanted = stated_rows() if rows is None else rows
    alike: dict[object, list[Row]] = {}
    for row in wanted:
        alike.setdefault(_settings(row), []).append(row)
    firsts = [group[0] for group in alike.values()]
    if workers == 1:
        return _collected(wanted, map(plan_row, firsts), say)
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        return _collected(wanted, pool.map(plan_row, firsts), say)


def _collected(
    wanted: Sequence[Row], planned: Iterable[Comparison], say: Callable[[Comparison], None]
) -> list[Comparison]:
    found: dict[int, Comparison] = {}
    for one in planned:
        for row in wanted:
            if _settings(row) == _settings(one.row):
                found[row.line] = replace(one, row=row)
                say(found[row.line])
    return [found[row.line] for row in wanted]


def _settings(row: Row) -> object:
    """What decides over the plan of a row."""
    name = row.model if row.model in PUBLISHED else config_of(row).to_json_string()
    offloaded = "(offload)" in row.notes
    sizes = (row.quant, row.rank, row.lora_targets, row.seq_len, row.micro_batch, offloaded)
    return (name, row.tool, row.source, row.method, *sizes)


def plan_row(row: Row) -> Comparison:
    """The plan of one row."""
    if row.model in PUBLISHED:
        paper = breakdown(row.model)
        causes = {name: round(count * MB) for name, count in zip(COLUMNS[:-1], paper.planned[:-1], strict=True)}
        # Its gigabytes are thousands of 2^20 bytes.
        return Comparison(row, round(paper.planned[-1] * 1e6), PAPER, PAPER_STEP, "the sum", causes)
    peer = peer_of(row)
    traced = peer.trace(row, config_of(row))
    planned = planned_bytes(row, peer, traced)
    return Comparison(row, planned, peer.name, peer.step, COUNTS[peer.counts], traced.causes)


def median_error(found: Iterable[Comparison]) -> float:
    """Median of the absolute errors."""
    return statistics.median(abs(each.error) for each in found)


def worst(found: Iterable[Comparison], count: int) -> list[Comparison]:
    """Those that are furthest off, the furthest first."""
    return sorted(found, key=lambda each: -abs(each.error))[:count]
