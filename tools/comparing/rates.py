"""The search for a learning rate: steps of a factor of two, until the best one has worse ones on both sides."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite

FACTOR = 2.0
MAX_RATES = 7


def next_rate(losses: Mapping[float, float], first: float) -> float | None:
    """The rate to try next, given the loss of each one tried (infinite where it diverged); None when all is known.

    >>> next_rate({}, 1e-3), next_rate({1e-3: 2.0}, 1e-3), next_rate({1e-3: 2.0, 2e-3: 2.1}, 1e-3)
    (0.001, 0.002, 0.0005)
    >>> next_rate({5e-4: 2.1, 1e-3: 2.0, 2e-3: 2.1}, 1e-3) is None
    True
    """
    if not losses:
        return first
    if len(losses) >= MAX_RATES:
        return None
    best = best_rate(losses)
    if best is None:  # all diverged: go down
        return min(losses) / FACTOR
    for rate in (best * FACTOR, best / FACTOR):
        if not any(abs(rate / known - 1) < 1e-6 for known in losses):
            return rate
    return None


def best_rate(losses: Mapping[float, float]) -> float | None:
    """The rate of the least loss; None where every run diverged."""
    finite = {rate: loss for rate, loss in losses.items() if isfinite(loss)}
    return min(finite, key=lambda rate: finite[rate]) if finite else None


def is_inside(losses: Mapping[float, float]) -> bool:
    """Whether the best rate has worse ones on both sides: the grid was wide enough."""
    best = best_rate(losses)
    return best is not None and min(losses) < best < max(losses)
