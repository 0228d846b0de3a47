"""The account of rows adds up, subsets are repeatable, and a preview cannot steer the terminal."""

from __future__ import annotations

import json

import numpy as np
from transformers import PreTrainedTokenizerFast

from qlora_train.data.audit import Audit, RowFate, first_rows, select_rows
from qlora_train.data.formats import Row, TextRow
from qlora_train.data.preview import preview, printable
from qlora_train.data.tokenize import TokenTable

ROWS: list[Row] = [TextRow(f"a:{line}", str(line)) for line in range(1, 101)]


def test_audit_adds_up() -> None:
    fates = [
        RowFate("a:1", "kept", "", 10, 4),
        RowFate("a:2", "dropped", "long", 30, 20),
        RowFate("a:3", "kept", "", 20, 6),
        RowFate("a:4", "rejected", "odd", 20),
        RowFate("a:5", "not_selected", "subset"),
    ]
    audit = Audit.of("train", fates)
    assert [fate.where for fate in audit.fates] == ["a:2", "a:4", "a:5"]
    assert audit.counts == {"kept": 2, "dropped": 1, "rejected": 1, "duplicate": 0, "not_selected": 1}
    assert (audit.num_rows, audit.num_tokens, audit.num_supervised_tokens) == (5, 30, 10)
    assert audit.lost_token_frac == 50 / 80
    assert audit.summary() == (
        "train: 2 of 5 rows (1 dropped, 1 rejected, 1 not selected), 30 tokens, 10 supervised, 62.5% of the tokens lost"
    )
    as_json = json.loads(json.dumps(audit.as_dict()))
    assert as_json["counts"]["kept"] == 2 and as_json["fates"][0]["reason"] == "long"


def test_audit_of_nothing_lost() -> None:
    audit = Audit.of("eval", [RowFate("a:1", "kept", "", 3, 2)])
    assert audit.summary() == "eval: 1 of 1 rows, 3 tokens, 2 supervised"
    assert Audit.of("eval", []).lost_token_frac == 0.0


def test_select_rows_is_seeded_and_keeps_the_order() -> None:
    chosen, left = select_rows(ROWS, 30, seed=3)
    assert chosen == select_rows(ROWS, 30, seed=3)[0] != select_rows(ROWS, 30, seed=4)[0]
    assert chosen == [row for row in ROWS if row in chosen] and len(chosen) == 30
    assert sorted([row.where for row in chosen] + [fate.where for fate in left]) == sorted(row.where for row in ROWS)
    assert {fate.fate for fate in left} == {"not_selected"} and "30 rows" in left[0].reason


def test_no_limit_or_a_high_one_takes_all() -> None:
    for limit in (None, 100, 1000):
        assert select_rows(ROWS, limit, seed=0) == first_rows(ROWS, limit) == (ROWS, [])


def test_first_rows() -> None:
    chosen, left = first_rows(ROWS, 2)
    assert chosen == ROWS[:2] and len(left) == 98


def test_preview_shows_each_token_and_its_mask(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = np.array(tokenizer("list the files<|im_end|>\n")["input_ids"], dtype=np.int32)
    table = TokenTable(ids, np.array([0, 0, 1, 1, 0], dtype=np.bool_), np.array([0, 5]), ("a:1",))
    (row,) = preview(table, tokenizer, [0])
    assert row.where == "a:1"
    assert row.tokens == (*(("list", False), (" the", False), (" files", True), ("<|im_end|>", True), ("\\n", False)),)


def test_printable_escapes_what_steers_a_terminal() -> None:
    assert printable("\x1b]0;x\x07\x9b2J\r\u202e\u2028\ud800\x7f") == (
        "\\x1b]0;x\\x07\\x9b2J\\r\\u202e\\u2028\\ud800\\x7f"
    )
    assert printable("naïve 日本 👍 e\u0301 — ok") == "naïve 日本 👍 e\u0301 — ok"
