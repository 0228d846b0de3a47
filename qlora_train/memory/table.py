"""Models x cards x sequence lengths: the largest micro-batch that fits, with the leanest settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from qlora_train.memory.budget import Choice
from qlora_train.memory.cards import SIZES_GB, Card, find_card, size_card
from qlora_train.memory.estimate import Request
from qlora_train.memory.formula import training_bytes
from qlora_train.model.checkpointing import Checkpointing
from qlora_train.recipe.schema import Recipe

SEQ_LENS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
MOST_PACKS = 64
_STEADY_TOKENS = 4096  # of the second micro-batch that is looked at; each further one is twice as large


@dataclass(frozen=True)
class TableRow:
    """One model at one length: packs of a micro-batch that fit, card by card; 0 where not one does."""

    model: str
    seq_len: int
    least_bytes: int  # with one pack
    packs: tuple[int, ...]


@dataclass(frozen=True)
class PlanTable:
    """The table with what it rests on."""

    cards: tuple[Card, ...]
    rows: tuple[TableRow, ...]
    settings: str  # in words

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "settings": self.settings,
            "cards": [{"name": c.name, "nominal_gb": c.nominal_gb, "total_bytes": c.total_bytes} for c in self.cards],
            "rows": [
                {"model": r.model, "seq_len": r.seq_len, "least_bytes": r.least_bytes, "packs": list(r.packs)}
                for r in self.rows
            ],
        }


def plan_table(planned: Sequence[tuple[Recipe, Any]], gpus: Sequence[str] = ()) -> PlanTable:
    """The table for recipes with the configs of their models; on the named cards, or one of each common size.

    Full checkpointing, no resident layers, gradient accumulation; the recipe's own rank, targets and optimiser. Costs
    some seconds a model.
    """
    cards = tuple(find_card(name) for name in gpus) or tuple(size_card(size) for size in SIZES_GB)
    rows = [
        _row(recipe, config, seq_len, cards)
        for recipe, config in planned
        for seq_len in SEQ_LENS
        if seq_len <= (getattr(config.get_text_config(), "max_position_embeddings", None) or seq_len)
    ]
    first = planned[0][0]
    settings = (
        f"r = {first.adapter.r}, {first.train.optimizer}, {first.quant.quant_type} base, full checkpointing, "
        "with gradient accumulation"
    )
    return PlanTable(cards, tuple(rows), settings)


def _row(recipe: Recipe, config: Any, seq_len: int, cards: Sequence[Card]) -> TableRow:
    def peak(packs: int) -> int:
        request = Request(recipe, config, "cuda").with_changes(
            data={"seq_len": seq_len, "eval": (), "split": None},
            train={"micro_batch_size": packs, "grad_accum_steps": 2, "memory": "fixed"},
        )
        return training_bytes(request, Choice(Checkpointing("full"), 0, 0, fits=True))

    largest = max(card.total_bytes for card in cards)
    peaks, packs = {1: peak(1)}, max(2, min(MOST_PACKS, _STEADY_TOKENS // seq_len))
    while max(peaks.values()) <= largest and packs <= MOST_PACKS:
        peaks[packs] = peak(packs)
        packs *= 2
    return TableRow(recipe.model.path, seq_len, peaks[1], tuple(_fitting(card.total_bytes, peaks) for card in cards))


def _fitting(limit_bytes: int, peaks: Mapping[int, int]) -> int:
    """Packs that surely fit, from the peaks of some counts: peaks bend upwards, and lie below a line between two."""
    fitting = 0
    for (few, low), (many, high) in pairwise(sorted(peaks.items())):
        if low <= limit_bytes:
            fitting = min(many, few + (limit_bytes - low) * (many - few) // max(1, high - low))
    return fitting
