"""The curves of what a method logs of its own: triplets left, frozen tensors, gates of experts, the loss it adds."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from matplotlib.ticker import MaxNLocator

from qlora_train.report.curves import HEIGHT, Chart, Mark, step_axis, thinned
from qlora_train.report.facts import RunFacts
from qlora_train.report.svg import COLOURS, SERIES, Drawing
from qlora_train.report.words import plain

_TITLES = {
    "num_triplets": ("Triplets left", "Of all layers, as the schedule of ranks has it."),
    "num_frozen_tensors": ("Frozen tensors", "Factors that the method no longer trains."),
    "trainable_frac": ("Share that trains", "Of the elements of A and B."),
    "extra_loss": ("Loss added by the method", "Beside that of the rows, which the chart of the loss shows."),
    "rule_norm": ("Gradient norm after the method's rule", "What the optimiser was given."),
    "gate": ("Gates", "The mean gate of each expert."),
}
_MEMBER = re.compile(r"_(\d+)$")


def method_charts(runs: Sequence[RunFacts], marks: Sequence[Mark]) -> list[Chart]:
    """A chart for each figure; figures that differ by a last number alone, as gates do, share one."""
    names = dict.fromkeys(name for run in runs for step in run.steps for name in step.figures)
    families: dict[str, list[str]] = {}
    for name in names:
        families.setdefault(_MEMBER.sub("", name), []).append(name)
    return [
        _chart(runs, marks, family, members, f"method{place}")
        for place, (family, members) in enumerate(families.items())
    ]


def _chart(runs: Sequence[RunFacts], marks: Sequence[Mark], family: str, members: Sequence[str], slug: str) -> Chart:
    """A line for each run and member; the lines of several members end with their numbers."""
    drawing, words = Drawing(HEIGHT), []
    for index, run in enumerate(runs):
        for place, name in enumerate(members):
            points = [(step.step, step.figures[name]) for step in run.steps if name in step.figures]
            if not points:
                continue
            x, y = thinned(*(np.array(values, dtype=np.float64) for values in zip(*points, strict=True)))
            colour = SERIES[index if len(runs) > 1 else place % COLOURS]
            drawing.axes.plot(x, y, color=colour, linewidth=1.4, marker="o" if len(x) == 1 else "")
            if len(members) > 1:
                label = f" {name.rpartition('_')[2]}"
                drawing.axes.text(x[-1], y[-1], label, color=colour, size=11, va="center", clip_on=False)
            words.append(f"{run.name}: {name} from {y[0]:.3g} to {y[-1]:.3g}")
    step_axis(drawing, marks)
    if family.startswith("num_"):
        drawing.axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    drawing.plain_numbers()
    title, note = _TITLES.get(family, (family.replace("_", " ").capitalize(), "As the method logs it."))
    label = f"{title} over the steps. {'; '.join(words)}"
    return Chart(plain(title), plain(note), drawing.svg(slug, plain(label)))
