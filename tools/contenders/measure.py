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
from contenders.results import CONTENDERS, Result

EXTRA_REPEATS = 2  # of the contenders that are quick


DEFAULT = tuple(CONTENDERS)


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
