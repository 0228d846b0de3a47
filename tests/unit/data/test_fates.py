"""Which rows a side gets: each choice is a pure function, and every row ends under exactly one fate."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_train.data.audit import FATES
from qlora_train.data.fates import CODE, ELSEWHERE, carve, choose
from qlora_train.data.table import TokenRow, TokenTable, record_batch
from qlora_train.recipe.schema import DataSection


def table(lengths: list[int], hashes: list[int] | None = None, supervised_from: int = 1) -> TokenTable:
    """Rows of these lengths, supervised from one token on, with these content hashes."""
    import pyarrow as pa

    def cells(*values: int) -> Any:
        return np.array(values, dtype=np.int32)

    rows = [
        TokenRow(np.arange(n, dtype=np.int32), cells(supervised_from), cells(n), np.ones(1, np.float32))
        for n in lengths
    ]
    numbers = range(len(rows))
    batch = record_batch(
        rows,
        num_chars=lengths,
        content_hash=hashes or numbers,
        prompt_hash=hashes or numbers,
        source=[0] * len(rows),
        number=numbers,
        locator=numbers,
    )
    return TokenTable(pa.Table.from_batches([batch]), [str], "digest")


def section(**changes: Any) -> DataSection:
    return DataSection(train=({"path": "train.jsonl"},), **changes)  # type: ignore[arg-type]


def names(fates: np.ndarray[Any, Any]) -> list[str]:
    return ["elsewhere" if fate == ELSEWHERE else FATES[fate] for fate in fates]


def test_rows_longer_than_seq_len_are_dropped_or_cut() -> None:
    rows = table([8, 9, 30])
    assert names(choose(rows, section(seq_len=8), "train", 0)) == ["kept", "dropped", "dropped"]
    assert names(choose(rows, section(seq_len=8, overlong="cut"), "train", 0)) == ["kept", "cut", "cut"]


def test_a_row_whose_answer_is_cut_away_is_dropped() -> None:
    rows = table([8, 9, 30], supervised_from=8)
    assert names(choose(rows, section(seq_len=8, overlong="cut"), "train", 0)) == ["kept", "dropped", "dropped"]


def test_duplicates_are_dropped_only_where_asked_and_only_in_training() -> None:
    rows = table([5, 5, 5, 5], hashes=[7, 8, 7, 7])
    assert names(choose(rows, section(), "train", 0)) == ["kept"] * 4
    assert names(choose(rows, section(duplicates="drop"), "train", 0)) == ["kept", "kept", "duplicate", "duplicate"]
    assert names(choose(rows, section(duplicates="drop"), "eval", 0)) == ["kept"] * 4


def test_training_rows_are_a_random_subset_by_the_seed_and_held_out_rows_the_first() -> None:
    rows = table([5] * 50)
    chosen = [choose(rows, section(max_train_rows=10), "train", seed) for seed in (0, 0, 1)]
    assert [int((fates == CODE["kept"]).sum()) for fates in chosen] == [10, 10, 10]
    assert (chosen[0] == chosen[1]).all() and (chosen[0] != chosen[2]).any()
    held_out = choose(rows, section(max_eval_rows=10), "eval", 3)
    assert names(held_out) == ["kept"] * 10 + ["not_selected"] * 40


def test_a_limit_counts_rows_that_can_be_trained_on() -> None:
    fates = names(choose(table([5, 99, 5, 99, 5]), section(seq_len=8, max_train_rows=2), "train", 0))
    assert fates.count("kept") == 2 and fates.count("dropped") == 2 and fates.count("not_selected") == 1


@pytest.mark.parametrize(("frac", "count"), [(0.05, 5), (0.5, 50), (0.001, 1)])
def test_carving_holds_out_the_share_that_was_asked_for(frac: float, count: int) -> None:
    hashes = np.random.default_rng(0).integers(0, 2**64, 100, dtype=np.uint64)
    assert int(carve(hashes, frac).sum()) == count


def test_carving_depends_on_content_alone() -> None:
    hashes = np.random.default_rng(0).integers(0, 2**64, 100, dtype=np.uint64)
    order = np.random.default_rng(1).permutation(100)
    assert (carve(hashes, 0.2)[order] == carve(hashes[order], 0.2)).all()
    assert carve(np.array([5, 5, 5], dtype=np.uint64), 0.1).all(), "equal rows stay on one side"


def test_the_two_sides_of_a_carved_set_share_no_row_and_leave_none() -> None:
    rows = table([5] * 40, hashes=np.random.default_rng(0).integers(0, 2**63, 40).tolist())
    train, held_out = (names(choose(rows, section(split=0.1), side, 0)) for side in ("train", "eval"))  # type: ignore[arg-type]
    assert held_out.count("kept") == 4 and train.count("held_out") == 4
    assert [a == "held_out" for a in train] == [b == "kept" for b in held_out]
    assert held_out.count("elsewhere") == 36


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 5)), max_size=40), st.data())
def test_every_row_has_one_fate(rows: list[tuple[int, int]], data: st.DataObject) -> None:
    changes = {
        "split": data.draw(st.sampled_from([None, 0.3])),
        "overlong": data.draw(st.sampled_from(["drop", "cut"])),
        "duplicates": data.draw(st.sampled_from(["keep", "drop"])),
        "max_train_rows": data.draw(st.sampled_from([None, 3])),
    }
    whole = table([length for length, _ in rows], hashes=[content for _, content in rows])
    sides = [choose(whole, section(seq_len=8, **changes), side, 0) for side in ("train", "eval")]  # type: ignore[arg-type]
    for fates in sides[: 1 + (changes["split"] is not None)]:
        assert len(fates) == len(rows) and ((fates >= ELSEWHERE) & (fates < len(FATES))).all()
        trained = np.isin(fates, [CODE["kept"], CODE["cut"]])
        assert (whole.lengths[fates == CODE["kept"]] <= 8).all() and (whole.lengths[fates == CODE["cut"]] > 8).all()
        limit = changes["max_train_rows"]
        assert limit is None or fates is not sides[0] or int(trained.sum()) <= int(limit)
