"""Memory ran out: where, what was held, what was planned, and what to change, as one error that a user can act on."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch

from qlora_train.errors import OutOfMemory, first_line, requested_bytes
from qlora_train.memory.advice import advise
from qlora_train.memory.plan import Plan
from qlora_train.units import size_text

# What changes in the recipe leave room for when the size of the request is not known: what a plan may be wrong by.
LEAST_RELIEF_FRAC = 0.1
MOST_OPTIONS = 6


@dataclass(frozen=True)
class Option:
    """One way out: overrides as on the command line, and what they come to in words."""

    overrides: str
    effect: str


@dataclass(frozen=True)
class Exhaustion:
    """What is known of the moment at which memory ran out. Sizes are in bytes."""

    where: str  # "at step 12 of 100"
    phase: str
    requested: int | None  # by the allocation that failed, where its message says so
    held: int  # allocated on the card, or resident memory of the process
    message: str  # the first line of the error

    @classmethod
    def of(cls, error: BaseException, where: str, phase: str, device: torch.device) -> Exhaustion:
        """Read what the error and the allocator say. Call it before anything is freed."""
        held = torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss
        return cls(where, phase, requested_bytes(str(error)), held, first_line(error))

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def error(
        self, *, planned: int | None, saved: str, options: Sequence[Option], planned_for: str | None = None
    ) -> OutOfMemory:
        """The error to raise: what happened, what is saved, and the ways out, cheapest first.

        `planned_for`: the stage that was planned, where it is not the phase.
        """
        figures = [f"{size_text(self.held)} were in use"]
        if self.requested is not None:
            figures.append(f"{size_text(self.requested)} more were asked for")
        if planned is not None:
            figures.append(f"{size_text(planned)} were planned for {planned_for or self.phase}")
        what = f"out of memory {self.where}: {', '.join(figures)}\n  {self.message}\n  {saved}"
        fix = "change what costs least first:" if options else "free memory, or use a machine with more"
        return OutOfMemory(
            what, fix="\n".join([fix, *(f"  {option.overrides:<40}  {option.effect}" for option in options)])
        )


def options_of(plan: Plan, exhaustion: Exhaustion, limit_bytes: int, resumes: Callable[[str], bool]) -> list[Option]:
    """What to change in the recipe, in the order of what it costs in speed; `resumes`: a key may change on resume.

    A plan that fitted was wrong, or other programs have taken memory since: the changes are chosen for less than both.
    """
    relief = max(exhaustion.requested or 0, int(LEAST_RELIEF_FRAC * plan.device_bytes))
    changes = advise(plan, max(0, min(limit_bytes, plan.device_bytes) - relief))
    options = []
    for change in changes[:MOST_OPTIONS]:
        slower = f", a step {change.slowdown_frac:.0%} slower" if change.slowdown_frac >= 0.005 else ""
        goes_on = "goes on with --resume" if all(map(resumes, change.overrides)) else "needs a new run"
        sizes = f"{size_text(change.saved_bytes)} less, {size_text(change.peak_bytes)} in all"
        options.append(Option(change.text, f"{change.why}{slower}: {sizes}; {goes_on}"))
    return options


def release(error: BaseException, device: torch.device) -> None:
    """Free what the frames of a failed computation still hold, so that what follows has room."""
    chained: BaseException | None = error
    while chained is not None:
        traceback.clear_frames(chained.__traceback__)
        chained = chained.__cause__ or chained.__context__
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
