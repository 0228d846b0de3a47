"""A step that came to no finite number, as the flight recorder wrote it down: figures, norms by module, rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from qlora_train.adapters.state import split_name
from qlora_train.names import TOKEN_ROWS
from qlora_train.report.facts import RunFacts
from qlora_train.report.happened import ending
from qlora_train.report.shapes import Flight
from qlora_train.report.words import plain

MOST_FLIGHTS, MOST_STEPS, MOST_MODULES, MOST_ROWS = 3, 5, 12, 8
ABSENT = "-"


@dataclass(frozen=True)
class StepRow:
    """Figures of one step."""

    step: str
    loss: str
    grad_norm: str
    learning_rate: str


@dataclass(frozen=True)
class ModuleRow:
    """Norms of one module: of its gradient in the median of the steps before, in the last and in this one."""

    module: str
    usual: str
    last: str
    now: str
    value: str  # the norm of what is trained
    grown: str  # over the steps before


@dataclass(frozen=True)
class RowShown:
    """A row of the data as it was trained on."""

    where: str
    note: str
    text: str


@dataclass(frozen=True)
class FlightView:
    """What the page shows of one step."""

    step: int
    is_end: bool  # whether the run ended there
    first: str  # what was first not finite
    repeat: str
    steps: tuple[StepRow, ...]
    num_before: int  # steps that the norms are of
    modules: tuple[ModuleRow, ...]
    num_more_modules: int
    rows: tuple[RowShown, ...]
    num_more_rows: int


def flight_views(run: RunFacts) -> list[FlightView]:
    """The records of a run, the newest first."""
    return [_view(run, flight) for flight in run.flights[: -MOST_FLIGHTS - 1 : -1]]


def _view(run: RunFacts, flight: Flight) -> FlightView:
    modules = _modules(flight)
    # The rows among which the fault was found come first.
    culprit = flight.first_not_finite.micro_step if flight.first_not_finite else None
    rows = sorted(flight.rows, key=lambda row: row.micro_step != culprit)
    return FlightView(
        step=flight.step,
        is_end=ending(run) is not None and flight.step > run.last_step,
        first=plain(flight.first_not_finite.text) if flight.first_not_finite else "",
        repeat=plain(flight.repeat),
        steps=_steps(flight),
        num_before=len(flight.last_steps.step),
        modules=tuple(modules[:MOST_MODULES]),
        num_more_modules=max(len(modules) - MOST_MODULES, 0),
        rows=tuple(
            RowShown(plain(row.where), f"{row.num_tokens:,} tokens, micro-batch {row.micro_step + 1}", plain(row.text))
            for row in rows[:MOST_ROWS]
        ),
        num_more_rows=max(len(rows) - MOST_ROWS, 0),
    )


def _steps(flight: Flight) -> tuple[StepRow, ...]:
    """The last steps, and the one that failed."""
    before = flight.last_steps
    columns = zip(before.step, before.loss, before.grad_norm, before.learning_rate, strict=True)
    figures = [*list(columns)[-MOST_STEPS:], (flight.step, flight.loss, flight.grad_norm, flight.learning_rate)]
    return tuple(
        StepRow(f"{step:,}", f"{loss:.4g}", f"{norm:.4g}", f"{learning_rate:.3g}")
        for step, loss, norm, learning_rate in figures
    )


def _modules(flight: Flight) -> list[ModuleRow]:
    """Each module's norms; first those whose gradient is not finite in this step, then those that grew most before."""
    before, now = flight.last_steps, flight.this_step.grad_norm_of
    tensors: dict[str, list[str]] = {}
    for name in dict.fromkeys((*before.grad_norm_of, *now)):
        tensors.setdefault(_module_of(name), []).append(name)
    ranked = []
    for module, names in tensors.items():
        gradients = _together([before.grad_norm_of[name] for name in names if name in before.grad_norm_of])
        values = _together([before.norm_of[name] for name in names if name in before.norm_of])
        here = [now[name] for name in names if name in now]
        usual = median(gradients) if gradients else 0.0
        row = ModuleRow(
            plain(module),
            usual=f"{usual:.3g}" if gradients else ABSENT,
            last=f"{gradients[-1]:.3g}" if gradients else ABSENT,
            now=f"{_norm(here):.3g}" if here else ABSENT,
            value=f"{values[-1]:.3g}" if values else ABSENT,
            grown=_percent(values[-1] / values[0] - 1) if len(values) > 1 and values[0] else ABSENT,
        )
        growth = gradients[-1] / usual if usual else 0.0
        ranked.append((all(map(math.isfinite, here)), -growth, row))
    return [row for *_, row in sorted(ranked, key=lambda entry: entry[:2])]


def _module_of(tensor: str) -> str:
    """What a trained tensor belongs to.

    >>> _module_of("layers.0.q_proj.lora_A"), _module_of(f"embed_tokens.{TOKEN_ROWS}")
    ('layers.0.q_proj', 'embed_tokens, rows of new tokens')
    """
    module, attribute = split_name(tensor)
    return f"{module}, rows of new tokens" if attribute == TOKEN_ROWS else module or tensor


def _percent(share: float) -> str:
    """A change, in as many digits as one reads.

    >>> _percent(1.5), _percent(0.0123), _percent(-0.5), _percent(30.0)
    ('+150 %', '+1.2 %', '-50 %', '+3,000 %')
    """
    return f"{100 * share:+,.0f} %" if abs(share) >= 0.1 else f"{100 * share:+.2g} %"


def _together(columns: Sequence[Sequence[float]]) -> list[float]:
    """The norm of several tensors as one, for each step."""
    return [_norm(values) for values in zip(*columns, strict=True)]


def _norm(values: Sequence[float]) -> float:
    """The norm of tensors with these norms; NaN where one is."""
    return math.nan if any(map(math.isnan, values)) else math.hypot(*values)
