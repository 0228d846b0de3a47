"""Micro-batches as a pure function of (seed, step): a resume needs a step number and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil

import numpy as np
import torch
from numpy.typing import NDArray

from qlora_train.data.tokenize import TokenTable
from qlora_train.names import IGNORE_INDEX
from qlora_train.seeds import derive_seed

# Micro-batches that are sorted by length together. More leaves less padding and makes epochs more alike.
_WINDOW_MICRO_BATCHES = 16


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Rows padded on the right to the longest of them.

    No attention mask is needed: padding stands after every real token of its row, where causal attention from a real
    token never looks, and its labels are ignored. Labels are aligned with `input_ids`; the loss shifts them.
    """

    input_ids: torch.Tensor  # (B, T) int64
    labels: torch.Tensor  # (B, T) int64, IGNORE_INDEX where not supervised
    num_supervised_tokens: int
    row_ids: tuple[int, ...]  # rows of the table
    row_lengths: tuple[int, ...]  # tokens of each, without padding

    @property
    def num_tokens(self) -> int:
        """Tokens without padding."""
        return sum(self.row_lengths)

    def to(self, device: torch.device | str) -> MicroBatch:
        """The same micro-batch with its tensors on `device`."""
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
        )


class Loader:
    """Every row exactly once per epoch, in an order that follows from the seed and the epoch alone.

    The last micro-batch and the last step of an epoch may be smaller; no row is dropped to make them even.
    """

    def __init__(
        self,
        table: TokenTable,
        batching: str,
        micro_batch_size: int,
        grad_accum_steps: int,
        pad_token_id: int,
        seed: int,
    ) -> None:
        assert table.num_rows > 0 and batching in ("shuffled", "length_grouped")
        self._table, self._lengths = table, table.lengths()
        self._length_grouped = batching == "length_grouped"
        self._micro_batch_size, self._grad_accum_steps = micro_batch_size, grad_accum_steps
        self._pad_token_id, self._seed = pad_token_id, seed
        self._num_micro_batches = ceil(table.num_rows / micro_batch_size)
        self._latest: tuple[int, list[NDArray[np.int64]]] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in which every row is seen once."""
        return ceil(self._num_micro_batches / self._grad_accum_steps)

    def step(self, step_index: int) -> list[MicroBatch]:
        """The micro-batches of one step, counted from 0 across epochs."""
        epoch, within = divmod(step_index, self.steps_per_epoch)
        first = within * self._grad_accum_steps
        rows = self._plan(epoch)[first : first + self._grad_accum_steps]
        return [collate(self._table, row_ids.tolist(), self._pad_token_id) for row_ids in rows]

    def longest_micro_batch(self) -> MicroBatch:
        """The longest rows together: no micro-batch of any epoch needs more memory. For a rehearsal before step 0."""
        longest = np.argsort(-self._lengths, kind="stable")[: self._micro_batch_size]
        return collate(self._table, longest.tolist(), self._pad_token_id)

    def padding_frac(self, epoch: int) -> float:
        """Share of the epoch's positions that are padding."""
        num_positions = sum(len(rows) * int(self._lengths[rows].max()) for rows in self._plan(epoch))
        return 1 - int(self._lengths.sum()) / num_positions

    def _plan(self, epoch: int) -> list[NDArray[np.int64]]:
        """The rows of each micro-batch of an epoch. The latest epoch is kept: steps ask for it again and again."""
        if self._latest is None or self._latest[0] != epoch:
            self._latest = (epoch, self._planned(epoch))
        return self._latest[1]

    def _planned(self, epoch: int) -> list[NDArray[np.int64]]:
        generator = np.random.Generator(np.random.PCG64(derive_seed(self._seed, "order", epoch)))
        order = generator.permutation(self._table.num_rows).astype(np.int64)
        if not self._length_grouped:
            return _cut(order, self._micro_batch_size)
        windows = _cut(order, self._micro_batch_size * _WINDOW_MICRO_BATCHES)
        by_length = [window[np.argsort(self._lengths[window], kind="stable")] for window in windows]
        # A window is a whole number of micro-batches, so only the very last micro-batch can be small.
        micro_batches = [rows for window in by_length for rows in _cut(window, self._micro_batch_size)]
        return [micro_batches[index] for index in generator.permutation(len(micro_batches))]


def eval_batches(table: TokenTable, batch_size: int, pad_token_id: int) -> Iterator[MicroBatch]:
    """Every row once, longest first: little padding, and what does not fit in memory fails at once."""
    order = np.argsort(-table.lengths(), kind="stable")
    for row_ids in _cut(order, batch_size):
        yield collate(table, row_ids.tolist(), pad_token_id)


def collate(table: TokenTable, row_ids: Sequence[int], pad_token_id: int) -> MicroBatch:
    """The rows as one micro-batch. Which labels are ignored follows from the table's mask, never from the pad id."""
    rows = [table.row(index) for index in row_ids]
    shape = (len(rows), max(len(ids) for ids, _ in rows))
    input_ids = np.full(shape, pad_token_id, dtype=np.int64)
    labels = np.full(shape, IGNORE_INDEX, dtype=np.int64)
    for index, (ids, supervised) in enumerate(rows):
        input_ids[index, : len(ids)] = ids
        labels[index, : len(ids)] = np.where(supervised, ids, IGNORE_INDEX)
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(labels),
        num_supervised_tokens=sum(int(supervised.sum()) for _, supervised in rows),
        row_ids=tuple(row_ids),
        row_lengths=tuple(len(ids) for ids, _ in rows),
    )


def _cut(order: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    """`order` in pieces of `size`; the last may be shorter."""
    return [order[first : first + size] for first in range(0, len(order), size)]
