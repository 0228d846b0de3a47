"""Micro-batches as a pure function of (seed, step): a resume needs a step number and nothing else."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import ceil

import numpy as np
import torch
from numpy.typing import NDArray

from qlora_train.data.plan import PACK_MULTIPLE, Plan, Planner
from qlora_train.data.table import TokenRow, TokenTable
from qlora_train.names import IGNORE_INDEX


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Rows in lines of tokens: one row a line, or, where packed, several end to end. Lines are padded on the right.

    No attention mask is needed: padding stands after every real token of its line, where causal attention from a real
    token never looks, and its labels are ignored. Rows of a pack are kept apart by `row_starts` and `row_lengths`
    (model/attention.py). Labels are aligned with `input_ids`; the loss shifts them, and since no row supervises its
    first token, nothing is predicted across a boundary.
    """

    input_ids: torch.Tensor  # (B, T) int64
    labels: torch.Tensor  # (B, T) int64, IGNORE_INDEX where not supervised
    num_supervised_tokens: int
    row_ids: tuple[int, ...]  # rows of the table, line by line
    row_lengths: tuple[int, ...]  # tokens of each, without padding
    row_starts: tuple[int, ...] | None = None  # of packed rows: line * T + offset in the line
    position_ids: torch.Tensor | None = None  # (B, T) int64, where packed: from 0 in each row
    weights: torch.Tensor | None = None  # (B, T) float32, of each label in the loss; None: all 1
    # Lines and places in labels[:, 1:] of the supervised tokens; None until `to` finds them where the labels are.
    supervised: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens without padding."""
        return sum(self.row_lengths)

    @property
    def weight_sum(self) -> float:
        """What the summed loss is divided by: the supervised tokens, each as often as it weighs."""
        return float(self.num_supervised_tokens) if self.weights is None else float(self.weights.double().sum())

    def to(self, device: torch.device | str) -> MicroBatch:
        """The same micro-batch with its tensors on `device`.

        The supervised places are found on the host first: looking for them on a card would wait for all that it has
        to do.
        """
        lines, places = self.supervised or (self.labels[:, 1:] != IGNORE_INDEX).nonzero(as_tuple=True)

        def moved(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            position_ids=moved(self.position_ids),
            weights=moved(self.weights),
            supervised=(lines.to(device, non_blocking=True), places.to(device, non_blocking=True)),
        )


class Loader:
    """The micro-batches of each step, and where in the data a step stands. See `data.plan` for their order.

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
        *,
        seq_len: int,
        source_passes: Sequence[float] = (),
    ) -> None:
        """`micro_batch_size` counts lines (packs or padded rows); `source_passes`: of each source, per epoch."""
        self._table, self._pad_token_id = table, pad_token_id
        self._micro_batch_size, self._grad_accum_steps = micro_batch_size, grad_accum_steps
        self._packed = batching == "packed"
        sources = table.column("source")
        passes = tuple(source_passes) or (1.0,) * (int(sources.max()) + 1)
        self._seq_len = seq_len
        self._planner = Planner(table.lengths, sources, passes, batching, micro_batch_size, seq_len, seed)
        self._firsts = [(0, 0)]  # (step, row) that each epoch starts at, as far as known

    def step(self, step_index: int) -> list[MicroBatch]:
        """The micro-batches of one step, counted from 0 across epochs."""
        epoch, within = self._locate(step_index)
        return [self._collate(lines) for lines in self._lines_of_step(self._planner.plan(epoch), within)]

    def num_steps(self, epochs: float, most: int | None = None) -> int:
        """Optimiser steps of so many epochs, at most `most`; a part of an epoch is rounded up to whole steps."""
        whole = int(epochs)
        # Epochs that differ are planned one by one: no more of them than `most` steps need.
        one_by_one = range(0 if self._planner.has_equal_epochs else whole)
        if most is not None and any(self._first(epoch + 1)[0] >= most for epoch in one_by_one):
            return most
        steps = self._first(whole)[0]
        if epochs > whole and (in_next := self._first(whole + 1)[0] - steps):
            # 1.1 - 1 is a little more than 0.1: of ten steps that is still one.
            steps += max(1, ceil((epochs - whole) * in_next - 1e-6))
        return steps if most is None else min(steps, most)

    def rows_before(self, step_index: int) -> int:
        """Rows consumed by the steps before this one: the position in the data that a checkpoint stores."""
        epoch, within = self._locate(step_index)
        plan = self._planner.plan(epoch)
        return self._first(epoch)[1] + plan.rows_before(within * self._grad_accum_steps)

    def num_rows_reached(self, num_steps: int) -> int:
        """Different rows that come in the first so many steps: fewer than all with low weights or a short run."""
        reached = np.zeros(self._table.num_rows, dtype=np.bool_)
        epoch = 0
        while (first := self._first(epoch)[0]) < num_steps and not reached.all():
            plan = self._planner.plan(epoch)
            stop = min((num_steps - first) * self._grad_accum_steps, plan.num_micro_batches)
            reached[plan.rows[: plan.rows_before(stop)]] = True
            epoch += 1
        return int(reached.sum())

    def plan_digest(self, step_index: int) -> str:
        """SHA-256 of the order of the epoch that a step belongs to: what a checkpoint stores besides the position."""
        return self._planner.plan(self._locate(step_index)[0]).digest()

    def longest_micro_batch(self) -> MicroBatch:
        """What no micro-batch of the first epoch exceeds, for a rehearsal before step 0: the most tokens that come
        together, with as many of them supervised as in the one that has the most.

        Padded: the longest rows, more than any epoch needs. Packed: the fullest packs; how full packs are follows from
        the lengths alone, so other epochs have the same unless a source is passed over a broken number of times.
        """
        count, supervised = self._micro_batch_size, self._table.num_supervised
        if self._packed:
            plan = self._planner.plan(0)
            lines = plan.longest_lines(self._table.lengths, count)
            most = plan.largest_sum(supervised)
        else:
            rows = self._planner.most_occurrences()
            longest = np.argsort(-self._table.lengths[rows], kind="stable")[:count]
            lines = [[row] for row in rows[longest].tolist()]
            most = int(np.sort(supervised[rows])[-count:].sum())
        return _with_supervised(self._collate(lines), most)

    def num_lines(self, epoch: int) -> int:
        """Packs of an epoch, or padded rows."""
        return len(self._planner.plan(epoch).line_starts) - 1

    def num_tokens(self, epoch: int) -> int:
        """Tokens of an epoch's rows, without padding."""
        return int(self._table.lengths[self._planner.plan(epoch).rows].sum())

    def padding_frac(self, epoch: int) -> float:
        """Share of the epoch's positions that are padding."""
        return self._planner.plan(epoch).padding_frac(self._table.lengths)

    def _lines_of_step(self, plan: Plan, within: int) -> list[list[list[int]]]:
        """Lines of rows of each micro-batch of a step.

        The one place where several processes would part the work: process i of n would take every n-th micro-batch of
        the step, [i::n], and everything that counts rows or tokens would go on counting the whole step.
        """
        first = within * self._grad_accum_steps
        return [plan.lines(m) for m in range(first, min(first + self._grad_accum_steps, plan.num_micro_batches))]

    def _collate(self, lines: Sequence[Sequence[int]]) -> MicroBatch:
        return collate(self._table, lines, self._pad_token_id, packed=self._packed, seq_len=self._seq_len)

    def _locate(self, step_index: int) -> tuple[int, int]:
        """Epoch and step within it. An epoch may hold no row at all where sources are passed over less than once."""
        if self._planner.has_equal_epochs:
            return divmod(step_index, self._first(1)[0])
        while self._firsts[-1][0] <= step_index:
            self._first(len(self._firsts))
        epoch = bisect_right(self._firsts, step_index, key=lambda first: first[0]) - 1
        return epoch, step_index - self._firsts[epoch][0]

    def _first(self, epoch: int) -> tuple[int, int]:
        """The first step and row of an epoch, counted from the start of training."""
        if epoch > 1 and self._planner.has_equal_epochs:
            steps, rows = self._first(1)
            return epoch * steps, epoch * rows
        while len(self._firsts) <= epoch:
            num_micro_batches, num_rows = self._planner.size(len(self._firsts) - 1)
            step, row = self._firsts[-1]
            self._firsts.append((step + ceil(num_micro_batches / self._grad_accum_steps), row + num_rows))
        return self._firsts[epoch]


def eval_batches(table: TokenTable, batch_size: int, pad_token_id: int) -> Iterator[MicroBatch]:
    """Every row once, padded, longest first: little padding, and what does not fit in memory fails at once."""
    order = np.argsort(-table.lengths, kind="stable").tolist()
    for first in range(0, len(order), batch_size):
        yield collate(table, [[row] for row in order[first : first + batch_size]], pad_token_id)


def collate(
    table: TokenTable,
    lines: Sequence[Sequence[int]],
    pad_token_id: int,
    *,
    packed: bool = False,
    seq_len: int | None = None,
) -> MicroBatch:
    """Lines of rows as one micro-batch. Ignored labels follow from the table's spans, never from the pad id.

    Padded rows are as wide as the longest of them; packs as the next multiple of PACK_MULTIPLE, at most `seq_len`.
    """
    row_ids = [row for line in lines for row in line]
    rows = table.rows(row_ids)
    lengths = [len(row.ids) for row in rows]
    width, starts = _layout([len(line) for line in lines], lengths, PACK_MULTIPLE if packed else 1, seq_len)
    size = len(lines) * width
    input_ids = np.full(size, pad_token_id, dtype=np.int64)
    labels = np.full(size, IGNORE_INDEX, dtype=np.int64)
    position_ids = np.zeros(size, dtype=np.int64) if packed else None
    weights: NDArray[np.float32] | None = None
    counting = np.arange(max(lengths))
    num_supervised = 0
    for start, row in zip(starts, rows, strict=True):
        input_ids[start : start + len(row.ids)] = row.ids
        if position_ids is not None:
            position_ids[start : start + len(row.ids)] = counting[: len(row.ids)]
        if weights is None and (row.span_weights != 1).any():
            weights = (labels != IGNORE_INDEX).astype(np.float32)
        num_supervised += _supervise(row, start, labels, weights)

    def shaped(flat: NDArray[np.int64] | NDArray[np.float32] | None) -> torch.Tensor | None:
        return None if flat is None else torch.from_numpy(flat).view(len(lines), width)

    return MicroBatch(
        input_ids=torch.from_numpy(input_ids).view(len(lines), width),
        labels=torch.from_numpy(labels).view(len(lines), width),
        num_supervised_tokens=num_supervised,
        row_ids=tuple(row_ids),
        row_lengths=tuple(lengths),
        row_starts=tuple(starts) if packed else None,
        position_ids=shaped(position_ids),
        weights=shaped(weights),
    )


def _with_supervised(batch: MicroBatch, count: int) -> MicroBatch:
    """The same tokens, of which at least `count` are supervised, or all that can be: in a line, all but the first."""
    labels = batch.labels.clone()
    real = torch.zeros_like(labels, dtype=torch.bool)
    for line, stop in enumerate(_line_stops(batch)):
        real[line, 1:stop] = True
    more = (real & (labels == IGNORE_INDEX)).flatten().nonzero()[:, 0][: max(0, count - batch.num_supervised_tokens)]
    labels.view(-1)[more] = batch.input_ids.view(-1)[more]
    weights = None if batch.weights is None else batch.weights.clone()
    if weights is not None:
        weights.view(-1)[more] = 1.0
    num_supervised_tokens = batch.num_supervised_tokens + len(more)
    return replace(batch, labels=labels, weights=weights, num_supervised_tokens=num_supervised_tokens, supervised=None)


def _line_stops(batch: MicroBatch) -> list[int]:
    """Tokens of each line, without padding."""
    if batch.row_starts is None:
        return list(batch.row_lengths)
    width, stops = batch.input_ids.shape[1], [0] * len(batch.input_ids)
    for start, length in zip(batch.row_starts, batch.row_lengths, strict=True):
        stops[start // width] = start % width + length
    return stops


def _layout(
    line_sizes: Sequence[int], lengths: Sequence[int], multiple: int, most: int | None
) -> tuple[int, list[int]]:
    """Width of the lines, a multiple of `multiple` or `most`, and where each row starts in the flat micro-batch."""
    offsets, widths, left = [], [], iter(lengths)
    for size in line_sizes:
        *within, stop = accumulate((next(left) for _ in range(size)), initial=0)
        offsets.append(within)
        widths.append(stop)
    width = -(-max(widths) // multiple) * multiple
    if most is not None:
        width = min(width, most)
    return width, [index * width + offset for index, within in enumerate(offsets) for offset in within]


def _supervise(row: TokenRow, at: int, labels: NDArray[np.int64], weights: NDArray[np.float32] | None) -> int:
    """Write a row's labels and weights; returns the number of supervised tokens."""
    # In a pack the token before a row's first one belongs to another row: nothing may be predicted from it.
    assert not len(row.span_starts) or row.span_starts[0] > 0, "a row supervises its first token"
    count = 0
    for start, stop, weight in zip(
        row.span_starts.tolist(), row.span_stops.tolist(), row.span_weights.tolist(), strict=True
    ):
        labels[at + start : at + stop] = row.ids[start:stop]
        if weights is not None:
            weights[at + start : at + stop] = weight
        count += stop - start
    return count
