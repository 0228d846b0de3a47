"""Rows as often as they are to come, as a pure function of (seed, step); labels and boundaries where they belong."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from hashlib import sha256
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlora_train.data.loader import Loader, MicroBatch, collate, eval_batches
from qlora_train.data.plan import PACK_MULTIPLE, Plan, Planner
from qlora_train.data.table import TokenRow, TokenTable
from qlora_train.errors import DataError
from qlora_train.names import IGNORE_INDEX

SEQ_LEN = 200
VARIED = [int(length) for length in np.random.default_rng(0).integers(2, SEQ_LEN, size=300)]
BATCHING = ("shuffled", "length_grouped", "packed")
LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=60)
NO = IGNORE_INDEX


def row_of(ids: Sequence[int], *spans: tuple[int, int, float]) -> TokenRow:
    starts, stops, weights = zip(*spans, strict=True) if spans else ((), (), ())
    return TokenRow(
        np.array(ids, np.int32), np.array(starts, np.int32), np.array(stops, np.int32), np.array(weights, np.float32)
    )


def table_of(lengths: Sequence[int]) -> TokenTable:
    """Row i holds only the id i + 1, with every position but the first supervised."""
    return TokenTable.of_rows(
        [row_of([index + 1] * n, *([(1, n, 1.0)] if n > 1 else [])) for index, n in enumerate(lengths)]
    )


def loader_of(
    table: TokenTable, batching: str = "packed", micro_batch_size: int = 4, grad_accum_steps: int = 3, seed: int = 0
) -> Loader:
    return Loader(table, batching, micro_batch_size, grad_accum_steps, 0, seed, seq_len=SEQ_LEN)


def epoch_of(loader: Loader, epoch: int) -> list[list[MicroBatch]]:
    return [loader.step(index) for index in range(loader.num_steps(epoch), loader.num_steps(epoch + 1))]


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
    lengths: list[int], batching: str, micro_batch_size: int, grad_accum_steps: int, epoch: int, seed: int
) -> None:
    loader = Loader(table_of(lengths), batching, micro_batch_size, grad_accum_steps, 0, seed, seq_len=40)
    steps = epoch_of(loader, epoch)
    assert sorted(row_order(loader, epoch)) == list(range(len(lengths)))
    assert all(len(step) == grad_accum_steps for step in steps[:-1]) and 1 <= len(steps[-1]) <= grad_accum_steps
    batches = [batch for step in steps for batch in step]
    assert sum(len(batch.input_ids) < micro_batch_size for batch in batches) <= 1
    assert max(len(batch.input_ids) for batch in batches) <= micro_batch_size
    assert sum(batch.num_tokens for batch in batches) == sum(lengths)
    assert max(batch.input_ids.numel() for batch in batches) <= loader.longest_micro_batch().input_ids.numel()
    if batching == "packed":
        assert {batch.input_ids.shape[1] for batch in batches} == {40}, "no pack is wider than seq_len"


@given(lengths=LENGTHS, micro_batch_size=st.integers(1, 4))
def test_packed_rows_stand_whole_where_their_boundaries_say(lengths: list[int], micro_batch_size: int) -> None:
    loader = Loader(table_of(lengths), "packed", micro_batch_size, 1, 0, 0, seq_len=100)
    for (batch,) in epoch_of(loader, 0):
        assert batch.row_starts is not None and batch.position_ids is not None
        width = batch.input_ids.shape[1]
        ids, positions, labels = (x.flatten().tolist() for x in (batch.input_ids, batch.position_ids, batch.labels))
        covered = set()
        for row, start, length in zip(batch.row_ids, batch.row_starts, batch.row_lengths, strict=True):
            assert length == lengths[row] and start // width == (start + length - 1) // width, "within one pack"
            assert ids[start : start + length] == [row + 1] * length
            assert positions[start : start + length] == list(range(length))
            assert labels[start : start + length] == [NO] + [row + 1] * (length - 1)
            covered |= set(range(start, start + length))
        assert len(covered) == batch.num_tokens, "none overlaps"
        padding = [place for place in range(len(ids)) if place not in covered]
        assert all(ids[place] == 0 and labels[place] == NO for place in padding)
        longest = max(
            1 + max(place for place in covered if place // width == line) % width
            for line in range(len(batch.input_ids))
        )
        assert width == min(PACK_MULTIPLE * math.ceil(longest / PACK_MULTIPLE), 100), "as the longest pack asks for"


@given(lengths=LENGTHS, batch_size=st.integers(1, 9))
def test_evaluation_sees_each_row_once_longest_first(lengths: list[int], batch_size: int) -> None:
    batches = list(eval_batches(table_of(lengths), batch_size, 0))
    seen = [row for batch in batches for row in batch.row_ids]
    assert sorted(seen) == list(range(len(lengths)))
    assert [lengths[row] for row in seen] == sorted(lengths, reverse=True)
    assert all(batch.row_starts is None and batch.position_ids is None for batch in batches)


@pytest.mark.parametrize("batching", BATCHING)
def test_step_is_a_pure_function_of_seed_and_index(batching: str) -> None:
    table = table_of(VARIED)
    one = loader_of(table, batching, seed=7)
    forward = [one.step(index) for index in range(one.num_steps(2))]
    last = len(forward) - 1
    for index in (last, 3, last - 1, 0, last // 2 + 1):  # asked of a fresh loader, and out of order
        again = loader_of(table, batching, seed=7).step(index)
        for got, want, repeated in zip(again, forward[index], one.step(index), strict=True):
            assert got.row_ids == want.row_ids == repeated.row_ids
            assert torch.equal(got.input_ids, want.input_ids) and torch.equal(got.labels, want.labels)


@pytest.mark.parametrize("batching", BATCHING)
def test_order_differs_between_epochs_and_seeds(batching: str) -> None:
    one, other = (loader_of(table_of(VARIED), batching, seed=seed) for seed in (0, 1))
    orders = [row_order(one, 0), row_order(one, 1), row_order(other, 0), row_order(other, 1)]
    assert len(set(map(tuple, orders))) == 4


def test_packs_of_an_epoch_come_in_random_order() -> None:
    """Best fit opens the packs of the longest rows first; training must not see them first."""
    longest = [max(batch.row_lengths) for (batch,) in epoch_of(loader_of(table_of(VARIED), "packed", 1, 1), 0)]
    rises = sum(after > before for before, after in pairwise(longest))
    assert 0.3 < rises / len(longest) < 0.7


def test_packing_leaves_less_padding_than_grouping_than_chance() -> None:
    shuffled, grouped, packed = (loader_of(table_of(VARIED), batching, 8, 1) for batching in BATCHING)
    assert packed.padding_frac(0) < 0.05 < grouped.padding_frac(0) < 0.15 < 0.3 < shuffled.padding_frac(0)
    # Neither the epoch nor a window of 16 micro-batches runs from short to long.
    longest = [batch.input_ids.shape[1] for step in epoch_of(grouped, 0) for batch in step]
    rises = sum(after > before for before, after in pairwise(longest))
    assert 0.3 < rises / len(longest) < 0.7


@pytest.mark.parametrize("batching", BATCHING)
def test_padding_frac_is_what_the_micro_batches_hold(batching: str) -> None:
    loader = loader_of(table_of(VARIED), batching, 8, 2)
    positions = sum(batch.input_ids.numel() for step in epoch_of(loader, 1) for batch in step)
    assert loader.padding_frac(1) == pytest.approx(1 - sum(VARIED) / positions)


def test_last_step_is_smaller_not_dropped() -> None:
    loader = loader_of(table_of([5] * 11), "shuffled", 2, 4)  # micro-batches of 2, 2, 2, 2 | 2, 1
    assert loader.num_steps(1) == 2
    assert [[len(batch.row_ids) for batch in loader.step(index)] for index in (0, 1)] == [[2, 2, 2, 2], [2, 1]]


@pytest.mark.parametrize(
    ("epochs", "steps"),
    [(1, 10), (2, 20), (0.1, 1), (0.11, 2), (1.1, 11), (2.5, 25), (2.51, 26), (3.3, 33), (1e-9, 1), (0, 0)],
)
def test_a_part_of_an_epoch_is_rounded_up_to_steps(epochs: float, steps: int) -> None:
    assert loader_of(table_of([5] * 20), "shuffled", 2, 1).num_steps(epochs) == steps


@pytest.mark.parametrize(
    ("epochs", "most", "steps"),
    [(1e9, 5, 5), (2, 5, 5), (1, 5, 3), (2, 6, 6), (1.5, 4, 4), (1.5, 9, 5), (1e9, 10**9, 10**9)],
)
@pytest.mark.parametrize("batching", BATCHING)
def test_no_epoch_is_planned_for_steps_past_the_most(batching: str, epochs: float, most: int, steps: int) -> None:
    """Three steps an epoch, whose plan follows from that of the first."""
    loader = Loader(table_of([5] * 6), batching, 2, 1, 0, 0, seq_len=5)
    assert loader.num_steps(epochs, most) == steps
    assert loader.num_steps(1e9) == 3 * 10**9
    assert len(loader._firsts) == 2
    assert loader.rows_before(3 * 10**8 + 1) == 6 * 10**8 + 2


@pytest.mark.parametrize(("epochs", "most", "steps", "planned"), [(1e9, 5, 5, 3), (1, 10**9, 2, 1), (1.5, 9, 3, 2)])
def test_unequal_epochs_are_planned_as_far_as_the_most_steps(
    epochs: float, most: int, steps: int, planned: int
) -> None:
    """Half of eight rows an epoch: two steps."""
    loader = Loader(table_of([5] * 8), "shuffled", 2, 1, 0, 0, seq_len=8, source_passes=[0.5])
    assert loader.num_steps(epochs, most) == steps and len(loader._firsts) == planned + 1


@pytest.mark.parametrize("batching", BATCHING)
def test_a_digest_tells_the_order_of_an_epoch(batching: str) -> None:
    table = table_of(VARIED)
    loader = loader_of(table, batching)
    per_epoch = loader.num_steps(1)
    first, last, second = (loader.plan_digest(step) for step in (0, per_epoch - 1, per_epoch))
    assert first == last != second and len(first) == 64
    assert loader_of(table, batching).plan_digest(per_epoch) == second
    assert loader_of(table, batching, seed=1).plan_digest(0) != first
    assert loader_of(table, batching, micro_batch_size=5).plan_digest(0) != first


def test_each_part_of_a_plan_is_in_its_digest() -> None:
    def plan(*parts: list[int]) -> Plan:
        return Plan(*(np.array(part) for part in parts))

    plans = [
        plan([2, 0, 1], [0, 1, 3], [0, 2]),
        plan([0, 2, 1], [0, 1, 3], [0, 2]),
        plan([2, 0, 1], [0, 2, 3], [0, 2]),
        plan([2, 0, 1], [0, 1, 3], [0, 1, 2]),
    ]
    assert len({plan.digest() for plan in plans}) == 4
    as_bytes = b"".join(number.to_bytes(8, "little") for number in (2, 0, 1, 0, 1, 3, 0, 2))
    assert plans[0].digest() == sha256(as_bytes).hexdigest()


@pytest.mark.parametrize("batching", BATCHING)
def test_one_row_and_a_large_batch(batching: str) -> None:
    loader = loader_of(table_of([3]), batching, 16, 8)
    assert loader.num_steps(1) == 1
    assert loader.padding_frac(0) == (1 - 3 / PACK_MULTIPLE if batching == "packed" else 0.0)
    assert [batch.row_ids for batch in loader.step(5)] == [(0,)]


@pytest.mark.parametrize("batching", BATCHING)
@pytest.mark.parametrize("passes", [1.0, 0.75])
def test_rows_before_a_step_are_those_of_the_steps_before(batching: str, passes: float) -> None:
    loader = Loader(table_of(VARIED), batching, 4, 3, 0, 0, seq_len=SEQ_LEN, source_passes=[passes])
    total = 0
    for step in range(loader.num_steps(3)):
        assert loader.rows_before(step) == total
        total += sum(len(batch.row_ids) for batch in loader.step(step))
    assert total == round(3 * passes * len(VARIED)) == loader.rows_before(loader.num_steps(3))
    assert Loader(table_of(VARIED), batching, 4, 3, 0, 0, seq_len=SEQ_LEN, source_passes=[passes]).rows_before(5) == (
        loader.rows_before(5)
    )


def counts(sizes: Sequence[int], passes: Sequence[float], num_epochs: int, seed: int = 0) -> list[list[Counter[int]]]:
    """How often each row of each source comes, epoch by epoch."""
    sources = np.repeat(np.arange(len(sizes)), sizes)
    planner = Planner(np.ones(len(sources), dtype=np.int32), sources, passes, "packed", 2, 4, seed)
    found = []
    for epoch in range(num_epochs):
        rows = planner.plan(epoch).rows.tolist()
        assert planner.size(epoch)[1] == len(rows)
        found.append([Counter(row for row in rows if sources[row] == source) for source in range(len(sizes))])
    return found


def test_a_weight_is_passes_per_epoch() -> None:
    epochs = counts([10, 10, 10], [0.5, 1.0, 2.0], 4)
    assert [[sum(source.values()) for source in epoch] for epoch in epochs] == [[5, 10, 20]] * 4
    halves = [set(epoch[0]) for epoch in epochs]
    assert halves[0] == halves[2] and halves[1] == halves[3] and not halves[0] & halves[1]
    assert all(set(epoch[1].values()) == {1} and set(epoch[2].values()) == {2} for epoch in epochs)
    other = counts([10, 10, 10], [0.5, 1.0, 2.0], 1, seed=1)
    assert set(other[0][0]) != halves[0], "which half comes first follows from the seed"


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=3),
    passes=st.lists(st.floats(0.05, 3.0), min_size=3, max_size=3),
    seed=st.integers(0, 99),
)
def test_every_epoch_holds_the_weighted_rows_give_or_take_one(sizes: list[int], passes: list[float], seed: int) -> None:
    passes = passes[: len(sizes)]
    if sum(n * w for n, w in zip(sizes, passes, strict=True)) < 1:
        with pytest.raises(DataError, match="less than one of"):
            counts(sizes, passes, 1, seed)
        return
    try:
        epochs = counts(sizes, passes, 7, seed)
    except DataError:
        assert all(n * w < 1 for n, w in zip(sizes, passes, strict=True)), "chance must have left every source out"
        return
    for source, (size, weight) in enumerate(zip(sizes, passes, strict=True)):
        for epoch in epochs:
            assert abs(sum(epoch[source].values()) - weight * size) <= 1 + 1e-9
        total: Counter[int] = sum((epoch[source] for epoch in epochs), Counter())
        first = sum(sizes[:source])
        assert all(abs(total[row] - 7 * weight) < 1 + 1e-9 for row in range(first, first + size)), "row by row, too"


def test_small_sources_do_not_round_down_together() -> None:
    """Ten sources of three rows at 0.3 a pass: nine rows an epoch on average, and no source twice in an epoch."""
    for seed in range(5):
        epochs = counts([3] * 10, [0.3] * 10, 10, seed)
        sizes = [sum(sum(source.values()) for source in epoch) for epoch in epochs]
        assert min(sizes) >= 5 and sum(sizes) == 90
        assert all(sum(source.values()) <= 1 for epoch in epochs for source in epoch)


def test_whole_weights_beside_broken_ones_are_exact() -> None:
    sources = np.repeat([0, 1], [5000, 1])
    planner = Planner(np.ones(5001, dtype=np.int32), sources, [3.0, 0.5], "shuffled", 2, 4, 0)
    for epoch in (
        0,
        1,
        2**52 // 3,
    ):  # in the last the end of the epoch is rounded to whole numbers, its start to halves
        assert planner._occurrences(epoch)[:15000].tolist() == [row for row in range(5000) for _ in range(3)]


def test_an_epoch_without_a_row_is_passed_over() -> None:
    """Two sources of one row each, every second epoch: with this seed both come in epoch 0, none in epoch 1."""
    loader = Loader(table_of([3, 4]), "packed", 1, 1, 0, 0, seq_len=8)
    loader._planner = Planner(np.array([3, 4], dtype=np.int32), np.array([0, 1]), [0.5, 0.5], "packed", 1, 8, 1)
    assert [len(loader._planner.plan(epoch).rows) for epoch in range(4)] == [2, 0, 2, 0]
    assert loader.padding_frac(1) == 0.0
    assert [loader.num_steps(epochs) for epochs in (1, 2, 3)] == [1, 1, 2]
    assert [set(loader.step(step)[0].row_ids) for step in (0, 1)] == [{0, 1}] * 2
    assert [loader.rows_before(step) for step in (0, 1, 2)] == [0, 2, 4]


def test_a_first_epoch_without_a_row_is_refused() -> None:
    """The same sources: with this seed none comes in epoch 0."""
    with pytest.raises(DataError, match=r"with run\.seed 3 the first epoch holds none.* change run\.seed"):
        Planner(np.array([3, 4], dtype=np.int32), np.array([0, 1]), [0.5, 0.5], "packed", 1, 8, 3)


def test_labels_and_padding() -> None:
    # The pad id 9 is also the end token: it is trained where it ends a row and ignored where it pads.
    table = TokenTable.of_rows([row_of([1, 2, 9], (1, 3, 1.0)), row_of([3, 4, 5, 6, 9], (3, 5, 1.0))])
    (batch,) = eval_batches(table, 2, pad_token_id=9)
    assert batch.row_ids == (1, 0) and batch.input_ids.dtype == batch.labels.dtype == torch.int64
    assert batch.input_ids.tolist() == [[3, 4, 5, 6, 9], [1, 2, 9, 9, 9]]
    assert batch.labels.tolist() == [[NO, NO, NO, 6, 9], [NO, 2, 9, NO, NO]]
    assert (batch.num_tokens, batch.num_supervised_tokens, batch.weight_sum) == (8, 4, 4.0)
    assert batch.weights is None


def test_a_pack_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora_train.data.loader.PACK_MULTIPLE", 1)
    table = TokenTable.of_rows(
        [row_of([1, 2, 9], (1, 3, 1.0)), row_of([3, 4, 5, 6], (1, 2, 2.0), (3, 4, 0.5)), row_of([7, 8], (1, 2, 1.0))]
    )
    batch = collate(table, [[1, 0], [2]], pad_token_id=9, packed=True)
    assert batch.input_ids.tolist() == [[3, 4, 5, 6, 1, 2, 9], [7, 8, 9, 9, 9, 9, 9]]
    assert batch.labels.tolist() == [[NO, 4, NO, 6, NO, 2, 9], [NO, 8, NO, NO, NO, NO, NO]]
    assert batch.position_ids is not None and batch.weights is not None
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2], [0, 1, 0, 0, 0, 0, 0]]
    assert batch.weights.tolist() == [[0, 2, 0, 0.5, 0, 1, 1], [0, 1, 0, 0, 0, 0, 0]]
    assert batch.weights.dtype == torch.float32
    assert (batch.row_ids, batch.row_starts, batch.row_lengths) == ((1, 0, 2), (0, 4, 7), (4, 3, 2))
    assert (batch.num_tokens, batch.num_supervised_tokens, batch.weight_sum) == (9, 5, 5.5)
    # A row before the first one with a weight of its own has ones.
    late = collate(table, [[0, 1]], pad_token_id=9, packed=True).weights
    assert late is not None and late.tolist() == [[0, 1, 1, 0, 2, 0, 0.5]]


def test_a_row_that_supervises_its_first_token_is_our_bug() -> None:
    with pytest.raises(AssertionError, match="first token"):
        collate(TokenTable.of_rows([row_of([1, 2], (0, 2, 1.0))]), [[0]], 0)


def test_longest_micro_batch() -> None:
    lengths = [3, 9, 4, 8, 1]
    batch = loader_of(table_of(lengths), "shuffled", 2, 1).longest_micro_batch()
    assert batch.row_ids == (1, 3) and batch.input_ids.shape == (2, 9)
    # Packs of at most 10: 9 + 1, 8, 4 + 3. The fullest two.
    packs = Loader(table_of(lengths), "packed", 2, 1, 0, 0, seq_len=10).longest_micro_batch()
    assert packs.row_ids == (1, 4, 3) and packs.input_ids.shape == (2, 10)


@pytest.mark.parametrize("batching", ["packed", "shuffled"])
def test_no_micro_batch_supervises_more_than_the_longest(batching: str) -> None:
    # The longest rows supervise little: what the head holds is set by another micro-batch.
    rows = [row_of(range(1, 9), (7, 8, 1.0)), row_of(range(1, 10), (8, 9, 0.5)), row_of(range(1, 8), (1, 7, 1.0))]
    loader = Loader(TokenTable.of_rows(rows * 4), batching, 2, 1, 0, 0, seq_len=10)
    most = max(batch.num_supervised_tokens for step in range(6) for batch in loader.step(step))
    longest = loader.longest_micro_batch()
    assert longest.num_supervised_tokens == (most if batching == "packed" else 12) > 2
    assert (longest.labels != IGNORE_INDEX).sum() == longest.num_supervised_tokens
    assert longest.weights is not None and (longest.weights > 0).sum() == longest.num_supervised_tokens
    assert set(longest.row_lengths) == {9} and not (longest.labels[:, 0] != IGNORE_INDEX).any()


def test_to_moves_every_tensor() -> None:
    table = TokenTable.of_rows([row_of([1, 2, 3], (1, 3, 0.5))])
    batch = collate(table, [[0]], 0, packed=True).to("meta")
    tensors = (batch.input_ids, batch.labels, batch.position_ids, batch.weights)
    assert all(tensor is not None and tensor.device.type == "meta" for tensor in tensors)
    assert batch.row_ids == (0,) and batch.row_starts == (0,)
    plain = next(eval_batches(table_of([3]), 1, 0)).to("meta")
    assert plain.labels.device.type == "meta" and plain.weights is None


def test_two_plans_are_kept() -> None:
    planner = Planner(np.array(VARIED), np.zeros(len(VARIED), dtype=np.int16), [1.0], "packed", 4, SEQ_LEN, 0)
    plans = [planner.plan(epoch) for epoch in (0, 1, 2)]
    assert planner.plan(2) is plans[2] and planner.plan(1) is plans[1]
    again = planner.plan(0)
    assert again is not plans[0] and np.array_equal(again.rows, plans[0].rows)
    assert len(planner._plans) == 2


def test_rows_that_no_step_reaches_are_counted() -> None:
    half = Loader(table_of([5] * 20), "shuffled", 2, 1, 0, 0, seq_len=8, source_passes=[0.5])
    assert [half.num_rows_reached(steps) for steps in (0, 1, 5, 10, 99)] == [0, 2, 10, 20, 20]
    whole = Loader(table_of([5] * 20), "packed", 1, 2, 0, 0, seq_len=10)
    assert [whole.num_rows_reached(steps) for steps in (1, 4, 5)] == [4, 16, 20]
