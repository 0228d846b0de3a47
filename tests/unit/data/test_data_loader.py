"""Each row exactly once per epoch, as a pure function of (seed, step), with labels and padding where they belong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlora_train.data.loader import Loader, MicroBatch, eval_batches
from qlora_train.data.tokenize import TokenTable
from qlora_train.names import IGNORE_INDEX

TableOf = Callable[[Sequence[int]], TokenTable]
VARIED = [int(length) for length in np.random.default_rng(0).integers(2, 200, size=300)]
BATCHING = ("shuffled", "length_grouped")
LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=60)


def epoch_of(loader: Loader, epoch: int) -> list[list[MicroBatch]]:
    first = epoch * loader.steps_per_epoch
    return [loader.step(index) for index in range(first, first + loader.steps_per_epoch)]


def row_order(loader: Loader, epoch: int) -> list[int]:
    return [row for step in epoch_of(loader, epoch) for batch in step for row in batch.row_ids]


@given(
    lengths=LENGTHS,
    batching=st.sampled_from(BATCHING),
    micro_batch_size=st.integers(1, 7),
    grad_accum_steps=st.integers(1, 5),
    epoch=st.integers(0, 3),
    seed=st.integers(0, 2**40),
)
def test_no_row_is_lost_and_none_seen_twice(
    table_of: TableOf,
    lengths: list[int],
    batching: str,
    micro_batch_size: int,
    grad_accum_steps: int,
    epoch: int,
    seed: int,
) -> None:
    loader = Loader(table_of(lengths), batching, micro_batch_size, grad_accum_steps, 0, seed)
    steps = epoch_of(loader, epoch)
    assert sorted(row_order(loader, epoch)) == list(range(len(lengths)))
    assert all(len(step) == grad_accum_steps for step in steps[:-1]) and 1 <= len(steps[-1]) <= grad_accum_steps
    small = [batch for step in steps for batch in step if len(batch.row_ids) < micro_batch_size]
    assert len(small) <= 1
    assert sum(batch.num_tokens for step in steps for batch in step) == sum(lengths)
    biggest = max(batch.input_ids.numel() for step in steps for batch in step)
    assert biggest <= loader.longest_micro_batch().input_ids.numel()


@given(lengths=LENGTHS, batch_size=st.integers(1, 9))
def test_evaluation_sees_each_row_once_longest_first(table_of: TableOf, lengths: list[int], batch_size: int) -> None:
    batches = list(eval_batches(table_of(lengths), batch_size, 0))
    seen = [row for batch in batches for row in batch.row_ids]
    assert sorted(seen) == list(range(len(lengths)))
    assert [lengths[row] for row in seen] == sorted(lengths, reverse=True)


@pytest.mark.parametrize("batching", BATCHING)
def test_step_is_a_pure_function_of_seed_and_index(table_of: TableOf, batching: str) -> None:
    table = table_of(VARIED)
    one = Loader(table, batching, 4, 3, 0, seed=7)
    forward = [one.step(index) for index in range(2 * one.steps_per_epoch)]
    for index in (40, 3, 26, 0, 25):  # asked of a fresh loader, and out of order
        again = Loader(table, batching, 4, 3, 0, seed=7).step(index)
        for got, want, repeated in zip(again, forward[index], one.step(index), strict=True):
            assert got.row_ids == want.row_ids == repeated.row_ids
            assert torch.equal(got.input_ids, want.input_ids) and torch.equal(got.labels, want.labels)


@pytest.mark.parametrize("batching", BATCHING)
def test_order_differs_between_epochs_and_seeds(table_of: TableOf, batching: str) -> None:
    table = table_of(VARIED)
    one, other = (Loader(table, batching, 4, 3, 0, seed=seed) for seed in (0, 1))
    orders = [row_order(one, 0), row_order(one, 1), row_order(other, 0), row_order(other, 1)]
    assert len(set(map(tuple, orders))) == 4


def test_length_grouping_leaves_less_padding_and_mixes_lengths(table_of: TableOf) -> None:
    shuffled, grouped = (Loader(table_of(VARIED), batching, 8, 1, 0, 0) for batching in BATCHING)
    assert grouped.padding_frac(0) < 0.15 < 0.3 < shuffled.padding_frac(0)
    # Neither the epoch nor a window of 16 micro-batches runs from short to long.
    longest = [batch.input_ids.shape[1] for step in epoch_of(grouped, 0) for batch in step]
    rises = sum(after > before for before, after in pairwise(longest))
    assert 0.3 < rises / len(longest) < 0.7


def test_padding_frac_is_what_the_micro_batches_hold(table_of: TableOf) -> None:
    for batching in BATCHING:
        loader = Loader(table_of(VARIED), batching, 8, 2, 0, 0)
        batches = [batch for step in epoch_of(loader, 1) for batch in step]
        positions = sum(batch.input_ids.numel() for batch in batches)
        assert loader.padding_frac(1) == pytest.approx(1 - sum(VARIED) / positions)


def test_last_step_is_smaller_not_dropped(table_of: TableOf) -> None:
    loader = Loader(table_of([5] * 11), "shuffled", 2, 4, 0, 0)  # micro-batches of 2, 2, 2, 2 | 2, 1
    assert loader.steps_per_epoch == 2
    assert [[len(batch.row_ids) for batch in loader.step(index)] for index in (0, 1)] == [[2, 2, 2, 2], [2, 1]]


@pytest.mark.parametrize("batching", BATCHING)
def test_one_row_and_a_large_batch(table_of: TableOf, batching: str) -> None:
    loader = Loader(table_of([3]), batching, 16, 8, 0, 0)
    assert loader.steps_per_epoch == 1 and loader.padding_frac(0) == 0.0
    assert [batch.row_ids for batch in loader.step(5)] == [(0,)]


def test_labels_and_padding() -> None:
    # The pad id 9 is also the end token: it is trained where it ends a row and ignored where it pads.
    table = TokenTable(
        ids=np.array([1, 2, 9, 3, 4, 5, 6, 9], dtype=np.int32),
        supervised=np.array([0, 1, 1, 0, 0, 0, 1, 1], dtype=np.bool_),
        starts=np.array([0, 3, 8]),
        where=("a:1", "a:2"),
    )
    (batch,) = eval_batches(table, 2, pad_token_id=9)
    assert batch.row_ids == (1, 0) and batch.input_ids.dtype == batch.labels.dtype == torch.int64
    assert batch.input_ids.tolist() == [[3, 4, 5, 6, 9], [1, 2, 9, 9, 9]]
    no = IGNORE_INDEX
    assert batch.labels.tolist() == [[no, no, no, 6, 9], [no, 2, 9, no, no]]
    assert (batch.num_tokens, batch.num_supervised_tokens) == (8, 4)


def test_longest_micro_batch(table_of: TableOf) -> None:
    batch = Loader(table_of([3, 9, 4, 8, 1]), "shuffled", 2, 1, 0, 0).longest_micro_batch()
    assert batch.row_ids == (1, 3) and batch.input_ids.shape == (2, 9)


def test_to_moves_both_tensors(table_of: TableOf) -> None:
    batch = next(eval_batches(table_of([3]), 1, 0)).to("meta")
    assert batch.input_ids.device.type == batch.labels.device.type == "meta" and batch.row_ids == (0,)
