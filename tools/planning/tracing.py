"""A traced step with what its tensors make CUDA's allocator reserve."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from unittest import mock

from planning.allocator import Event, Recorder, least_limit, reserved_bytes
from qlora_train.memory import trace
from qlora_train.memory.measure import trial_batch


@dataclass(frozen=True)
class Traced:
    """Peaks of one step, in bytes."""

    allocated: int
    causes: dict[str, int]  # of what is allocated at the peak
    peak_op: str
    events: tuple[Event, ...]

    @property
    def reserved(self) -> int:
        """What torch's allocator reserves where memory is not short."""
        return reserved_bytes(self.events)

    @property
    def least(self) -> int:
        """What it must be able to reserve for the step to go through."""
        return least_limit(self.events, self.allocated)


def traced_step(model: Any, num_rows: int, num_tokens: int, style: trace.StepStyle) -> Traced:
    """`trace_step` on rows that fill the micro-batch, every token supervised."""
    recorders: list[Recorder] = []

    def recorder(**settings: Any) -> Recorder:
        recorders.append(Recorder(**settings))
        return recorders[-1]

    batch = trial_batch(num_rows, num_tokens, num_tokens, packed=False)
    with mock.patch.object(trace, "LiveBytes", recorder):
        found = trace.trace_step(model, batch, style)
    return Traced(found.peak_bytes, dict(found.causes), found.peak_op, tuple(recorders[0].events))
