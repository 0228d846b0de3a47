"""What a step of a method takes beside LoRA's: both models in one process, taking turns at the same packs."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from comparing.trial import Failed, Trial

WARM_STEPS = 1
TIMED_STEPS = 6


@dataclass(frozen=True)
class Cost:
    """Seconds of an optimiser step, and what they come to beside the reference's steps of the same turns."""

    step_s: float  # the median
    reference_step_s: float
    time_ratio: float  # the median of the turns' ratios
    lowest: float
    highest: float
    num_turns: int

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


class Side:
    """A model that is ready to train, and its steps."""

    def __init__(self, trial: Trial) -> None:
        """Failed where the method is refused or cannot be prepared."""
        from qlora_train.artifacts.layout import RunDir
        from qlora_train.errors import UserError
        from qlora_train.recipe.load import load_recipe
        from qlora_train.train.metrics import Silent
        from qlora_train.train.setup import prepare

        try:
            recipe = load_recipe(trial.recipe, [*trial.overrides(), "run.dir=unused"]).recipe
            self._job = prepare(recipe, RunDir(Path("unused")), Silent()).job
        except UserError as error:
            raise Failed(f"refused: {error}") from error
        self._job.model.train()
        self._learning_rate = trial.learning_rate

    def step(self, number: int) -> float:
        """Make one step; its seconds."""
        from qlora_train.train.step import train_step

        job = self._job
        batches = job.loader.step(number)
        _wait(job.accelerator.device)
        started = time.perf_counter()
        train_step(
            job.causal,
            batches,
            job.optimizer,
            job.accelerator,
            seed=0,
            step=number,
            learning_rate=self._learning_rate,
            max_grad_norm=job.recipe.train.max_grad_norm,
            hooks=job.hooks,
        )
        _wait(job.accelerator.device)
        return time.perf_counter() - started


def _wait(device: Any) -> None:
    """Until a card has done what it was given."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def measure_cost(side: Side, reference: Side, *, num_turns: int = TIMED_STEPS) -> Cost:
    """Steps in turn at the same packs, who is first changing from turn to turn."""
    seconds: list[tuple[float, float]] = []
    for number in range(WARM_STEPS + num_turns):
        if number % 2:
            own, other = side.step(number), reference.step(number)
        else:
            other, own = reference.step(number), side.step(number)
        seconds.append((own, other))
    return cost_of(seconds[WARM_STEPS:])


def cost_of(turns: Sequence[tuple[float, float]]) -> Cost:
    """From (own, reference) seconds of each turn.

    >>> cost_of([(2.0, 1.0), (3.0, 2.0), (4.0, 1.0)]).time_ratio
    2.0
    """
    ratios = [own / other for own, other in turns]
    return Cost(
        step_s=median(own for own, _ in turns),
        reference_step_s=median(other for _, other in turns),
        time_ratio=median(ratios),
        lowest=min(ratios),
        highest=max(ratios),
        num_turns=len(turns),
    )


def release() -> None:
    """Give back what the last side held."""
    gc.collect()
