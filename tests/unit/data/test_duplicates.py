"""Rows that occur twice. Token ids stand for words; which rows are alike is told by counting shingles by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_train.data.duplicates import Pair, exact_duplicates, find_exact, near_duplicates, overlap
from qlora_train.data.table import TokenRow, TokenTable, record_batch

NO_SPANS = (np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.float32))


def table_of(rows: Sequence[Sequence[int]], source: str = "rows.jsonl", **columns: Sequence[int]) -> TokenTable:
    """A table of these ids; the hashes are the numbers of the rows unless given."""
    numbers = range(len(rows))
    batch = record_batch(
        [TokenRow(np.array(ids, np.int32), *NO_SPANS) for ids in rows],
        num_chars=[1] * len(rows),
        source=[0] * len(rows),
        number=[index + 1 for index in numbers],
        locator=numbers,
        content_hash=columns.get("content_hash", numbers),
        prompt_hash=columns.get("prompt_hash", numbers),
    )
    return TokenTable(pa.Table.from_batches([batch]), [lambda number: f"{source}:{number}"], "digest")


def unlike(count: int, length: int = 30, seed: int = 0) -> list[list[int]]:
    """Rows of random ids from 1000: none shares a shingle with another."""
    random = np.random.default_rng(seed)
    return random.integers(1000, 1 << 30, (count, length)).tolist()


def test_a_row_is_a_duplicate_if_its_hash_occurred_earlier() -> None:
    hashes = np.array([7, 3, 7, 2**64 - 1, 3, 7], dtype=np.uint64)
    assert exact_duplicates(hashes).tolist() == [False, False, True, False, True, True]
    assert exact_duplicates(hashes[:0]).tolist() == []


@given(st.lists(st.integers(0, 9)))
def test_as_many_rows_are_no_duplicates_as_there_are_hashes(values: list[int]) -> None:
    marked = exact_duplicates(np.array(values, dtype=np.uint64))
    assert sorted(value for value, mark in zip(values, marked, strict=True) if not mark) == sorted(set(values))


def test_exact_duplicates_are_counted_beside_the_first_row_of_their_kind() -> None:
    found = find_exact(np.array([5, 6, 5, 5], dtype=np.uint64), "a.jsonl:{}".format)
    assert found.as_dict() == {
        "num_rows": 4,
        "num_duplicates": 2,
        "examples": (
            {"first": "a.jsonl:0", "second": "a.jsonl:2", "similarity": 1.0},
            {"first": "a.jsonl:0", "second": "a.jsonl:3", "similarity": 1.0},
        ),
    }


def test_examples_are_few_however_many_duplicates_there_are() -> None:
    found = find_exact(np.zeros(1000, dtype=np.uint64), str)
    assert found.num_duplicates == 999 and len(found.examples) == 10


def test_validation_rows_that_are_trained_on_or_asked_are_found() -> None:
    rows = unlike(3)
    train = table_of(rows, "train.jsonl", content_hash=[10, 11, 12], prompt_hash=[20, 21, 21])
    held_out = table_of(rows, "eval.jsonl", content_hash=[12, 13, 14], prompt_hash=[21, 20, 22])
    found = overlap(train, held_out)
    assert (found.num_eval_rows, found.num_rows, found.num_prompts) == (3, 1, 2)
    assert found.row_examples == (Pair("train.jsonl:3", "eval.jsonl:1"),)
    assert found.prompt_examples == (Pair("train.jsonl:2", "eval.jsonl:1"), Pair("train.jsonl:1", "eval.jsonl:2"))


def test_nothing_overlaps_with_an_empty_set() -> None:
    rows = table_of(unlike(3))
    empty = rows.take(np.empty(0, np.int64))
    assert overlap(empty, rows).num_rows == 0 and overlap(rows, empty).num_rows == 0


def test_a_row_with_another_end_is_found_with_its_exact_similarity() -> None:
    # 30 tokens have 26 shingles. Two other tokens at the end change the last two: 24 of 28 are shared.
    rows = unlike(6)
    rows.append([*rows[1][:28], 1, 2])
    found = near_duplicates(table_of(rows))
    assert (found.num_compared, found.num_near) == (7, 1)
    assert found.examples == (Pair("rows.jsonl:2", "rows.jsonl:7", 0.857),)


def test_a_row_below_the_limit_is_no_near_duplicate() -> None:
    # A token changed in the middle changes five shingles: 21 of 31 are shared, 0.68.
    rows = unlike(6)
    rows.append([*rows[1][:15], 1, *rows[1][16:]])
    assert near_duplicates(table_of(rows)).num_near == 0


def test_repeated_tokens_count_once() -> None:
    # As sets of shingles these are the same; as lists they are not.
    rows = [*unlike(3), [1, 2, 3] * 10, [1, 2, 3] * 20]
    assert near_duplicates(table_of(rows)).examples == (Pair("rows.jsonl:4", "rows.jsonl:5", 1.0),)


def test_every_copy_of_a_row_is_counted() -> None:
    rows = unlike(30)
    found = near_duplicates(table_of([*rows, *([*rows[3][:29], last] for last in (1, 2, 3))]))
    assert found.num_near == 3
    assert [pair.second for pair in found.examples] == ["rows.jsonl:31", "rows.jsonl:32", "rows.jsonl:33"]


def test_what_most_rows_share_makes_no_two_alike() -> None:
    # 200 tokens of a system prompt and 20 of their own: 196 of 236 shingles are shared, 0.83.
    prompt = list(range(1, 201))
    found = near_duplicates(table_of([prompt + row for row in unlike(40, 20)]))
    assert found.num_common_shingles == 196
    assert (found.num_compared, found.num_near) == (40, 0)


def test_what_few_rows_share_makes_them_alike() -> None:
    prompt = list(range(1, 201))
    rows = [*unlike(40), *(prompt + row for row in unlike(8, 20, seed=1))]  # 8 of 48: a sixth
    assert near_duplicates(table_of(rows)).num_near == 7


def test_a_row_of_boilerplate_alone_and_a_short_one_are_not_compared() -> None:
    prompt = list(range(1, 51))
    rows = [*(prompt + row for row in unlike(20)), prompt, [7] * 11, [7] * 4, []]
    found = near_duplicates(table_of(rows))
    assert (found.num_rows, found.num_compared, found.num_too_short) == (24, 20, 4)


@pytest.mark.parametrize(("num_tokens", "num_compared"), [(11, 0), (12, 2)])
def test_eight_shingles_are_enough_to_compare(num_tokens: int, num_compared: int) -> None:
    assert near_duplicates(table_of(unlike(2, num_tokens))).num_compared == num_compared


def test_exact_duplicates_are_not_counted_as_near_ones() -> None:
    rows = [*unlike(5), unlike(5)[0]]
    found = near_duplicates(table_of(rows, content_hash=[1, 2, 3, 4, 5, 1]))
    assert (found.num_rows, found.num_compared, found.num_near) == (6, 5, 0)


def test_more_rows_than_the_limit_are_sampled_and_that_is_said() -> None:
    table = table_of(unlike(50))
    few, all_of_them = near_duplicates(table, max_rows=20), near_duplicates(table, max_rows=50)
    assert (few.sampled, few.num_compared) == (True, 20)
    assert (all_of_them.sampled, all_of_them.num_compared) == (False, 50)


@pytest.mark.parametrize("rows", [[], [[]], [[1, 2]], [[], list(range(40)), []]])
def test_small_tables_have_no_near_duplicates(rows: list[list[int]]) -> None:
    table = table_of(unlike(1)).take(np.empty(0, np.int64)) if not rows else table_of(rows)
    found = near_duplicates(table)
    assert (found.num_near, found.num_compared + found.num_too_short) == (0, len(rows))


def test_nearly_all_pairs_at_the_limit_are_found() -> None:
    # 100 tokens have 96 shingles; ten others at the end leave 86 of 106 shared: 0.811. Missed with probability 2 %.
    rows = unlike(1000, 100)
    pairs = [row for index, row in enumerate(rows) for row in (row, [*row[:90], *range(index * 10, index * 10 + 10)])]
    found = near_duplicates(table_of(pairs))
    assert 960 <= found.num_near <= 1000
    assert {pair.similarity for pair in found.examples} == {0.811}


@given(st.lists(st.lists(st.integers(0, 2), max_size=25), min_size=1, max_size=12))
def test_what_is_reported_is_alike_by_the_plain_definition(rows: list[list[int]]) -> None:
    def shingles(row: list[int]) -> set[tuple[Any, ...]]:
        return {tuple(row[at : at + 5]) for at in range(len(row) - 4)}

    sets = [shingles(row) for row in rows]
    occurs = {shingle: sum(shingle in one for one in sets) for one in sets for shingle in one}
    common = {shingle for shingle, count in occurs.items() if count > 0.2 * len(rows) and count >= 5}
    for pair in near_duplicates(table_of(rows)).examples:
        first, second = (int(place.split(":")[1]) - 1 for place in (pair.first, pair.second))
        both, either = (sets[first] & sets[second]) - common, (sets[first] | sets[second]) - common
        assert first < second and pair.similarity == round(len(both) / len(either), 3) >= 0.8
