"""The table of tokens: views, cuts, places and digests."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_train.data.table import TokenRow, TokenTable, joined


def row(length: int, *spans: tuple[int, int, float]) -> TokenRow:
    starts, stops, weights = zip(*spans, strict=True) if spans else ((), (), ())
    ids = np.arange(100, 100 + length, dtype=np.int32)
    return TokenRow(ids, np.array(starts, np.int32), np.array(stops, np.int32), np.array(weights, np.float32))


ROWS = [row(4, (1, 4, 1.0)), row(9, (2, 4, 1.0), (6, 9, 0.5)), row(3, (2, 3, 1.0))]


def test_rows_come_back_as_they_went_in() -> None:
    table = TokenTable.of_rows(ROWS)
    assert table.num_rows == 3 and table.lengths.tolist() == [4, 9, 3] and table.num_supervised.tolist() == [3, 5, 1]
    second = table.row(1)
    assert second.ids.tolist() == list(range(100, 109))
    assert (second.span_starts.tolist(), second.span_stops.tolist()) == ([2, 6], [4, 9])
    assert second.span_weights.tolist() == [1.0, 0.5] and table.where(1) == "rows.jsonl:2"
    assert second.supervised().tolist() == [False, False, True, True, False, False, True, True, True]


def test_a_view_holds_the_chosen_rows_and_cuts_tokens_and_spans() -> None:
    view = TokenTable.of_rows(ROWS).take(np.array([1, 2]), max_tokens=7)
    assert view.num_rows == 2 and view.lengths.tolist() == [7, 3] and view.num_supervised.tolist() == [3, 1]
    first = view.row(0)
    assert len(first.ids) == 7 and (first.span_starts.tolist(), first.span_stops.tolist()) == ([2, 6], [4, 7])
    assert view.where(0) == "rows.jsonl:2" and view.column("number").tolist() == [2, 3]
    cut_before = TokenTable.of_rows(ROWS).take(np.array([1]), max_tokens=5)
    assert cut_before.row(0).span_starts.tolist() == [2] and cut_before.num_supervised.tolist() == [2]


def test_joined_tables_know_their_sources() -> None:
    table = joined([TokenTable.of_rows(ROWS[:1], "a"), TokenTable.of_rows(ROWS[1:], "b")])
    assert [table.where(index) for index in range(3)] == ["a:1", "b:1", "b:2"]
    assert table.column("source").tolist() == [0, 1, 1]
    assert table.rows([2, 0])[0].ids.tolist() == [100, 101, 102]


@pytest.mark.parametrize(
    "other",
    [
        TokenTable.of_rows([*ROWS[:2], row(3, (1, 3, 1.0))]),
        TokenTable.of_rows([*ROWS[:2], row(3, (2, 3, 0.5))]),
        TokenTable.of_rows(ROWS[:2]),
        TokenTable.of_rows(ROWS).take(np.array([0, 1, 2])),
        TokenTable.of_rows(ROWS).take(np.array([0, 1, 2]), max_tokens=2),
    ],
    ids=["span", "weight", "rows", "chosen", "cut"],
)
def test_the_fingerprint_tells_what_is_trained(other: TokenTable) -> None:
    table = TokenTable.of_rows(ROWS)
    assert table.fingerprint() == TokenTable.of_rows(ROWS, "elsewhere.jsonl").fingerprint()
    assert table.fingerprint() != other.fingerprint()


def test_tokens_that_are_not_kept_are_made_again() -> None:
    import pyarrow as pa

    from qlora_train.data.table import Origin, record_batch

    asked: list[Origin] = []

    def encode(origins: list[Origin]) -> list[np.ndarray]:  # type: ignore[type-arg]
        asked.extend(origins)
        return [ROWS[origin.locator].ids for origin in origins]

    counts = ("num_chars", "num_plain_specials", "num_control_specials", "num_context_turns")
    columns = {name: range(3) for name in (*counts, "content_hash", "prompt_hash")}
    batch = record_batch(ROWS, with_ids=False, **columns, source=[0] * 3, number=[5, 6, 7], locator=range(3))
    table = TokenTable(pa.Table.from_batches([batch]), [str], "digest", encode=encode)  # type: ignore[arg-type]
    view = table.take(np.array([1, 2]), max_tokens=8)
    assert [len(entry.ids) for entry in view.rows([1, 0])] == [3, 8]
    assert asked == [Origin(0, 7, 2), Origin(0, 6, 1)]


@given(
    lengths=st.lists(st.integers(2, 60), min_size=1, max_size=6),
    max_tokens=st.integers(2, 16),
    data=st.data(),
)
def test_pieces_hold_every_token_and_supervise_each_once(lengths: list[int], max_tokens: int, data: Any) -> None:
    rows = []
    for length in lengths:
        cuts = sorted(data.draw(st.sets(st.integers(1, length), min_size=2, max_size=4))) if length > 2 else [1, 2]
        spans = np.array(cuts[: len(cuts) // 2 * 2], dtype=np.int32).reshape(-1, 2)
        weights = np.arange(1, len(spans) + 1, dtype=np.float32)
        rows.append(TokenRow(np.arange(length, dtype=np.int32), spans[:, 0], spans[:, 1], weights))
    chosen = np.arange(len(rows))[::-1]
    pieces = TokenTable.of_rows(rows).take_pieces(chosen, max_tokens)
    found, places = pieces.rows(range(pieces.num_rows)), pieces.places(range(pieces.num_rows))
    assert pieces.lengths.tolist() == [len(piece.ids) for piece in found]
    assert max(pieces.lengths) <= max_tokens and min(pieces.lengths) >= 2
    assert pieces.num_supervised.tolist() == [int(piece.supervised().sum()) for piece in found]
    for index in chosen:
        mine = [piece for piece, place in zip(found, places, strict=True) if place == f"rows.jsonl:{index + 1}"]
        ids = [mine[0].ids, *(piece.ids[1:] for piece in mine[1:])]
        assert np.concatenate(ids).tolist() == rows[index].ids.tolist()
        assert [int(piece.ids[0]) for piece in mine[1:]] == [int(piece.ids[-1]) for piece in mine[:-1]]
        assert not any(piece.supervised()[0] for piece in mine)
        weight = np.concatenate([weight_of(mine[0]), *(weight_of(piece)[1:] for piece in mine[1:])])
        assert weight.tolist() == weight_of(rows[index]).tolist()


def weight_of(row: TokenRow) -> Any:
    weights = np.zeros(len(row.ids))
    for start, stop, weight in zip(row.span_starts, row.span_stops, row.span_weights, strict=True):
        weights[start:stop] = weight
    return weights
