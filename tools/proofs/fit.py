"""The memory plan: against published figures, the QLoRA paper, real steps on this CPU, and in time for an answer."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path

from planning.compare import compare, median_error, worst
from planning.measured import measure_points, measure_smollm2
from planning.paper import COLUMNS, breakdowns

from proofs.common import ROOT, Bar

CONFIGS = ROOT / "tests" / "fixtures" / "configs"
RECIPES = ROOT / "recipes"
RECIPE = RECIPES / "llama3-8b-12gb.yaml"
# The recipes for cards, the config of the model that each names, and the least card of the class that it promises.
FOR_CARDS = (
    ("llama3-8b-12gb", "llama-3.1-8b", "RTX 4070"),
    ("qwen3-32b-24gb", "qwen3-32b", "RTX 4090"),
    ("llama3-70b-48gb", "llama-3.3-70b", "L40S"),
)
CARDS_GIB = (8, 12, 16, 24, 48, 80)
FEW_CARDS_GIB = (8, 80)


def measure(full: bool) -> list[Bar]:
    """All bars. The long form measures SmolLM2-135M too, and plans for every card."""
    workers = min(2, os.cpu_count() or 1)
    answers = _answers(CARDS_GIB if full else FEW_CARDS_GIB, workers)
    return [*_published(workers), *_paper(), *_cpu(full), *answers, *planned_for_cards()]


def _published(workers: int) -> list[Bar]:
    found = compare(workers=workers, say=lambda each: print(f"{each.row.name}: {each.error:+.1%}", flush=True))
    off = [abs(each.error) for each in found]
    furthest = worst(found, 1)[0].row.name
    what = "published peaks: median absolute error"
    bars = [
        Bar(what, median_error(found), at_most=0.10, note=f"{len(found)} rows"),
        Bar("published peaks: rows within 10 %", sum(each <= 0.1 for each in off), f"of {len(found)}"),
        Bar(
            "published peaks: largest absolute error",
            max(off),
            note=furthest,
        ),
    ]
    for peer in dict.fromkeys(each.peer for each in found):
        of_peer = [each for each in found if each.peer == peer]
        bars.append(Bar(f"{what}, {peer}", median_error(of_peer), note=f"{len(of_peer)} rows"))
    return bars


def _paper() -> list[Bar]:
    found = breakdowns()
    return [
        Bar(
            f"the QLoRA paper's breakdown, {column}: largest error of 7B to 65B",
            max(abs(each.errors[index]) for each in found),
            at_most=0.05,
        )
        for index, column in enumerate(COLUMNS)
    ]


def _cpu(full: bool) -> list[Bar]:
    """Each point's error is shown with its sign."""
    points = [*measure_points(), *(measure_smollm2() if full else ())]
    largest = max(abs(one.error) for one in points)
    bars = [Bar("CPU: planned to measured, largest error", largest, at_most=0.05, note=f"{len(points)} steps")]
    return bars + [Bar(f"CPU, {one.name}: planned to measured", one.error) for one in points]


def _answers(cards: Sequence[int], workers: int) -> list[Bar]:
    """How long a plan takes for each model, on the card for which it takes longest."""
    configs = sorted(CONFIGS.glob("*.json"))
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        answers = list(pool.map(_answer, *zip(*product(configs, cards), strict=True)))
    bars = []
    for config in configs:
        own = [answer for answer in answers if answer.config == config]
        fitting = ", ".join(str(answer.card_gib) for answer in own if answer.fits) or "none"
        note = f"fits, with the changes that it names, on {fitting} of {', '.join(map(str, cards))} GiB"
        longest = max(answer.seconds for answer in own)
        bars.append(Bar(f"plan of {config.stem}: longest answer", longest, "s", at_most=60, note=note))
    return bars


def planned_for_cards() -> list[Bar]:
    """What each recipe for a card will hold on the least card of its class, against what that card has."""
    from qlora_train.api import plan

    bars = []
    for recipe, config, card in FOR_CARDS:
        found = plan(RECIPES / f"{recipe}.yaml", gpu=card, model=str(CONFIGS / f"{config}.json"))
        limit_gib, planned_gib = found.limit_bytes / 2**30, found.plan.device_bytes / 2**30
        bars.append(Bar(f"{recipe}: planned on an {card}", planned_gib, "GiB", at_most=limit_gib))
    return bars


@dataclass(frozen=True)
class _Answer:
    config: Path
    card_gib: int
    seconds: float
    fits: bool  # as it is, or with changes that the plan names


def _answer(config: Path, card_gib: int) -> _Answer:
    from qlora_train.api import plan

    started = time.perf_counter()
    found = plan(RECIPE, vram=f"{card_gib}GiB", model=str(config))
    seconds = time.perf_counter() - started
    return _Answer(config, card_gib, seconds, bool(found.fits) or any(change.fits for change in found.changes))
