"""Contenders side by side, each in its process: they take turns, step by step, at the same rows.

A turn is one optimiser step. Of each set of rows the first step is counted and not timed; then each repeat of each
number of threads is one more step, and the best counts. Ours and the ceiling, whose steps are short and whose ratios
are near their bars, make some more; a ratio is one of the best of equally many. The memory peak is that of the second
step: the optimiser's moments exist, and what earlier steps left free was given back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import nan
from typing import Any

from contenders.counting import PARTS
from contenders.job import SETS, Options
from contenders.machine import matmul_flops_per_s
from contenders.processes import Worker

# Largest difference of two losses at the same step, in nats: of the same computation in another order in bf16. Steps of
# 160 supervised tokens differ by up to 0.02 between the peers' own padded and packed modes.
LOSS_TOLERANCE = 0.05
EXTRA_REPEATS = 2  # of the contenders that are quick


@dataclass(frozen=True)
class Contender:
    """What takes part: the worker's name for it, and ours."""

    worker: str
    title: str
    same_base: bool = True  # as ours; else its losses are not ours
    is_quick: bool = False  # it makes EXTRA_REPEATS besides


CONTENDERS = {
    "ours": Contender("ours:full", "ours", is_quick=True),
    "ours_bf16": Contender("ours:bf16", "ours, bf16 base", same_base=False, is_quick=True),
    "trl_padded": Contender("trl_sft:padded", "TRL, documented"),
    "trl_packed": Contender("trl_sft:packed", "TRL, packed"),
    "peft_loop": Contender("peft_loop", "PEFT, plain loop"),
    "ours_none": Contender("ours:none", "ours, memory to spare", is_quick=True),
    "ceiling": Contender("ceiling", "ceiling: bare bf16 model", same_base=False, is_quick=True),
    "ours_eager": Contender("ours:eager", "ours, not compiled"),
}
DEFAULT = tuple(CONTENDERS)


@dataclass(frozen=True)
class Result:
    """One contender on one set with one number of threads. Rates count tokens without padding."""

    contender: str
    set_name: str
    threads: int
    rates: tuple[float, ...]  # tokens per second of each repeat
    body_rates: tuple[float, ...]  # the same without the time of head and loss
    supervised_per_s: float  # the best repeat
    peak_bytes: int  # above the loaded model: resident, or allocated on the card
    losses: tuple[float, ...]  # of every step of the set, nats per supervised token; the ceiling has none
    loss_gap: float | None  # largest distance from ours at the same step; None on another base, or without losses
    flops_per_token: dict[str, float]  # by part: base, adapter, attention, head
    head_flops_per_supervised: float
    dequantisations: float  # per 4-bit weight and micro-step
    saved_bytes: float  # per position and layer, for the backward pass, as it is trained
    layer_saved_bytes: float  # per position, by a layer of which nothing is recomputed
    matmul_frac: float  # of the machine's rate of bf16 matmuls, measured in the same run

    @property
    def tokens_per_s(self) -> float:
        """Of the best repeat."""
        return max(self.rates)

    @property
    def body_tokens_per_s(self) -> float:
        """Of the best repeat, without the time of head and loss."""
        return max(self.body_rates)

    def ratio(self, other: Result, *, head: bool = True) -> float:
        """How many times as fast as the other: the best of equally many repeats, the first ones of each."""
        mine, its = (self.rates, other.rates) if head else (self.body_rates, other.body_rates)
        count = min(len(mine), len(its))
        return max(mine[:count]) / max(its[:count])

    @property
    def agrees(self) -> bool:
        """Whether a ratio of speeds means anything: the same losses as ours, or none to compare."""
        return self.loss_gap is None or self.loss_gap <= LOSS_TOLERANCE


@dataclass(frozen=True)
class Measured:
    """A whole run."""

    results: list[Result]
    settings: dict[str, dict[str, str]]  # by contender
    layer_shapes: list[tuple[int, int]]  # (out, in) of the linear layers of one decoder layer
    num_layers: int
    machine_flops_per_s: dict[int, float]  # by threads
    steps: dict[str, dict[str, Any]]  # by set: tokens and supervised tokens of each step, rows of a step

    def of(self, contender: str, set_name: str, threads: int) -> Result:
        """One result; KeyError when it was not measured."""
        for result in self.results:
            if (result.contender, result.set_name, result.threads) == (contender, set_name, threads):
                return result
        raise KeyError((contender, set_name, threads))


def measure(
    options: Options,
    *,
    contenders: Sequence[str] = DEFAULT,
    sets: Sequence[str] = SETS,
    threads: Sequence[int] = (1, 2),
    repeats: int = 2,
    say: Callable[[str], None] = lambda text: None,
) -> Measured:
    """Run everything: `repeats` of each number of threads. RuntimeError, with its last words, when a contender dies."""
    machine = dict.fromkeys(threads, 0.0)
    with ExitStack() as stack:
        workers = _start(contenders, options, max(threads), stack, say)
        results: list[Result] = []
        steps: dict[str, dict[str, Any]] = {}
        for set_name in sets:
            heard = _train(workers, set_name, threads, repeats, options.device, machine, say)
            steps[set_name] = _common_rows(heard, 1 + repeats * len(threads))
            for count in threads:
                results += [_result(name, set_name, count, machine[count], heard) for name in heard]
        facts = {name: worker.facts for name, worker in workers.items()}
    settings = {name: fact["settings"] for name, fact in facts.items()}
    first = next(iter(facts.values()))
    return Measured(results, settings, first["layer_shapes"], first["num_layers"], machine, steps)


@dataclass(frozen=True)
class _Heard:
    """What a worker said: when loaded, about a set, and of each step."""

    loaded: dict[str, Any]
    about: dict[str, Any]
    threads: list[int]  # of each step
    answers: list[dict[str, Any]]

    def timed(self, threads: int) -> list[int]:
        """The steps with so many threads, but for the first, which is counted."""
        return [step for step, count in enumerate(self.threads) if step and count == threads]

    @property
    def losses(self) -> tuple[float, ...]:
        """Of the steps that have one."""
        return tuple(answer["loss"] for answer in self.answers if answer["loss"] is not None)


def _train(
    workers: dict[str, Worker],
    set_name: str,
    threads: Sequence[int],
    repeats: int,
    device: str,
    machine: dict[int, float],
    say: Callable[[str], None],
) -> dict[str, _Heard]:
    """All steps of a set, in turn; notes in `machine` the best rate of matmuls seen between them."""
    for_all = [threads[0], *(count for count in threads for _ in range(repeats))]
    for_quick = [*for_all, *(count for count in threads for _ in range(EXTRA_REPEATS))]
    heard = {}
    for name, worker in workers.items():
        counts = for_quick if CONTENDERS[name].is_quick else for_all
        heard[name] = _Heard(worker.facts, worker.ask(set=set_name, num_steps=len(counts)), counts, [])
    for step, count in enumerate(for_quick):
        say(f"{set_name}: step {step + 1} of {len(for_quick)}, threads: {count}")
        machine[count] = max(machine[count], matmul_flops_per_s(count, device))
        for name, worker in workers.items():
            if step < len(heard[name].threads):
                heard[name].answers.append(worker.ask(threads=count, count=step == 0, settle=step == 1))
    for worker in workers.values():
        worker.finish()
    return heard


def _common_rows(heard: dict[str, _Heard], num_steps: int) -> dict[str, Any]:
    """Rows of a step, tokens and supervised tokens of those that all make; RuntimeError where they are not the same."""
    found = {
        name: {key: value[:num_steps] if isinstance(value, list) else value for key, value in record.about.items()}
        for name, record in heard.items()
    }
    keys = ("num_rows", "num_tokens", "num_supervised")
    first, *others = found
    for name in others:
        if any(found[name][key] != found[first][key] for key in keys):
            raise RuntimeError(f"{name} had other rows than {first}")
    return {key: found[first][key] for key in keys}


def _start(
    names: Iterable[str], options: Options, threads: int, stack: ExitStack, say: Callable[[str], None]
) -> dict[str, Worker]:
    """Start the workers, two at a time: loading is work for two cores."""
    workers: dict[str, Worker] = {}
    waiting: list[Worker] = []
    for name in names:
        if len(waiting) == 2:
            waiting.pop(0).wait_until_loaded()
        say(f"loading {CONTENDERS[name].title}")
        workers[name] = stack.enter_context(Worker(CONTENDERS[name].worker, options, threads))
        waiting.append(workers[name])
    for worker in waiting:
        worker.wait_until_loaded()
    return workers


def _result(name: str, set_name: str, threads: int, machine_flops_per_s: float, heard: dict[str, _Heard]) -> Result:
    """What the answers of a contender say of its steps with these threads."""
    record = heard[name]
    timed = record.timed(threads)
    tokens, supervised = record.about["num_tokens"], record.about["num_supervised"]
    seconds = {step: record.answers[step]["seconds"] for step in timed}
    body_s = {step: seconds[step] - record.answers[step]["head_s"] for step in timed}
    counts = record.answers[0]["counts"]
    flops = {part: counts["flops"].get(part, 0) / tokens[0] for part in PARTS}
    rates = tuple(tokens[step] / seconds[step] for step in timed)
    reference = heard.get("ours") if CONTENDERS[name].same_base else None
    passes = record.loaded["num_quantised"] * record.about["num_micro_batches"]
    return Result(
        contender=name,
        set_name=set_name,
        threads=threads,
        rates=rates,
        body_rates=tuple(tokens[step] / body_s[step] for step in timed),
        supervised_per_s=max(supervised[step] / seconds[step] for step in timed),
        peak_bytes=record.answers[1]["peak_bytes"] - record.loaded["loaded_bytes"],
        losses=record.losses,
        loss_gap=loss_gap(record.losses, reference.losses) if reference else None,
        flops_per_token=flops,
        head_flops_per_supervised=counts["flops"].get("head", 0) / supervised[0],
        dequantisations=counts["num_dequantised"] / passes if passes else 0.0,
        saved_bytes=counts["saved_bytes"] / counts["positions"] / record.loaded["num_layers"],
        layer_saved_bytes=counts["layer_saved_bytes"] / counts["positions"],
        matmul_frac=sum(flops.values()) * max(rates) / machine_flops_per_s,
    )


def loss_gap(losses: Sequence[float], reference: Sequence[float]) -> float:
    """Largest distance at the same step, of those that both have made, in nats; NaN when any loss is.

    >>> loss_gap((2.0, 1.5), (2.0, 1.25, 1.0))
    0.25
    """
    gaps = [abs(loss - other) for loss, other in zip(losses, reference, strict=False)]
    return nan if any(gap != gap for gap in gaps) else max(gaps)
