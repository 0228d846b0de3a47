"""Who is compared, and what was measured of each: plain data, read without torch."""

from __future__ import annotations

from dataclasses import dataclass

# Largest difference of two losses at the same step, in nats: of the same computation in another order in bf16. Steps of
# 160 supervised tokens differ by up to 0.02 between the peers' own padded and packed modes.
LOSS_TOLERANCE = 0.05


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
