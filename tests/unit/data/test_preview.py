"""Rows as a person sees them. The small tokenizer's pieces can be told by hand."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from qlora_train.data.preview import MAX_TOKENS, PreviewToken, preview, rows_to_look_at
from qlora_train.data.table import TokenRow, TokenTable
from qlora_train.printable import printable


def row_of(ids: list[int], *spans: tuple[int, int, float]) -> TokenRow:
    starts, stops, weights = zip(*spans, strict=True) if spans else ((), (), ())
    return TokenRow(
        np.array(ids, np.int32),
        np.array(starts, np.int32),
        np.array(stops, np.int32),
        np.array(weights, np.float32),
    )


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]


def test_each_token_is_shown_with_its_weight(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = ids_of(tokenizer, "list the ls<|im_end|>\n")
    table = TokenTable.of_rows([row_of([0]), row_of(ids, (1, 2, 0.5), (2, 4, 1.0))], "a.jsonl")
    (row,) = preview(table, tokenizer, [1])
    assert row.where == "a.jsonl:2"
    assert row.tokens == (("list", 0.0), (" the", 0.5), (" ls", 1.0), ("<|im_end|>", 1.0), ("\\n", 0.0))
    assert (row.num_left_out, row.tail, row.reason) == (0, (), "")


def test_a_long_row_is_cut_in_the_middle(tokenizer: PreTrainedTokenizerFast) -> None:
    start, end = ids_of(tokenizer, "a"), ids_of(tokenizer, "z")
    length = 1_000_000
    (row,) = preview(
        TokenTable.of_rows([row_of(start * 500_000 + end * 500_000, (length - 1, length, 1.0))]), tokenizer, [0]
    )
    assert row.tokens == (PreviewToken("a", 0.0),) * 300
    assert row.num_left_out == 999_400
    assert row.tail == (PreviewToken("z", 0.0),) * 299 + (PreviewToken("z", 1.0),)


def test_a_row_that_just_fits_is_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    (row,) = preview(TokenTable.of_rows([row_of(ids_of(tokenizer, "a") * MAX_TOKENS)]), tokenizer, [0])
    assert (len(row.tokens), row.num_left_out, row.tail) == (600, 0, ())


def test_a_long_token_is_cut(build_tokenizer: type[PreTrainedTokenizerFast]) -> None:
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["x" * 100_000])
    (row,) = preview(TokenTable.of_rows([row_of([len(tokenizer) - 1])]), tokenizer, [0])
    assert row.tokens[0].text == "x" * 200 + "... (99,800 characters more)"


def test_random_rows_come_first_and_strange_ones_with_the_reason(tokenizer: PreTrainedTokenizerFast) -> None:
    a = ids_of(tokenizer, "a")
    table = TokenTable.of_rows(
        [row_of(a * (9 + index % 3), (0, 9, 1.0)) for index in range(40)] + [row_of(a * 500, (0, 9, 1.0))]
    )
    rows = rows_to_look_at(table, tokenizer, seed=0, num_random=4, num_strange=1)
    assert [row.reason for row in rows[:4]] == [""] * 4 and len(rows) == 5
    assert (rows[4].where, rows[4].reason) == ("rows.jsonl:41", "500 tokens, median 10")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain text, ünïcödé 漢字 🙂", "plain text, ünïcödé 漢字 🙂"),
        ("\x1b[2J", "\\x1b[2J"),
        ("\u202eabc\u2066", "\\u202eabc\\u2066"),
        ("\u2028\u2029\u200b", "\\u2028\\u2029\\u200b"),
        ("\ud800", "\\ud800"),
    ],
)
def test_what_could_steer_a_terminal_is_shown_as_escapes(text: str, shown: str) -> None:
    assert printable(text) == shown
