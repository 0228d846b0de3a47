"""What a run tells of itself while it trains: losses that leap, and adapters that do not learn."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import torch
from torch import Tensor

from qlora_train.adapters.state import split_name
from qlora_train.names import TOKEN_ROWS

WINDOW = 50  # steps that a loss is held against
LEAST = 20  # of them before a spike can be told
# Of 373 logged steps of the recipes quickstart, spelling and jargon, none lies above 4.
SPIKE_DEVIATIONS = 6.0
FEW_STEPS = 2  # after which B has moved, and a gradient has come to A
ZERO_STEPS = 3  # in a row


def spike_limit(recent: Sequence[float]) -> float | None:
    """What a loss must exceed to be a spike: the median of the last steps and SPIKE_DEVIATIONS robust deviations.

    A robust deviation is 1.4826 times the median distance from the median, which is the standard deviation where losses
    are normal, but no less than 1 % of the median. None while there are too few steps to tell.

    >>> spike_limit([2.0] * 30)
    2.12
    """
    if len(recent) < LEAST:
        return None
    middle = median(recent)
    deviation = 1.4826 * median(abs(loss - middle) for loss in recent)
    return middle + SPIKE_DEVIATIONS * max(deviation, 0.01 * abs(middle))


class DeadAdapters:
    """Tells which adapted layers do not learn, and why, from the norms of the first steps; later, gradients of zero.

    Norms are (P,), of the parameters by these names. Costs a comparison on the device in the first steps, and the one
    transfer at the end of them. A resumed run has no first steps: near the end of a schedule updates round to nothing.
    """

    def __init__(self, names: Sequence[str], weight_norms: Tensor, *, from_start: bool = True) -> None:
        # Rows of new tokens wait until their tokens are read.
        split = [split_name(name) for name in names]
        self._places = [place for place, (_, attribute) in enumerate(split) if attribute != TOKEN_ROWS]
        self._layers = [split[place][0] or names[place] for place in self._places]
        self._start = weight_norms[self._places]
        self._reached = torch.zeros(len(self._places), dtype=torch.bool, device=weight_norms.device)
        self._moved = self._reached.clone()
        self._steps = 0 if from_start else FEW_STEPS
        self._zero_steps = 0

    def look(self, grad_norms: Tensor, weight_norms: Tensor, grad_norm: float, learning_rate: float) -> list[str]:
        """What is to be said after a step; the likely cause with it."""
        self._steps += 1
        self._zero_steps = 0 if grad_norm else self._zero_steps + 1
        if self._steps <= FEW_STEPS:
            self._reached |= grad_norms[self._places] > 0
            self._moved |= weight_norms[self._places] != self._start
        if self._steps == FEW_STEPS:
            return self._first_steps(learning_rate)
        if self._zero_steps == ZERO_STEPS and self._steps > FEW_STEPS:
            return [
                f"the gradient is exactly zero for {ZERO_STEPS} steps now: every supervised token is predicted with "
                "certainty, or the model's activations have died; nothing is learned any more"
            ]
        return []

    def _first_steps(self, learning_rate: float) -> list[str]:
        layers = dict.fromkeys(self._layers)
        reached = {layer for layer, found in zip(self._layers, self._reached.tolist(), strict=True) if found}
        moved = {layer for layer, found in zip(self._layers, self._moved.tolist(), strict=True) if found}
        unreached = [layer for layer in layers if layer not in reached]
        unmoved = [layer for layer in layers if layer in reached and layer not in moved]
        texts = []
        if unreached:
            share = "any" if len(unreached) == len(layers) else f"{len(unreached)}"
            texts.append(
                f"no gradient reached {share} of the {len(layers)} adapted layers in {FEW_STEPS} steps (first "
                f"{unreached[0]}): what the rows train does not go through them; choose other adapter.target_modules, "
                "and see `check --deep`"
            )
        if unmoved:
            texts.append(
                f"{len(unmoved)} of the {len(layers)} adapted layers have gradients and did not move in {FEW_STEPS} "
                f"steps (first {unmoved[0]}): updates at a learning rate of {learning_rate:.1e} are lost in the "
                "rounding of float32; raise train.learning_rate"
            )
        return texts
