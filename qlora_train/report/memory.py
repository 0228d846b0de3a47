"""The memory section: what was planned by cause, what was measured, and how far the two are apart."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass

from qlora_train.report.charts import cause_colour, causes, memory_chart
from qlora_train.report.curves import Chart
from qlora_train.report.facts import RunFacts
from qlora_train.report.shapes import Memory, Phase
from qlora_train.report.tables import ABSENT
from qlora_train.report.words import duration, plain
from qlora_train.units import size_text


@dataclass(frozen=True)
class CauseRow:
    """One cause of memory, planned and measured in each phase; `colour` is that of its part of the bars."""

    cause: str
    cells: tuple[str, ...]
    colour: int | None  # None: the sum


@dataclass(frozen=True)
class TermRow:
    """One term of the plan, as the plan tells it."""

    stage: str
    cause: str
    size: str
    source: str


@dataclass(frozen=True)
class PhaseRow:
    """One phase: tensors planned and measured."""

    name: str
    planned: str
    measured: str
    difference: str
    is_far: bool


@dataclass(frozen=True)
class MemoryView:
    """What the page shows of one run's memory."""

    run: str
    chart: Chart | None
    columns: tuple[str, ...]  # "planned" or "measured"
    spans: tuple[tuple[str, int], ...]  # phases, and how many columns each has
    causes: tuple[CauseRow, ...]
    terms: tuple[TermRow, ...]
    phases: tuple[PhaseRow, ...]
    facts: tuple[str, ...]
    warnings: tuple[str, ...]


FAR = 0.1  # from here on a run warns of the difference too
BOUNDS = ("generation",)  # planned for the longest prompts that there could be: an upper bound


def memory_view(run: RunFacts, slug: str) -> MemoryView | None:
    """The section of one run; None where the run keeps no memory.json."""
    if (memory := run.memory) is None:
        return None
    terms = memory.plan.terms if memory.plan else ()
    return MemoryView(
        run=run.name,
        chart=memory_chart(run, slug),
        columns=tuple(how for _, how, _ in _columns(memory)),
        spans=tuple(Counter(plain(phase.name) for phase, _, _ in _columns(memory)).items()),
        causes=tuple(_cause_rows(memory)),
        phases=tuple(_phase_row(phase) for phase in memory.phases),
        terms=tuple(TermRow(plain(t.stage), plain(t.cause), size_text(t.num_bytes), plain(t.source)) for t in terms),
        facts=tuple(_facts(memory)),
        warnings=tuple(map(plain, memory.warnings)),
    )


def _columns(memory: Memory) -> list[tuple[Phase, str, dict[str, int]]]:
    """Phase, "planned" or "measured", and bytes by cause, where these are known."""
    both = [
        (phase, (("planned", phase.planned_by_cause), ("measured", phase.measured_by_cause))) for phase in memory.phases
    ]
    return [(phase, how, parts) for phase, sides in both for how, parts in sides if parts]


def _cause_rows(memory: Memory) -> list[CauseRow]:
    """The largest cause first, and the sums last."""
    columns = [parts for _, _, parts in _columns(memory)]
    rows = [
        CauseRow(plain(cause), tuple(size_text(parts.get(cause, 0)) for parts in columns), cause_colour(position))
        for position, cause in enumerate(causes(memory))
    ]
    return [*rows, CauseRow("all", tuple(size_text(sum(parts.values())) for parts in columns), None)] if rows else []


def _phase_row(phase: Phase) -> PhaseRow:
    far = phase.difference_frac
    planned, measured = (size_text(value) if value is not None else ABSENT for value in (phase.planned, phase.measured))
    difference = ABSENT if far is None else f"{'+' if far > 0 else ''}{100 * far:.1f} %"
    is_bound = phase.name in BOUNDS
    is_far = far is not None and (far > FAR or (far < -FAR and not is_bound))
    name = f"{plain(phase.name)} (at most)" if is_bound else plain(phase.name)
    return PhaseRow(name, planned, measured, difference, is_far)


def _facts(memory: Memory) -> list[str]:
    """What stands beside the tensors."""
    found = []
    if settings := ", ".join(
        f"{plain(key)} {plain(json.dumps(value))}" for key, value in (memory.settings or {}).items()
    ):
        found.append(f"Settings as they were: {settings}.")
    for phase in memory.phases:
        if phase.reserved is not None:
            found.append(f"Reserved by torch in {plain(phase.name)}: {size_text(phase.reserved)}.")
    before, peak = memory.resident.before, memory.resident.peak
    if peak is not None:
        grown = f", {size_text(peak - before)} more than before the model was loaded" if before is not None else ""
        found.append(f"Resident memory of the process at its peak: {size_text(peak)}{grown}.")
    saved = memory.rehearsal
    if saved and saved.checkpoint_bytes is not None and saved.checkpoint_s is not None:
        takes = f"{size_text(saved.checkpoint_bytes)} and {duration(saved.checkpoint_s)}"
        found.append(f"A checkpoint takes {takes} to save.")
    if ran_out := memory.out_of_memory:
        asked = f", and {size_text(ran_out.requested)} more were asked for" if ran_out.requested is not None else ""
        held = f": {size_text(ran_out.held)} were in use{asked}" if ran_out.held is not None else ""
        found.append(f"Memory ran out {plain(ran_out.where)}{held}. {plain(ran_out.message)}")
    return found
