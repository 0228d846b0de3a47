"""Which rows a person is shown."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pytest

from qlora_train.data.strange import random_rows, strangest
from qlora_train.data.table import TokenRow, TokenTable, record_batch


def table_of(*rows: tuple[int, int, int]) -> TokenTable:
    """A table of rows of so many tokens, supervised tokens and characters."""
    batch = record_batch(
        [
            TokenRow(
                np.zeros(tokens, np.int32),
                np.array([tokens - supervised], np.int32),
                np.array([tokens], np.int32),
                np.ones(1, np.float32),
            )
            for tokens, supervised, _ in rows
        ],
        num_chars=[chars for _, _, chars in rows],
        content_hash=range(len(rows)),
        prompt_hash=range(len(rows)),
        source=[0] * len(rows),
        number=range(len(rows)),
        locator=range(len(rows)),
    )
    return TokenTable(pa.Table.from_batches([batch]), [str], "digest")


def ordinary(count: int) -> list[tuple[int, int, int]]:
    """Rows of 50 to 59 tokens, 20 to 22 of them supervised, of 4 characters each."""
    return [(50 + index % 10, 20 + index % 3, 4 * (50 + index % 10)) for index in range(count)]


def shown(rows: Sequence[tuple[int, int, int]], count: int = 5) -> dict[int, str]:
    return {row.index: row.reason for row in strangest(table_of(*rows), count)}


def test_the_five_strangest_show_different_things() -> None:
    rows = ordinary(100)
    rows[7] = (5000, 21, 20000)  # long: its share is odd too, but it is shown once
    rows[20] = (3000, 21, 12000)
    rows[30] = (54, 21, 54)  # a character a token
    rows[40] = (54, 54, 216)  # supervised from end to end
    rows[50] = (54, 1, 216)
    reasons = shown(rows)
    assert set(reasons) == {7, 20, 30, 40, 50}
    assert reasons[30] == "1.0 characters per token, median 4.0"


def test_no_more_than_two_rows_are_shown_for_one_feature() -> None:
    rows = ordinary(100)
    rows[10:20] = [(5000, 4000 + index, 20000) for index in range(10)]
    kinds = [reason.split(" ", 1)[1].split(",")[0] for reason in shown(rows).values()]
    assert len(kinds) == 5 and max(map(kinds.count, kinds)) == 2


def test_the_reason_gives_the_value_and_the_median() -> None:
    rows = [(50, 20, 200), (52, 20, 208), (54, 20, 216), (4096, 20, 16384), (50, 20, 200)]
    assert "4,096 tokens, median 52" in shown(rows).values()


def test_a_share_is_given_in_percent() -> None:
    rows = [(100, 50 + index, 400) for index in range(10)] + [(100, 2, 400)]
    assert shown(rows, 1) == {10: "2 supervised tokens, median 54"}
    rows = [(100 + index, 50 + index // 2, 400 + 4 * index) for index in range(0, 200, 10)] + [(200, 200, 800)]
    assert shown(rows, 1) == {20: "100.0% of the tokens supervised, median 50.0%"}


def test_half_as_many_tokens_is_as_strange_as_twice_as_many() -> None:
    rows = [(index, index, index) for index in (990, 1000, 1010, 249, 4000)]
    assert set(shown(rows, 2)) == {3, 4}


def test_one_row_that_differs_is_found_where_all_others_are_equal() -> None:
    # The median distance to the median is 0.
    rows = [(50, 20, 200)] * 30
    rows[11] = (51, 20, 204)
    assert shown(rows)[11] == "51 tokens, median 50"
    assert set(shown(rows)) == {11}


@pytest.mark.parametrize("num_rows", [0, 1, 2, 30])
def test_rows_that_are_all_alike_are_not_strange(num_rows: int) -> None:
    table = table_of((50, 20, 200)).take(np.zeros(num_rows, np.int64))
    assert strangest(table) == []


def test_a_cut_row_has_the_characters_per_token_of_the_whole() -> None:
    table = table_of(*ordinary(20), (1000, 20, 4000)).take(np.arange(21), max_tokens=100)
    assert not [row for row in strangest(table) if "characters" in row.reason]


def test_random_rows_are_the_same_for_the_same_seed_and_others_for_another() -> None:
    table = table_of(*ordinary(200))
    first = random_rows(table, 10, seed=1)
    assert first == random_rows(table, 10, seed=1) != random_rows(table, 10, seed=2)
    assert len(set(first)) == 10 and first == sorted(first) and set(first) <= set(range(200))


def test_a_small_table_is_shown_whole() -> None:
    assert random_rows(table_of(*ordinary(3)), 10, seed=0) == [0, 1, 2]
