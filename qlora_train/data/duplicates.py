"""Rows that occur twice: exactly, nearly, or in the training and the validation set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlora_train.data.table import TokenTable
from qlora_train.seeds import derive_seed

SHINGLE = 5  # tokens
MIN_SHINGLES = 8
MIN_SIMILARITY = 0.8
BANDS, ROWS_PER_BAND = 12, 6
MAX_ROWS = 2_000_000  # the band array then takes 192 MB
MAX_EXAMPLES = 10
COMMON_FRAC = 0.2  # of the rows; a shingle in more of them is boilerplate
COMMON_SAMPLE, COMMON_MIN_ROWS = 2_000, 5
COMMON_TOKENS = 4_096  # of a sampled row that are looked at
BATCH_TOKENS = 1 << 16  # 256 KB of 32-bit hashes: a batch stays in the cache while 72 hashes are taken of it

Hashes = NDArray[np.uint64]
Indices = NDArray[np.int64]
_random = np.random.Generator(np.random.PCG64(0))  # fixed: the same rows are found on every machine and in every run
_SHINGLE_FACTORS = _random.integers(0, 1 << 63, SHINGLE, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_MINHASH_FACTORS = _random.integers(0, 1 << 31, (BANDS, ROWS_PER_BAND), dtype=np.uint32) * np.uint32(2) + np.uint32(1)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Pair:
    """Places of two rows that are alike."""

    first: str
    second: str
    similarity: float = 1.0


@dataclass(frozen=True)
class ExactDuplicates:
    """Rows that had occurred before."""

    num_rows: int
    num_duplicates: int
    examples: tuple[Pair, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class NearDuplicates:
    """Rows much like an earlier one. Exact duplicates are not looked at again."""

    num_rows: int
    num_compared: int
    num_too_short: int  # fewer than MIN_SHINGLES shingles, or nothing but boilerplate
    num_near: int
    num_common_shingles: int  # boilerplate, left out
    sampled: bool  # only a random sample of MAX_ROWS rows was looked at
    examples: tuple[Pair, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Overlap:
    """Validation rows that test nothing new: trained on, or asked in training. `first` of a pair is the trained row."""

    num_eval_rows: int
    num_rows: int
    num_prompts: int  # those of `num_rows` among them
    row_examples: tuple[Pair, ...]
    prompt_examples: tuple[Pair, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def exact_duplicates(hashes: Hashes) -> NDArray[np.bool_]:
    """True for every row whose hash occurred earlier."""
    return _earliest(hashes) != np.arange(len(hashes))


def find_exact(hashes: Hashes, where: Callable[[int], str]) -> ExactDuplicates:
    """The rows that `exact_duplicates` marks, counted, with the first of them."""
    earliest = _earliest(hashes)
    later = np.flatnonzero(earliest != np.arange(len(hashes)))
    examples = tuple(Pair(where(int(earliest[row])), where(int(row))) for row in later[:MAX_EXAMPLES])
    return ExactDuplicates(len(hashes), len(later), examples)


def overlap(train: TokenTable, held_out: TokenTable) -> Overlap:
    """Rows of `held_out` that stand in `train` too: as a whole, or by all but the last answer."""
    rows, row_examples = _shared(train, held_out, "content_hash")
    prompts, prompt_examples = _shared(train, held_out, "prompt_hash")
    return Overlap(held_out.num_rows, rows, prompts, row_examples, prompt_examples)


def near_duplicates(table: TokenTable, max_rows: int = MAX_ROWS, seed: int = 0) -> NearDuplicates:
    """Rows whose set of shingles has a Jaccard similarity >= MIN_SIMILARITY with that of an earlier row.

    A shingle is a run of SHINGLE tokens. MinHash with banding: rows equal in one of b = 12 bands of r = 6 hashes are
    candidates, and each is compared exactly with the first row of its group. A pair of similarity J is missed with
    probability (1 - J^r)^b: 2.6 % at 0.8, 0.4 % at 0.85, 0.01 % at 0.9. No pair below the limit is reported.

    Shingles in more than a fifth of the rows (of a sample) are left out, so that a shared system prompt makes no two
    rows alike; a text that a fifth of the rows share goes unseen. About 150 bytes a row, for at most `max_rows` rows.
    """
    rows = np.flatnonzero(~exact_duplicates(table.column("content_hash")))
    sampled = len(rows) > max_rows
    if sampled:
        rows = np.sort(_generator(seed, "near_duplicates").choice(rows, max_rows, replace=False))
    shingler = _Shingler(table, _common_shingles(table, rows, seed))
    compared, bands = _band_hashes(shingler, rows)
    matches, similarities = _verified(shingler, compared, bands)
    found = np.flatnonzero(matches >= 0)
    return NearDuplicates(
        num_rows=table.num_rows,
        num_compared=len(compared),
        num_too_short=len(rows) - len(compared),
        num_near=len(found),
        num_common_shingles=len(shingler.common),
        sampled=sampled,
        examples=tuple(
            Pair(
                table.where(int(compared[matches[later]])),
                table.where(int(compared[later])),
                round(float(similarities[later]), 3),
            )
            for later in found[:MAX_EXAMPLES]
        ),
    )


def _earliest(hashes: Hashes) -> Indices:
    """For each row the first row with its hash."""
    order = np.argsort(hashes, kind="stable")
    return _group_firsts(hashes[order], order)[np.argsort(order, kind="stable")]


def _group_firsts(ordered: Hashes, order: Indices) -> Indices:
    """For each position of a stable sort, the row that is first among those of equal value."""
    new = np.ones(len(ordered), dtype=np.bool_)
    new[1:] = ordered[1:] != ordered[:-1]
    return order[np.flatnonzero(new)][np.cumsum(new) - 1]


def _shared(train: TokenTable, held_out: TokenTable, column: str) -> tuple[int, tuple[Pair, ...]]:
    known, first = np.unique(train.column(column), return_index=True)
    asked = held_out.column(column)
    if not len(known):
        return 0, ()
    at = np.minimum(np.searchsorted(known, asked), len(known) - 1)
    shared = np.flatnonzero(known[at] == asked)
    pairs = [Pair(train.where(int(first[at[row]])), held_out.where(int(row))) for row in shared[:MAX_EXAMPLES]]
    return len(shared), tuple(pairs)


def _generator(seed: int, purpose: str) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(derive_seed(seed, purpose)))


@dataclass(frozen=True, eq=False)
class _Shingler:
    """Rows of a table as hashes of their shingles, without the common ones."""

    table: TokenTable
    common: Hashes  # sorted

    def of_rows(self, rows: Indices) -> tuple[Hashes, Indices]:
        """The hashes of these rows one after the other, and for each the position in `rows` of its row."""
        hashes, owners = _shingle_hashes([row.ids for row in self.table.rows(rows.tolist())])
        kept = ~_contains(self.common, hashes)
        return hashes[kept], owners[kept]

    def batches(self, rows: Indices) -> Iterator[slice]:
        """Slices of `rows` of about BATCH_TOKENS tokens."""
        ends = np.cumsum(self.table.lengths[rows], dtype=np.int64)
        start = 0
        while start < len(rows):
            before = ends[start - 1] if start else 0
            stop = max(start + 1, int(np.searchsorted(ends, before + BATCH_TOKENS, side="right")))
            yield slice(start, stop)
            start = stop


def _shingle_hashes(rows: list[NDArray[np.int32]]) -> tuple[Hashes, Indices]:
    """A hash of each run of SHINGLE tokens within a row, and the row that it is of."""
    owners = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    ids = np.concatenate(rows).astype(np.uint64)
    num_windows = max(0, len(ids) - SHINGLE + 1)
    hashes = np.zeros(num_windows, dtype=np.uint64)
    for offset, factor in enumerate(_SHINGLE_FACTORS):
        hashes += ids[offset : offset + num_windows] * factor
    within = owners[:num_windows] == owners[len(owners) - num_windows :]
    return _mixed(hashes[within]), owners[:num_windows][within]


def _mixed(hashes: Hashes) -> Hashes:
    """Every bit of the result depends on every bit given (the finaliser of SplitMix64)."""
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return hashes ^ (hashes >> np.uint64(31))


def _contains(ordered: Hashes, values: Hashes) -> NDArray[np.bool_]:
    if not len(ordered):
        return np.zeros(len(values), dtype=np.bool_)
    return ordered[np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)] == values


def _common_shingles(table: TokenTable, rows: Indices, seed: int) -> Hashes:
    """The shingles that stand in more than COMMON_FRAC of a sample of the rows, and in COMMON_MIN_ROWS at the least."""
    size = min(COMMON_SAMPLE, len(rows))
    sample = np.sort(_generator(seed, "common_shingles").choice(rows, size, replace=False))
    of_each = [np.unique(_shingle_hashes([table.row(row).ids[:COMMON_TOKENS]])[0]) for row in sample.tolist()]
    hashes, num_rows = np.unique(np.concatenate([np.empty(0, np.uint64), *of_each]), return_counts=True)
    return hashes[(num_rows > COMMON_FRAC * size) & (num_rows >= COMMON_MIN_ROWS)]


def _band_hashes(shingler: _Shingler, rows: Indices) -> tuple[Indices, Hashes]:
    """The rows that are long enough to compare, and their hashes by (band, row)."""
    bands = np.empty((BANDS, len(rows)), dtype=np.uint64)
    long_enough = np.zeros(len(rows), dtype=np.bool_)
    done = 0
    for batch in shingler.batches(rows):
        hashes, owners = shingler.of_rows(rows[batch])
        enough = np.bincount(owners, minlength=batch.stop - batch.start) >= MIN_SHINGLES
        long_enough[batch] = enough
        kept = enough[owners]
        hashes, owners = hashes[kept], owners[kept]
        if not len(hashes):
            continue
        starts = np.flatnonzero(np.diff(owners, prepend=-1))
        bands[:, done : done + len(starts)] = _minhashes((hashes >> np.uint64(32)).astype(np.uint32), starts)
        done += len(starts)
    return rows[long_enough], bands[:, :done]


def _minhashes(hashes: NDArray[np.uint32], starts: Indices) -> Hashes:
    """The bands of rows whose shingles start at `starts`: one number for the ROWS_PER_BAND minima of each band."""
    bands = np.zeros((BANDS, len(starts)), dtype=np.uint64)
    for band, factors in zip(bands, _MINHASH_FACTORS, strict=True):
        for factor in factors:
            np.multiply(band ^ np.minimum.reduceat(hashes * factor, starts), _GOLDEN, out=band)
            band ^= band >> np.uint64(32)
    return bands


def _verified(shingler: _Shingler, rows: Indices, bands: Hashes) -> tuple[Indices, NDArray[np.float32]]:
    """For each of `rows` the position of an earlier row that it is like, or -1; and how much."""
    matches = np.full(len(rows), -1, dtype=np.int64)
    tried = np.full(len(rows), -1, dtype=np.int64)  # spares most pairs that several bands propose
    similarities = np.zeros(len(rows), dtype=np.float32)
    for band in bands:
        order = np.argsort(band, kind="stable")
        firsts = _group_firsts(band[order], order)
        candidate = (firsts != order) & (matches[order] < 0) & (tried[order] != firsts)
        first, later = firsts[candidate], order[candidate]
        tried[later] = first
        by_first = np.lexsort((later, first))
        first, later = first[by_first], later[by_first]
        for batch in shingler.batches(rows[later]):
            values = _similarities(shingler, rows[first[batch]], rows[later[batch]])
            near = values >= MIN_SIMILARITY
            matches[later[batch][near]] = first[batch][near]
            similarities[later[batch]] = values
    return matches, similarities


def _similarities(shingler: _Shingler, first: Indices, second: Indices) -> NDArray[np.float32]:
    """Jaccard similarity of the shingle sets, pair by pair: |A and B| / |A or B|."""
    different, pair_A = np.unique(first, return_inverse=True)
    hashes_A, owners_A = _distinct(*shingler.of_rows(different))
    hashes_B, owners_B = _distinct(*shingler.of_rows(second))
    in_A = _contains(np.sort(_keyed(hashes_A, owners_A)), _keyed(hashes_B, pair_A[owners_B]))
    both = np.bincount(owners_B, in_A, len(second))
    num_A = np.bincount(owners_A, minlength=len(different))[pair_A]
    num_B = np.bincount(owners_B, minlength=len(second))
    return (both / (num_A + num_B - both)).astype(np.float32)


def _distinct(hashes: Hashes, owners: Indices) -> tuple[Hashes, Indices]:
    """Each hash once for each owner."""
    once = np.unique(_keyed(hashes, owners), return_index=True)[1]
    return hashes[once], owners[once]


def _keyed(hashes: Hashes, owners: Indices) -> Hashes:
    """Hashes that are equal only where owner and hash are."""
    return _mixed(hashes + owners.astype(np.uint64) * _GOLDEN)
