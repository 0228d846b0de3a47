"""Which rows a person should look at: some by chance, and those least like the others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qlora_train.data.table import TokenTable
from qlora_train.seeds import derive_seed

MAX_OF_A_KIND = 2  # rows shown for one feature, so that a set with a hundred long rows shows something else too
_NORMAL_MAD, _NORMAL_MEAN = 1.4826, 1.2533  # what makes either measure of spread the deviation of a normal distribution

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Strange:
    """A row, and what is strange about it."""

    index: int
    reason: str
    score: float  # robust deviations from the median


@dataclass(frozen=True, eq=False)
class _Feature:
    """One number a row. Amounts and ratios are compared as logarithms: half is as strange as twice."""

    name: str
    values: Values
    pattern: str
    as_log: bool = True

    def reason(self, index: int) -> str:
        value, median = (format(number, self.pattern) for number in (self.values[index], np.median(self.values)))
        return f"{value} {self.name}, median {median}"

    def scores(self) -> Values:
        """|value - median| in robust deviations; 0 for all where the values are all the same."""
        values = np.log1p(self.values) if self.as_log else self.values
        distances = np.abs(values - np.median(values))
        # Where more than half of the rows have one value the MAD is 0, and the mean distance has to do.
        spread = _NORMAL_MAD * float(np.median(distances)) or _NORMAL_MEAN * float(distances.mean())
        return distances / spread if spread else np.zeros_like(distances)


def strangest(table: TokenTable, count: int = 5) -> list[Strange]:
    """The rows farthest from the median in any feature, the strangest first; at most MAX_OF_A_KIND for one feature."""
    if not table.num_rows or not count:
        return []
    cells: list[tuple[float, int, int]] = []
    features = _features(table)
    for kind, feature in enumerate(features):
        scores = feature.scores()
        # So many that enough are left when all other rows shown are among them.
        top = np.argsort(-scores, kind="stable")[: count + MAX_OF_A_KIND].tolist()
        cells += [(-float(scores[index]), index, kind) for index in top if scores[index] > 0]
    chosen: dict[int, Strange] = {}
    of_kind = [0] * len(features)
    for score, index, kind in sorted(cells):
        if len(chosen) < count and index not in chosen and of_kind[kind] < MAX_OF_A_KIND:
            chosen[index] = Strange(index, features[kind].reason(index), -score)
            of_kind[kind] += 1
    return list(chosen.values())


def random_rows(table: TokenTable, count: int, seed: int) -> list[int]:
    """Indices of `count` rows, or of all where there are fewer, in the order of the table."""
    generator = np.random.Generator(np.random.PCG64(derive_seed(seed, "preview")))
    chosen = generator.choice(table.num_rows, min(count, table.num_rows), replace=False)
    return sorted(int(index) for index in chosen)


def _features(table: TokenTable) -> list[_Feature]:
    tokens, supervised = table.lengths.astype(np.float64), table.num_supervised.astype(np.float64)
    each = np.maximum(tokens, 1)
    # Characters are those of the whole row, even where the table cuts it.
    chars_per_token = table.column("num_chars") / np.maximum(table.column("num_tokens"), 1)
    return [
        _Feature("tokens", tokens, ",.0f"),
        _Feature("supervised tokens", supervised, ",.0f"),
        _Feature("characters per token", chars_per_token, ".1f"),
        _Feature("of the tokens supervised", supervised / each, ".1%", as_log=False),
    ]
