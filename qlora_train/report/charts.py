"""The charts of a page that are no curves: memory planned and measured, and norms by layer and module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.collections import PatchCollection
from matplotlib.colors import to_rgba
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from qlora_train.report.curves import Chart
from qlora_train.report.facts import RunFacts
from qlora_train.report.norms import ModuleNorm, norm_grid
from qlora_train.report.shapes import Memory, Term
from qlora_train.report.svg import COLOURS, INK, LINE, SERIES, Drawing
from qlora_train.report.words import plain
from qlora_train.units import size_text

_BAR, _GAP = 0.36, 1.15  # heights, in phases
_FAINTEST = 0.05  # of a cell, so that a norm of 0 is told from a missing module


def causes(memory: Memory) -> list[str]:
    """The causes of tensors in any phase, planned or measured, the largest first."""
    largest: dict[str, int] = {}
    for phase in memory.phases:
        for cause, num_bytes in (*phase.planned_by_cause.items(), *phase.measured_by_cause.items()):
            largest[cause] = max(largest.get(cause, 0), num_bytes)
    return sorted(largest, key=lambda cause: -largest[cause])


def cause_colour(position: int) -> int:
    """The colour of a cause by its place among them; all beyond the last colour share it."""
    return min(position, COLOURS - 1)


def memory_chart(run: RunFacts, slug: str) -> Chart | None:
    """Two bars a phase: what was planned and what was measured, by cause. None where there is neither."""
    memory = run.memory
    shown = [phase for phase in memory.phases if phase.planned or phase.measured] if memory else []
    if memory is None or not shown:
        return None
    drawing, order, words = Drawing(60 + 62 * len(shown)), causes(memory), []
    axes = drawing.axes
    for place, phase in enumerate(shown):
        _stack(drawing, phase.planned_by_cause, order, place * _GAP, total=phase.planned)
        beside = sum(term.num_bytes for term in _beside_tensors(memory) if term.stage == phase.name)
        axes.barh(place * _GAP, beside, _BAR, left=phase.planned or 0, color=LINE)
        _stack(drawing, phase.measured_by_cause, order, place * _GAP + _BAR + 0.03, total=phase.measured)
        figures = (("planned", phase.planned), ("measured", phase.measured))
        words += [f"{plain(phase.name)} {how} {size_text(found)}" for how, found in figures if found]
    axes.set_yticks([place * _GAP + _BAR / 2 for place in range(len(shown))], [plain(phase.name) for phase in shown])
    axes.set_ylim(len(shown) * _GAP - _BAR, -_BAR)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x")
    unit, name = (2**30, "GiB") if axes.get_xlim()[1] >= 2**30 else (2**20, "MiB")
    axes.xaxis.set_major_locator(_RoundSizes(unit))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / unit:,g}")
    axes.set_xlabel(name)
    note = "Upper bar: planned; lower bar: measured; in the colours of the table."
    if _beside_tensors(memory):
        note += " Pale: planned for what no tensor holds."
    return Chart("Tensors on the device", note, drawing.svg(slug, f"Memory by phase: {'; '.join(words)}"))


def _beside_tensors(memory: Memory) -> list[Term]:
    """Terms of the plan that no tensor holds: context, workspaces, fragmentation."""
    return [term for term in memory.plan.terms if term.how == "constant"] if memory.plan else []


def _stack(drawing: Drawing, parts: Mapping[str, int], order: Sequence[str], y: float, total: int | None) -> None:
    """The causes end to end; what they do not explain of the total in one piece."""
    left = 0
    for cause in sorted(parts, key=order.index):
        drawing.axes.barh(y, parts[cause], _BAR, left=left, color=SERIES[cause_colour(order.index(cause))])
        left += parts[cause]
    if total is not None and total > left:
        drawing.axes.barh(y, total - left, _BAR, left=left, color=INK, alpha=0.75)


class _RoundSizes(MaxNLocator):
    """Ticks at round numbers of a unit of bytes."""

    def __init__(self, unit: int) -> None:
        super().__init__(nbins=5)
        self._unit = unit

    def tick_values(self, vmin: float, vmax: float) -> Any:
        """Places in bytes."""
        return np.asarray(super().tick_values(vmin / self._unit, vmax / self._unit)) * self._unit


def heat_map(norms: Sequence[ModuleNorm], factor: str, top: float, slug: str, title: str, note: str) -> Chart | None:
    """One of the norms over layers and module names; full colour is `top`. None where no module lies in a layer."""
    grid = norm_grid(norms, factor)
    cells, colours, titles = [], [], []
    for row, (name, values) in enumerate(zip(grid.names, grid.values, strict=True)):
        shown = plain(name)
        for column, (layer, value) in enumerate(zip(grid.layers, values, strict=True)):
            if value is not None:
                cells.append(Rectangle((column + 0.04, row + 0.06), 0.92, 0.88))
                colours.append(to_rgba(SERIES[0], _FAINTEST + (1 - _FAINTEST) * value / top if top else _FAINTEST))
                titles.append(f"layer {layer}, {shown}: {value:.4g}")
    if not cells:
        return None
    drawing = Drawing(46 + 19 * len(grid.names))
    axes = drawing.axes
    axes.add_collection(PatchCollection(cells, facecolors=colours, linewidths=0))
    axes.set_xlim(0, len(grid.layers))
    axes.set_ylim(len(grid.names), 0)
    every = -(-len(grid.layers) // 12)
    places = range(0, len(grid.layers), every)
    axes.set_xticks([place + 0.5 for place in places], [str(grid.layers[place]) for place in places])
    names = [name.encode("ascii", "backslashreplace").decode() for name in grid.names]
    axes.set_yticks([row + 0.5 for row in range(len(names))], names)
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    axes.set_xlabel("layer")
    present = [value for row in grid.values for value in row if value is not None]
    label = f"{title} by layer and module, from {min(present):.3g} to {max(present):.3g}"
    return Chart(title, note, drawing.svg(slug, label, titles))
