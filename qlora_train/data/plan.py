"""Which rows come in which order in an epoch: a pure function of (seed, epoch, lengths, passes over the sources)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

from qlora_train.data.pack import pack
from qlora_train.errors import DataError
from qlora_train.seeds import derive_seed

Ints = NDArray[np.int64]

# Micro-batches that are sorted by length together. More leaves less padding and makes epochs more alike.
_WINDOW_MICRO_BATCHES = 16
# Packs are padded to a multiple of this, or to seq_len. Nearly full as they are, most get one width: for every new one
# oneDNN makes its matmuls anew (some 35, a quarter of a second and 20 MB that it keeps); tensor cores like even ones.
PACK_MULTIPLE = 64
_PLANS_KEPT = 2  # a step and the one before it may belong to two epochs; 16 bytes a row each


@dataclass(frozen=True, eq=False)
class Plan:
    """An epoch: rows in order, cut into lines (a pack, or one padded row), and lines into micro-batches."""

    rows: Ints
    line_starts: Ints  # into rows, with the end
    micro_batch_starts: Ints  # into lines, with the end
    pack_len: int | None = None  # tokens that a pack may hold; None: lines are single rows

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of the epoch."""
        return len(self.micro_batch_starts) - 1

    def digest(self) -> str:
        """SHA-256 of the whole order: of the rows, and of where lines and micro-batches start."""
        parts = (self.rows, self.line_starts, self.micro_batch_starts)
        return sha256(b"".join(part.astype("<i8").tobytes() for part in parts)).hexdigest()

    def lines(self, micro_batch: int) -> list[list[int]]:
        """The rows of each line of a micro-batch."""
        return [self._line(i) for i in range(*self.micro_batch_starts[micro_batch : micro_batch + 2].tolist())]

    def rows_before(self, micro_batch: int) -> int:
        """Rows in the micro-batches before this one."""
        return int(self.line_starts[self.micro_batch_starts[micro_batch]])

    def longest_lines(self, lengths: NDArray[np.int32], count: int) -> list[list[int]]:
        """The lines with the most tokens; among equals those with the longest rows, which attention costs most."""
        tokens = lengths[self.rows].astype(np.int64)
        firsts = self.line_starts[:-1]
        order = np.lexsort((-np.add.reduceat(tokens**2, firsts), -np.add.reduceat(tokens, firsts)))
        return [self._line(int(i)) for i in order[:count]]

    def largest_sum(self, values: NDArray[np.int32]) -> int:
        """The most that a micro-batch has of something that each row has `values` of."""
        firsts = self.line_starts[self.micro_batch_starts[:-1]]
        return int(np.add.reduceat(values[self.rows].astype(np.int64), firsts).max())

    def padding_frac(self, lengths: NDArray[np.int32]) -> float:
        """Share of the positions that are padding, each micro-batch being as wide as its longest line asks for."""
        if not len(self.rows):
            return 0.0
        widths = np.add.reduceat(lengths[self.rows].astype(np.int64), self.line_starts[:-1])
        widest = np.maximum.reduceat(widths, self.micro_batch_starts[:-1])
        if self.pack_len is not None:
            widest = np.minimum(-(-widest // PACK_MULTIPLE) * PACK_MULTIPLE, self.pack_len)
        return 1 - int(widths.sum()) / int((widest * np.diff(self.micro_batch_starts)).sum())

    def _line(self, index: int) -> list[int]:
        return self.rows[self.line_starts[index] : self.line_starts[index + 1]].tolist()


class Planner:
    """Plans of epochs. The latest two are kept: steps ask for them again and again.

    A row of a source that is passed over w times an epoch comes floor(w (e + 1) + u) - floor(w e + u) times in epoch e.
    u is (k + v) / n, where k is its place in a random order of the n rows of its source and v, in [0, 1), is drawn for
    the source. So each row comes w times an epoch on average, and each epoch holds w n rows of the source, give or take
    one: 0.5 shows one half in even epochs and the other in odd ones. Without v, small sources would all round down in
    the same epoch.
    """

    def __init__(
        self,
        lengths: NDArray[np.int32],
        sources: NDArray[np.integer],
        passes: Sequence[float],
        batching: str,
        micro_batch_size: int,
        seq_len: int,
        seed: int,
    ) -> None:
        """`sources`: of each row, an index into `passes`. DataError where an epoch, or the first one, holds no row."""
        assert len(lengths) and batching in ("shuffled", "length_grouped", "packed")
        self._lengths, self._batching, self._seed = lengths, batching, seed
        self._micro_batch_size, self._seq_len = micro_batch_size, seq_len
        self._passes = np.asarray(passes, dtype=np.float64)[sources]
        whole = self._passes == np.floor(self._passes)
        self.has_equal_epochs = bool(whole.all())  # the same rows in each, hence as many packs
        if self._passes.sum() < 1:
            raise DataError(
                f"the weights {list(passes)} of the sources leave less than one of {len(lengths)} rows for an epoch",
                fix="raise the weights in data.train",
            )
        # What comes a whole number of times needs no phase: without one, no rounding can move it.
        self._phases = None if self.has_equal_epochs else np.where(whole, 0.0, self._phase(sources))
        if not len(self._occurrences(0)):
            raise DataError(
                f"the weights {list(passes)} take less than one row of each source, and with run.seed {seed} the "
                "first epoch holds none at all",
                fix="raise the weights in data.train, or change run.seed",
            )
        self._plans: dict[int, Plan] = {}

    def most_occurrences(self) -> Ints:
        """Every row as often as it can come in one epoch."""
        return np.repeat(np.arange(len(self._lengths)), np.ceil(self._passes).astype(np.int64))

    def plan(self, epoch: int) -> Plan:
        """The plan of an epoch."""
        if epoch not in self._plans:
            self._plans[epoch] = self._planned(epoch)
            while len(self._plans) > _PLANS_KEPT:
                del self._plans[max(self._plans, key=lambda other: abs(other - epoch))]
        return self._plans[epoch]

    def size(self, epoch: int) -> tuple[int, int]:
        """Micro-batches and rows of an epoch."""
        plan = self.plan(epoch)
        return plan.num_micro_batches, len(plan.rows)

    def _planned(self, epoch: int) -> Plan:
        generator = np.random.Generator(np.random.PCG64(derive_seed(self._seed, "order", epoch)))
        rows = self._occurrences(epoch)
        if not len(rows):
            return Plan(rows, np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64))
        if self._batching == "packed":
            packs = pack(self._lengths[rows], self._seq_len, generator)
            rows, line_starts = _reordered(rows[packs.order], packs.starts, generator.permutation(len(packs)))
            return Plan(rows, line_starts, _cut(len(packs), self._micro_batch_size), self._seq_len)
        rows = rows[generator.permutation(len(rows))]
        if self._batching == "shuffled":
            return Plan(rows, _cut(len(rows), 1), _cut(len(rows), self._micro_batch_size))
        # A window is a whole number of micro-batches, so only the very last micro-batch can be small.
        window = np.arange(len(rows)) // (self._micro_batch_size * _WINDOW_MICRO_BATCHES)
        rows = rows[np.lexsort((self._lengths[rows], window))]
        starts = _cut(len(rows), self._micro_batch_size)
        rows, starts = _reordered(rows, starts, generator.permutation(len(starts) - 1))
        return Plan(rows, _cut(len(rows), 1), starts)

    def _occurrences(self, epoch: int) -> Ints:
        """The rows of an epoch, each as often as it comes."""
        rows = np.arange(len(self._lengths))
        if self._phases is None:
            return np.repeat(rows, self._passes.astype(np.int64))
        before, after = (np.floor(self._passes * e + self._phases) for e in (epoch, epoch + 1))
        return np.repeat(rows, (after - before).astype(np.int64))

    def _phase(self, sources: NDArray[np.integer]) -> NDArray[np.float64]:
        """u of each row, in [0, 1)."""
        phases = np.empty(len(sources))
        for source in np.unique(sources):
            rows = np.flatnonzero(sources == source)
            generator = np.random.Generator(np.random.PCG64(derive_seed(self._seed, "phase", int(source))))
            phases[rows] = (generator.permutation(len(rows)) + generator.random()) / len(rows)
        return phases


def _cut(count: int, size: int) -> Ints:
    """Starts, with the end, of pieces of `size`; the last may be shorter."""
    return np.append(np.arange(0, count, size, dtype=np.int64), count)


def _reordered(values: Ints, starts: Ints, order: Ints) -> tuple[Ints, Ints]:
    """The pieces of `values` in another order, and their new starts."""
    sizes = np.diff(starts)[order]
    new_starts = np.concatenate([[0], np.cumsum(sizes)])
    shift = np.repeat(starts[:-1][order] - new_starts[:-1], sizes)
    return values[np.arange(len(values)) + shift], new_starts
