"""The curves of a page: loss, learning rate, gradient norm and speed over the steps, one line a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
from markupsafe import Markup
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from qlora_train.data.page import percent
from qlora_train.report.facts import RunFacts
from qlora_train.report.happened import Happening
from qlora_train.report.shapes import TrainLine
from qlora_train.report.svg import COLOURS, INK, SERIES, SOFT, Drawing

HEIGHT = 220
MAX_POINTS = 600  # of a line: more are not seen
SMOOTHED_SHARE = 25  # a mean is over a twenty-fifth of the logged steps
LOG_SCALE_FROM = 30.0  # gradient norms that differ by this factor
_MARKERS = "osD^vPX*"
_CHAR = 0.019  # of the width of the axes: a digit of a mark's number

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Chart:
    """One figure with its words."""

    title: str
    note: str
    svg: Markup


@dataclass(frozen=True)
class Mark:
    """A step at which something happened, by its number in the table."""

    step: int
    number: int
    colour: str


def marks_of(happened: Sequence[Sequence[Happening]]) -> list[Mark]:
    """What happened to each run, where the step is known."""
    colours = SERIES if len(happened) > 1 else [SOFT]
    rows = [(row, colour) for own, colour in zip(happened, colours, strict=False) for row in own]
    return [Mark(row.step, row.number, colour) for row, colour in rows if row.step is not None]


def curve_charts(runs: Sequence[RunFacts], marks: Sequence[Mark]) -> list[Chart]:
    """The charts that there are lines for; none where no run has logged a step. At most COLOURS runs."""
    assert len(runs) <= COLOURS
    logged = [(index, run) for index, run in enumerate(runs) if run.steps]
    if not logged:
        return []
    return [_loss(logged, marks), _learning_rate(logged, marks), _grad_norm(logged, marks), _speed(logged, marks)]


def smoothing_window(num_steps: int) -> int:
    """How many logged steps a smoothed loss is the mean of."""
    return max(1, num_steps // SMOOTHED_SHARE)


def smoothed(values: Values, weights: Values, window: int) -> Values:
    """The weighted mean of each value and the `window - 1` before it, or of as many as there are.

    >>> smoothed(np.array([4.0, 2.0, 6.0]), np.array([1.0, 1.0, 3.0]), 2).tolist()
    [4.0, 3.0, 5.0]
    """
    total = np.concatenate([[0.0], np.cumsum(values * weights)])
    weight = np.concatenate([[0.0], np.cumsum(weights)])
    first = np.maximum(np.arange(1, len(values) + 1) - window, 0)
    sums: Values = (total[1:] - total[first]) / (weight[1:] - weight[first])
    return sums


def thinned(x: Values, y: Values) -> tuple[Values, Values]:
    """At most MAX_POINTS points: of each stretch its lowest and its highest, so that no spike is lost."""
    if len(x) <= MAX_POINTS:
        return x, y
    kept = []
    for stretch in np.array_split(np.arange(len(x)), MAX_POINTS // 2):
        kept += sorted({int(stretch[np.argmin(y[stretch])]), int(stretch[np.argmax(y[stretch])])})
    return x[kept], y[kept]


def _column(steps: Sequence[TrainLine], value: Callable[[TrainLine], float]) -> Values:
    return np.array([value(step) for step in steps], dtype=np.float64)


def _lines(
    drawing: Drawing,
    logged: Sequence[tuple[int, RunFacts]],
    value: Callable[[TrainLine], float],
    marks: Sequence[Mark],
) -> None:
    """One line a run, and the marks."""
    for index, run in logged:
        x, y = thinned(_column(run.steps, lambda step: step.step), _column(run.steps, value))
        drawing.axes.plot(x, y, color=SERIES[index], linewidth=1.4, marker="o" if len(x) == 1 else "")
    step_axis(drawing, marks)


def step_axis(drawing: Drawing, marks: Sequence[Mark]) -> None:
    """Whole steps, few ticks on both axes, and the marks."""
    drawing.axes.set_xlabel("step")
    drawing.axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    drawing.axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    for step, colour in dict.fromkeys((mark.step, mark.colour) for mark in marks):
        drawing.axes.axvline(step, color=colour, linewidth=0.9, zorder=0.9)
    low, high = drawing.axes.get_xlim()
    for group in mark_groups(marks, _CHAR * (high - low)):
        alike = len({mark.colour for mark in group}) == 1
        drawing.axes.text(
            _middle(group),
            1.02,
            in_few_words([mark.number for mark in group]),
            transform=drawing.axes.get_xaxis_transform(),
            color=group[0].colour if alike else SOFT,
            size=11,
            ha="center",
        )


def mark_groups(marks: Sequence[Mark], char_steps: float) -> list[list[Mark]]:
    """Marks by step, those together whose numbers would run into each other; a character is so many steps wide."""
    groups: list[list[Mark]] = []
    for mark in sorted(marks, key=lambda mark: (mark.step, mark.number)):
        groups.append([mark])
        while len(groups) > 1 and _middle(groups[-1]) - _middle(groups[-2]) < char_steps * _chars_between(groups[-2:]):
            groups[-2:] = [groups[-2] + groups[-1]]
    return groups


def _middle(group: Sequence[Mark]) -> float:
    return (group[0].step + group[-1].step) / 2


def _chars_between(groups: Sequence[Sequence[Mark]]) -> float:
    """From the middle of one text to that of the next, with a space between."""
    return 1 + sum(len(in_few_words([mark.number for mark in group])) for group in groups) / 2


def in_few_words(numbers: Sequence[int]) -> str:
    """Numbers with a dash for those that follow each other.

    >>> in_few_words([4, 1, 2, 3, 7]), in_few_words([1, 2])
    ('1-4, 7', '1, 2')
    """
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][-1] + 1:
            spans[-1].append(number)
        else:
            spans.append([number])
    words = [f"{span[0]}-{span[-1]}" if len(span) > 2 else ", ".join(map(str, span)) for span in spans]
    return ", ".join(words)


def _loss(logged: Sequence[tuple[int, RunFacts]], marks: Sequence[Mark]) -> Chart:
    """Training loss, each step faintly where there is one run, and the held-out loss from the base's on."""
    drawing, words = Drawing(HEIGHT), []
    for index, run in logged:
        steps, losses = _column(run.steps, lambda line: line.step), _column(run.steps, lambda line: line.loss)
        window = smoothing_window(len(steps))
        mean = smoothed(losses, _column(run.steps, lambda line: line.num_supervised_tokens), window)
        if window > 1 and len(logged) == 1:
            drawing.axes.plot(*thinned(steps, losses), color=SERIES[index], linewidth=0.9, alpha=0.35)
        drawing.axes.plot(*thinned(steps, mean), color=SERIES[index], linewidth=1.7)
        held_out = held_out_losses(run)
        drawing.axes.plot(
            [step for step, _ in held_out],
            [loss for _, loss in held_out],
            color=INK if len(logged) == 1 else SERIES[index],
            linewidth=1.2,
            linestyle="--",
            marker=_MARKERS[index],
            markersize=5.5,
        )
        words.append(f"{run.name}: training from {losses[0]:.3g} at step {steps[0]:.0f} to {mean[-1]:.3g}")
        if held_out:
            words[-1] += ", held out " + ", ".join(f"{loss:.3g} at step {step}" for step, loss in _ends(held_out))
    step_axis(drawing, marks)
    drawing.plain_numbers()
    if marks:
        words.append("marks: " + ", ".join(f"{mark.number} at step {mark.step}" for mark in marks))
    note = _loss_note(logged) + (" Upright lines: what happened, by its number below." if marks else "")
    return Chart("Loss", note, drawing.svg("loss", f"Loss over the steps. {'; '.join(words)}"))


def held_out_losses(run: RunFacts) -> list[tuple[int, float]]:
    """(step, loss) of the held-out rows: the base's is that of step 0."""
    base = run.evaluation.base if run.evaluation else None
    return [*([(0, base.loss)] if base else []), *((line.step, line.eval_loss) for line in run.evals)]


def _ends(points: Sequence[tuple[int, float]]) -> Sequence[tuple[int, float]]:
    return points if len(points) == 1 else (points[0], points[-1])


def _loss_note(logged: Sequence[tuple[int, RunFacts]]) -> str:
    windows = sorted({smoothing_window(len(run.steps)) for _, run in logged})
    means = " or ".join(map(str, windows))
    if windows == [1]:
        lines = "Solid: training loss of each logged step."
    elif len(logged) == 1:
        lines = f"Faint: training loss of each logged step; solid: its mean over {means} of them."
    else:
        lines = f"Solid: training loss, the mean over {means} logged steps."
    held_out = any(held_out_losses(run) for _, run in logged)
    return f"Nats per supervised token. {lines}" + (
        " Marks: loss on held-out rows, at step 0 that of the base." if held_out else " No rows were held out."
    )


def _learning_rate(logged: Sequence[tuple[int, RunFacts]], marks: Sequence[Mark]) -> Chart:
    drawing = Drawing(HEIGHT)
    _lines(drawing, logged, lambda step: step.learning_rate, marks)
    drawing.axes.set_ylim(bottom=0)
    drawing.plain_numbers()
    peaks = [f"{run.name}: at most {max(line.learning_rate for line in run.steps):g}" for _, run in logged]
    note = "As the schedule set it, warm-up included."
    return Chart("Learning rate", note, drawing.svg("lr", f"Learning rate over the steps. {'; '.join(peaks)}"))


def _grad_norm(logged: Sequence[tuple[int, RunFacts]], marks: Sequence[Mark]) -> Chart:
    """Norms before clipping, and the norm above which gradients are scaled down."""
    drawing, words = Drawing(HEIGHT), []
    _lines(drawing, logged, lambda step: step.grad_norm, marks)
    norms = [line.grad_norm for _, run in logged for line in run.steps if line.grad_norm > 0]
    if norms and max(norms) > LOG_SCALE_FROM * min(norms):
        drawing.axes.set_yscale("log")
    else:
        drawing.axes.set_ylim(bottom=0)
    drawing.plain_numbers()
    drawing.axes.yaxis.set_minor_formatter("")
    note = "Before clipping."
    limits = {run.setting("train.max_grad_norm") for _, run in logged}
    if limit := _number(limits.pop()) if len(limits) == 1 else None:
        drawing.axes.axhline(limit, color=SOFT, linewidth=1, linestyle=":")
        for _, run in logged:
            clipped = percent(sum(line.grad_norm > limit for line in run.steps) / len(run.steps))
            words.append(f"{run.name} {clipped}" if len(logged) > 1 else clipped)
        note += f" Dotted: train.max_grad_norm ({limit:g}); longer gradients are scaled down to it"
        note += f", in {', '.join(words)} of the steps."
    middle = [f"{run.name}: median {median(line.grad_norm for line in run.steps):.3g}" for _, run in logged]
    return Chart("Gradient norm", note, drawing.svg("grad", f"Gradient norm over the steps. {'; '.join(middle)}"))


def _speed(logged: Sequence[tuple[int, RunFacts]], marks: Sequence[Mark]) -> Chart:
    drawing = Drawing(HEIGHT)
    _lines(drawing, logged, lambda step: step.num_tokens / step.step_s, marks)
    drawing.axes.set_ylim(bottom=0)
    drawing.plain_numbers()
    words = [
        (f"{run.name} " if len(logged) > 1 else "")
        + f"{median(line.num_tokens / line.step_s for line in run.steps):,.0f}"
        for _, run in logged
    ]
    note = f"All tokens, supervised or only read; evaluation and saving apart. Median: {', '.join(words)}."
    return Chart(
        "Tokens per second", note, drawing.svg("speed", f"Tokens per second over the steps. {'; '.join(words)}")
    )


def _number(text: str) -> float | None:
    """A recipe's value as a number above 0, where it is one."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 < value < float("inf") else None
