"""What happened to a run besides its steps, in order: resumes and forks, events, replays, and what ended it."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import groupby
from typing import Any

from qlora_train.report.facts import RunFacts
from qlora_train.report.shapes import Change, End, EventLine, Flight, Problem, Replay, Resume
from qlora_train.report.words import plain, short

MOST_OF_A_KIND = 12  # rows of a table; of more, the first and the last are shown
NAMED = 4  # rows of the data, or problems, in a text
_LEVELS = {
    "D2": ("Resumed", "bit for bit the undisturbed run (D2)"),
    "D1": ("Resumed", "the same rows in the same order, with other rounding (D1)"),
    "D0": ("Forked", "another course from here on (D0)"),
}
_VERDICTS = {
    "D2": "equal to the bit (D2)",
    "D1": "the same rows in the same order, with other rounding (D1)",
    "D0": "not the computation that was logged (D0)",
}
_STOPS = {
    "numerics": "stopped by a number that is not finite",
    "memory": "out of memory",
    "machine": "stopped by the machine",
    "signal": "stopped by a signal",
    "bug": "stopped by a fault of qlora-train",
}
"""Kinds of errors that end a run. Others refuse to begin or to go on with one, and leave it as it was."""
_BOUND = {
    "base": "the base model",
    "tokenizer": "the tokenizer",
    "template": "the chat template",
    "data": "the training data",
    "code_sha256": "the code of qlora_train",
}
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Happening:
    """A row of the table of what happened, and a mark in the curves where its step is known."""

    kind: str  # of many of a kind, few are shown
    what: str
    details: tuple[str, ...]
    step: int | None
    until: int | None = None  # the last of several steps
    when: datetime | None = None
    is_bad: bool = False
    number: int = 0  # on the page

    @property
    def steps(self) -> str:
        """The step or the steps as the table shows them."""
        if self.step is None:
            return "-"
        return f"{self.step:,}" if self.until in (None, self.step) else f"{self.step:,}-{self.until:,}"


def numbered(runs: Sequence[RunFacts]) -> list[tuple[Happening, ...]]:
    """What happened to each run, numbered through the page."""
    found, number = [], 0
    for run in runs:
        rows = happenings(run)
        found.append(tuple(replace(row, number=number + place) for place, row in enumerate(rows, 1)))
        number += len(rows)
    return found


def happenings(run: RunFacts) -> list[Happening]:
    """What happened to a run, oldest first.

    Resumes, replays and errors have a time; an event has a step. A resume drops the lines past its step, so that an
    event is of the last part of the run that passed its step.
    """
    parts: list[list[Happening]] = [[], *([_resumed(resume)] for resume in run.resumes)]
    for group in _in_a_row(run.events):
        parts[_part_of(run, group[0].step)].append(_event(group))
    flights = {flight.step: flight for flight in run.flights}
    for (_, _, part), same in groupby(run.ends, lambda end: (end.kind, end.problems, _resumes_before(run, end.time))):
        ends = list(same)
        flight = next((flights.pop(step) for step in list(flights) if _tells_of(ends[-1], run, step)), None)
        parts[part].append(_ended(ends, flight))
    for replay in run.replays:
        parts[_resumes_before(run, replay.time)].append(_replayed(replay))
    for step in flights:  # of which no error tells: before the resume that made the step anew
        later = _part_of(run, step)
        parts[max(later - 1, 0) if step <= run.last_step else later].append(_lost_flight(step))
    return _few([row for part in parts for row in part])


def _resumes_before(run: RunFacts, time: datetime) -> int:
    return sum(resume.time <= time for resume in run.resumes)


def ending(run: RunFacts) -> End | None:
    """What ended a run that has not gone on since."""
    stops = [end for end in run.ends if end.kind in _STOPS]
    if run.summary is not None or not stops:
        return None
    last = stops[-1]
    resumed = any(resume.time > last.time for resume in run.resumes)
    return None if resumed or (last.step is not None and run.last_step > last.step) else last


def how_it_ended(run: RunFacts) -> str:
    """What ended a run that is not complete, in a few words; empty where nobody knows."""
    end = ending(run)
    return "" if end is None else f"stopped by {name}" if (name := _signal_name(end)) else _STOPS[end.kind]


def advice(end: End) -> str:
    """What an error said, and what to do about it."""
    return "\n".join(_told(end.problems))


def _part_of(run: RunFacts, step: int) -> int:
    """0: before any resume; n: after the n-th, the last one that came before this step."""
    return max((n for n, resume in enumerate(run.resumes, 1) if resume.step < step), default=0)


def _in_a_row(events: Sequence[EventLine]) -> Iterator[list[EventLine]]:
    """Events one by one, but for those with figures alone that repeat from step to step."""
    group: list[EventLine] = []
    for event in events:
        if group and event.what == group[-1].what and event.step == group[-1].step + 1 and not event.text:
            group.append(event)
            continue
        if group:
            yield group
        group = [event]
    if group:
        yield group


def _event(group: Sequence[EventLine]) -> Happening:
    first, last = group[0], group[-1]
    details = [first.text] if first.text else []
    losses = [event.loss for event in group if event.loss is not None]
    if losses:
        most = f"{'up to ' if len(losses) > 1 else ''}{max(losses):.4g}"
        limit = f"; the steps before let expect at most {first.limit:.4g}" if first.limit is not None else ""
        details.append(f"loss {most}{limit}")
    figures = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in first.others.items()}
    details += [f"{name.replace('_', ' ')}: {_value(value)}" for name, value in figures.items()]
    if first.rows:
        details.append(_rows(first.rows))
    what = plain(first.what[:1].upper() + first.what[1:])
    return Happening(f"event {first.what}", what, _plain(details), first.step, last.step, is_bad=True)


def _rows(rows: Sequence[str]) -> str:
    """Where rows stand: their numbers, file by file."""
    numbers: dict[str, list[str]] = {}
    for row in rows[:NAMED]:
        path, _, number = row.rpartition(":")
        numbers.setdefault(path, []).append(number)
    found = [f"{', '.join(own)} of {path}" if path else ", ".join(own) for path, own in numbers.items()]
    return f"rows {'; '.join(found)}" + (f"; and {len(rows) - NAMED} more" if len(rows) > NAMED else "")


def _resumed(resume: Resume) -> Happening:
    what, promise = _LEVELS[resume.level]
    details = [f"from the checkpoint of step {resume.step:,}: {promise}"]
    details += [_change(change) for change in (*resume.fork, *resume.rounding)]
    return Happening(what, what, _plain(details), resume.step, when=resume.time)


def _replayed(replay: Replay) -> Happening:
    """Logged steps that were made again. The run stays as it was, so that nothing is marked in its curves."""
    first, last = replay.steps[0].step, replay.steps[-1].step
    steps = f"step {first:,}" if first == last else f"steps {first:,} to {last:,}"
    start = f"the checkpoint of step {replay.from_step:,}" if replay.from_step else "the start"
    details = [f"{steps} made again from {start}: {_VERDICTS[replay.level]}"]
    if replay.level != "D2":
        details.append(f"losses up to {max(step.loss_distance for step in replay.steps):.1e} apart")
    if replay.compared_with is not None:
        equal = "equal to the bit" if replay.same_adapter else "not equal"
        details.append(f"the adapter and that of the checkpoint of step {replay.compared_with:,}: {equal}")
    details += [_change(change) for change in replay.rounding]
    is_other = replay.level == "D0"
    what = "Replayed otherwise" if is_other else "Replayed"
    return Happening("replay", what, _plain(details), None, when=replay.time, is_bad=is_other)


def _change(change: Change) -> str:
    return f"{_BOUND.get(change.key, change.key)}: {_value(change.old)} \N{RIGHTWARDS ARROW} {_value(change.new)}"


def _value(value: Any) -> str:
    """A value as a recipe would have it; hashes by their first characters."""
    if value is None:
        return "none"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return short(text) if _SHA256.fullmatch(text) else text


def _ended(ends: Sequence[End], flight: Flight | None) -> Happening:
    """An error; several ones that say the same are one. A refusal is of no step: the run stays as it was."""
    end = ends[-1]
    times = [f"{len(ends)} times, last at {end.time:%Y-%m-%d %H:%M}"] if len(ends) > 1 else []
    details = _plain([*_told(end.problems), *times])
    if end.kind not in _STOPS:
        return Happening(f"end {end.kind}", plain(f"Refused ({end.kind})"), details, None, when=end.time)
    what = f"Stopped by {name}" if (name := _signal_name(end)) else _STOPS[end.kind].capitalize()
    step = flight.step if flight else end.step or None
    return Happening(f"end {end.kind}", what, details, step, when=end.time, is_bad=end.kind != "signal")


def _signal_name(end: End) -> str:
    """SIGTERM and the like; empty where it was no signal."""
    known = {128 + number: number.name for number in signal.Signals}
    return known.get(end.exit_code, "") if end.kind == "signal" else ""


def _told(problems: Sequence[Problem]) -> list[str]:
    texts = []
    for problem in problems[:NAMED]:
        texts.append(f"{problem.where}: {problem.what}" if problem.where else problem.what)
        texts += [f"Fix: {problem.fix}"] if problem.fix else []
    if len(problems) > NAMED:
        texts.append(f"and {len(problems) - NAMED} more")
    return texts


def _tells_of(end: End, run: RunFacts, step: int) -> bool:
    """Whether an error names the flight record of a step."""
    name = f"{run.run_dir.flights.name}/{run.run_dir.flight(step).name}"
    return any(name in problem.what for problem in end.problems)


def _lost_flight(step: int) -> Happening:
    return Happening("end numerics", _STOPS["numerics"].capitalize(), (), step, is_bad=True)


def _few(rows: Sequence[Happening]) -> list[Happening]:
    """All rows, but of many of a kind the first and the last, and between them how many there are more."""
    shown = list(rows)
    for kind in dict.fromkeys(row.kind for row in rows):
        own = [row for row in rows if row.kind == kind]
        if len(own) > MOST_OF_A_KIND:
            half = MOST_OF_A_KIND // 2
            hidden = own[half:-half]
            last = hidden[-1].until or hidden[-1].step
            told = replace(hidden[0], details=(f"and {len(hidden) - 1:,} more of these",), until=last)
            left_out = set(map(id, hidden[1:]))
            shown = [told if row is hidden[0] else row for row in shown if id(row) not in left_out]
    return shown


def _plain(texts: Sequence[str]) -> tuple[str, ...]:
    return tuple(map(plain, texts))
