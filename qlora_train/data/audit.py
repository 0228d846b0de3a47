"""What became of every row, and why; and the choice of rows where a recipe wants only so many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np

from qlora_train.data.formats import Row
from qlora_train.seeds import derive_seed

Fate = Literal["kept", "dropped", "rejected", "duplicate", "not_selected"]
FATES: tuple[Fate, ...] = get_args(Fate)
LOST: tuple[Fate, ...] = ("dropped", "rejected")  # what the data set meant to teach, and the model will not see


@dataclass(frozen=True)
class RowFate:
    """One row's end. Token counts are 0 where it was decided before the row was tokenised."""

    where: str
    fate: Fate
    reason: str = ""
    num_tokens: int = 0
    num_supervised_tokens: int = 0


@dataclass(frozen=True)
class Audit:
    """The account of one split: every row is kept and counted, or stands in `fates` with the reason."""

    split: str
    fates: tuple[RowFate, ...]
    counts: dict[Fate, int]
    num_tokens: int
    num_supervised_tokens: int
    num_lost_tokens: int

    @classmethod
    def of(cls, split: str, fates: Iterable[RowFate]) -> Audit:
        """Sums up the fates of all rows, the kept ones among them."""
        every = list(fates)
        counted = Counter(entry.fate for entry in every)
        kept = [entry for entry in every if entry.fate == "kept"]
        return cls(
            split=split,
            fates=tuple(entry for entry in every if entry.fate != "kept"),
            counts={fate: counted[fate] for fate in FATES},
            num_tokens=sum(entry.num_tokens for entry in kept),
            num_supervised_tokens=sum(entry.num_supervised_tokens for entry in kept),
            num_lost_tokens=sum(entry.num_tokens for entry in every if entry.fate in LOST),
        )

    @property
    def num_rows(self) -> int:
        """Rows in the files, whatever became of them."""
        return sum(self.counts.values())

    @property
    def lost_token_frac(self) -> float:
        """Share of the tokens of the chosen rows that will not be seen. A row that never became tokens counts 0."""
        total = self.num_tokens + self.num_lost_tokens
        return self.num_lost_tokens / total if total else 0.0

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the totals first, then every row that is not trained on."""
        totals = {key: value for key, value in asdict(self).items() if key != "fates"}
        return {
            **totals,
            "num_rows": self.num_rows,
            "lost_token_frac": self.lost_token_frac,
            "fates": [asdict(entry) for entry in self.fates],
        }

    def summary(self) -> str:
        """One line for a person."""
        others = [f"{self.counts[fate]:,} {fate.replace('_', ' ')}" for fate in FATES[1:] if self.counts[fate]]
        rows = f"{self.counts['kept']:,} of {self.num_rows:,} rows" + (f" ({', '.join(others)})" if others else "")
        lost = f", {self.lost_token_frac:.1%} of the tokens lost" if self.num_lost_tokens else ""
        return f"{self.split}: {rows}, {self.num_tokens:,} tokens, {self.num_supervised_tokens:,} supervised{lost}"


def select_rows(rows: Sequence[Row], limit: int | None, seed: int) -> tuple[list[Row], list[RowFate]]:
    """A random subset in the original order, the same for the same seed, and the fates of the rows left out.

    `limit` counts rows before any is dropped or rejected. None: all of them.
    """
    if limit is None or limit >= len(rows):
        return list(rows), []
    generator = np.random.Generator(np.random.PCG64(derive_seed(seed, "subset")))
    return _split(rows, set(generator.permutation(len(rows))[:limit].tolist()), f"a random subset of {limit:,} rows")


def first_rows(rows: Sequence[Row], limit: int | None) -> tuple[list[Row], list[RowFate]]:
    """The first `limit` rows and the fates of the others: held-out rows are the same whatever the seed."""
    if limit is None or limit >= len(rows):
        return list(rows), []
    return _split(rows, set(range(limit)), f"the first {limit:,} rows")


def _split(rows: Sequence[Row], chosen: set[int], what: str) -> tuple[list[Row], list[RowFate]]:
    """The chosen rows, and a fate for each of the others."""
    reason = f"the recipe asks for {what}"
    left = [RowFate(row.where, "not_selected", reason) for index, row in enumerate(rows) if index not in chosen]
    return [row for index, row in enumerate(rows) if index in chosen], left
