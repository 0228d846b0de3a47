"""Sample answers before and after: which are shown, and why these."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from qlora_train.report.facts import RunFacts
from qlora_train.report.shapes import Answer, Side
from qlora_train.report.words import plain

NUM_FIRST, NUM_GAINED, NUM_LOST = 4, 3, 3


@dataclass(frozen=True)
class Written:
    """What one model answered."""

    who: str
    text: str
    similarity: str
    is_exact: bool


@dataclass(frozen=True)
class Shown:
    """One question with the answers of the base and of each run's adapter."""

    asked: str
    where: str
    reference: str
    written: tuple[Written, ...]


@dataclass(frozen=True)
class Group:
    """Questions that are shown for one reason."""

    title: str
    shown: tuple[Shown, ...]


@dataclass(frozen=True)
class _Case:
    """A question that every run was asked."""

    base: Answer
    adapters: tuple[tuple[str, Answer], ...]

    @property
    def gain(self) -> float:
        """Character similarity of the adapters' answers above that of the base's."""
        return fmean(answer.char_similarity for _, answer in self.adapters) - self.base.char_similarity


def answer_groups(runs: Sequence[RunFacts]) -> list[Group]:
    """The first questions, and of the others those whose answers gained and lost most; none where none is common."""
    cases = _cases(runs)
    first, others = cases[:NUM_FIRST], cases[NUM_FIRST:]
    ranked = sorted(others, key=lambda case: -case.gain)
    gained = [case for case in ranked[:NUM_GAINED] if case.gain > 0]
    lost = [case for case in ranked[::-1][:NUM_LOST] if case.gain < 0]
    groups = [
        ("The first rows, whatever came of them", first),
        ("Of the others: where the answer gained most", gained),
        ("Of the others: where the answer lost most", lost),
    ]
    return [Group(title, tuple(map(_shown, chosen))) for title, chosen in groups if chosen]


def balance(run: RunFacts) -> str | None:
    """How many answers came nearer to their references, in words."""
    base, adapter = _sides(run)
    if base is None or adapter is None or not adapter.answers:
        return None
    gains = [
        after.char_similarity - before.char_similarity
        for before, after in zip(base.answers, adapter.answers, strict=False)
    ]
    nearer, farther = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    same = len(gains) - nearer - farther
    compared = f"{nearer:,} are nearer to the reference than the base's, {same:,} as near, {farther:,} farther"
    return f"Of {len(gains):,} answers {compared}"


def _sides(run: RunFacts) -> tuple[Side | None, Side | None]:
    return (run.evaluation.base, run.evaluation.adapter) if run.evaluation else (None, None)


def _cases(runs: Sequence[RunFacts]) -> list[_Case]:
    """The questions that base and adapter of every run answered, in the order of the first run."""
    answered: list[tuple[str, dict[tuple[str, str], Answer]]] = []
    for run in runs:
        _, adapter = _sides(run)
        if adapter is None:
            return []
        answered.append((run.name, {(answer.asked, answer.reference): answer for answer in adapter.answers}))
    base, _ = _sides(runs[0])
    cases = []
    for answer in base.answers if base else ():
        key = (answer.asked, answer.reference)
        if all(key in answers for _, answers in answered):
            cases.append(_Case(answer, tuple((name, answers[key]) for name, answers in answered)))
    return cases


def _shown(case: _Case) -> Shown:
    one_run = len(case.adapters) == 1
    written = [_written("base", case.base)]
    written += [_written("adapter" if one_run else name, answer) for name, answer in case.adapters]
    return Shown(plain(case.base.asked), plain(case.base.where), plain(case.base.reference), tuple(written))


def _written(who: str, answer: Answer) -> Written:
    return Written(who, plain(answer.text), f"{answer.char_similarity:.2f}", answer.exact_match == 1)
