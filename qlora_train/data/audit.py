"""The account of a split: how many rows met which fate and why, and what they hold."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

Fate = str  # a key of MEANINGS
MEANINGS: dict[Fate, str] = {
    "kept": "Used whole.",
    "cut": "Longer than seq_len: used up to there, the end is lost.",
    "dropped": "Left out, since as tokens they have nothing to teach or do not fit. The reasons are below.",
    "rejected": "Nothing to train on can be made of them. They are listed in rejected.jsonl.",
    "duplicate": "Left out, since an earlier row is the same.",
    "held_out": "Set aside for validation.",
    "not_selected": "Left out, since the recipe asks for fewer rows.",
}
FATES = tuple(MEANINGS)
TRAINED: tuple[Fate, ...] = ("kept", "cut")
LOST: tuple[Fate, ...] = ("cut", "dropped", "rejected")
EXAMPLES = 3  # of a kind of reason


@dataclass
class Reason:
    """One kind of reason, with its numbers taken out, and the first rows that it befell in full."""

    fate: Fate
    reason: str
    count: int = 0
    examples: list[str] = field(default_factory=list)


class Reasons:
    """Counts reasons by kind; of each kind the first rows are kept in full."""

    def __init__(self) -> None:
        self._found: dict[tuple[Fate, str], Reason] = {}

    def add(self, fate: Fate, reason: str, where: str) -> None:
        """Note one row."""
        self.add_kind(fate, re.sub(r"\d[\d,]*", "#", reason)[:500], 1, [f"{where}: {reason[:500]}"])

    def add_kind(self, fate: Fate, kind: str, count: int, examples: Iterable[str]) -> None:
        """Note rows of one kind, and some of them in full."""
        entry = self._found.setdefault((fate, kind), Reason(fate, kind))
        entry.count += count
        entry.examples += list(islice(examples, EXAMPLES - len(entry.examples)))

    def listed(self, most: int = 50) -> tuple[Reason, ...]:
        """The commonest kinds."""
        return tuple(sorted(self._found.values(), key=lambda entry: -entry.count)[:most])


@dataclass(frozen=True)
class SourceAccount:
    """One source of a split. `num_trained` counts each row once, whatever its weight."""

    name: str
    format: str
    weight: float
    num_rows: int
    num_trained: int


@dataclass(frozen=True)
class Audit:
    """Every row of a split is counted under one fate; those not trained whole are listed in fates.jsonl."""

    split: str
    counts: Mapping[Fate, int]
    reasons: tuple[Reason, ...]
    sources: tuple[SourceAccount, ...]
    num_pieces: int  # that the trained rows make: as many, unless some are split
    num_tokens: int  # of the pieces
    num_supervised_tokens: int
    num_read_tokens: int  # of all rows of the split, the rejected ones at the mean length of the others
    num_lost_tokens: int  # of these: in dropped and rejected rows, and in the ends of cut ones
    num_plain_specials: int
    num_control_specials: int
    num_context_turns: int
    notes: tuple[str, ...] = ()  # what of the sources was not taken as it was written

    @property
    def num_rows(self) -> int:
        """Rows of the split, whatever became of them."""
        return sum(self.counts.values())

    @property
    def num_trained(self) -> int:
        """Rows that are trained on, whole or cut."""
        return sum(self.counts[fate] for fate in TRAINED)

    @property
    def lost_token_frac(self) -> float:
        """Share of the tokens that the data set meant to teach and the model will not see."""
        return self.num_lost_tokens / self.num_read_tokens if self.num_read_tokens else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            **asdict(self),
            "num_rows": self.num_rows,
            "num_trained": self.num_trained,
            "lost_token_frac": self.lost_token_frac,
        }

    def summary(self) -> str:
        """One line for a person."""
        others = [f"{self.counts[fate]:,} {fate.replace('_', ' ')}" for fate in FATES[1:] if self.counts[fate]]
        rows = f"{self.num_trained:,} of {self.num_rows:,} rows" + (f" ({', '.join(others)})" if others else "")
        rows += f", in {self.num_pieces:,} pieces" if self.num_pieces != self.num_trained else ""
        lost = f", {self.lost_token_frac:.1%} of the tokens lost" if self.num_lost_tokens else ""
        formats = "format " + ", ".join(dict.fromkeys(source.format for source in self.sources))
        tokens = f"{self.num_tokens:,} tokens, {self.num_supervised_tokens:,} supervised"
        return "; ".join([f"{self.split}: {rows}, {tokens}{lost}", formats, *self.notes])


def losses(reasons: Iterable[Reason]) -> list[Reason]:
    """The reasons for which tokens are lost that the data set meant to teach, the commonest first."""
    return sorted((entry for entry in reasons if entry.fate in LOST), key=lambda entry: -entry.count)
