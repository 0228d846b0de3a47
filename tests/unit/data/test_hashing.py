"""Rows with the same content have the same hash whatever their format, and rows that differ do not."""

from __future__ import annotations

from qlora_train.data.formats import parse_row
from qlora_train.data.hashing import hashes
from qlora_train.data.rows import MessagesRow, PromptCompletionRow, Row, TextRow

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
ROW = MessagesRow("f:1", (USER, ANSWER))


def content_hash(row: Row) -> int:
    return hashes(row)[0]


def prompt_hash(row: Row) -> int:
    return hashes(row)[1]


def test_place_and_order_of_fields_do_not_count() -> None:
    turned = {"content": "a", "role": "assistant"}
    assert content_hash(MessagesRow("g:9", (USER, turned))) == content_hash(ROW)
    assert content_hash(parse_row("h:1", {"instruction": "q", "output": "a"}, "alpaca")) == content_hash(ROW)


def test_rows_that_differ_in_what_is_trained_ask_the_same_but_are_no_duplicates() -> None:
    turns = (USER, ANSWER, USER, ANSWER)
    weights = [None, (0.0, 0.0, 0.0, 1.0), (0.0, 1.0, 0.0, 0.0), (0.0, 0.5, 0.0, 1.0)]
    rows = [MessagesRow("f:1", turns, (), entry) for entry in weights]
    assert len({content_hash(row) for row in rows}) == 4
    assert len({prompt_hash(row) for row in rows}) == 1


def test_weights_that_change_nothing_do_not_count() -> None:
    assert content_hash(MessagesRow("f:1", ROW.messages, (), (0, 1))) == content_hash(ROW)


def test_the_prompt_is_all_but_the_last_answer() -> None:
    other = MessagesRow("f:2", (USER, {**ANSWER, "content": "b"}))
    assert prompt_hash(other) == prompt_hash(ROW) and content_hash(other) != content_hash(ROW)
    longer = MessagesRow("f:3", (USER, ANSWER, USER, ANSWER))
    assert prompt_hash(longer) not in (prompt_hash(ROW), content_hash(ROW))
    assert prompt_hash(PromptCompletionRow("", "a", "b")) == prompt_hash(PromptCompletionRow("", "a", "c"))
    assert prompt_hash(TextRow("", "a")) == content_hash(TextRow("", "a"))


def test_an_empty_prompt_asks_nothing_that_another_row_asks() -> None:
    first, second = PromptCompletionRow("", "", "a"), PromptCompletionRow("", " ", "b")
    assert prompt_hash(first) == content_hash(first) != prompt_hash(second)


def test_rows_that_differ_have_other_hashes() -> None:
    rows: list[Row] = [
        ROW,
        MessagesRow("", (USER, ANSWER), ({"name": "f"},)),
        MessagesRow("", (USER, {**ANSWER, "reasoning_content": ""})),
        MessagesRow("", (USER, {**ANSWER, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]})),
        MessagesRow("", ({"role": "system", "content": "q"}, ANSWER)),
        PromptCompletionRow("", "q", "a"),
        PromptCompletionRow("", "qa", ""),
        PromptCompletionRow("", 'q"', "a"),
        PromptCompletionRow("", "q", '"a'),
        TextRow("", "q"),
        TextRow("", "é"),
    ]
    assert len({content_hash(row) for row in rows}) == len(rows)


def test_they_are_unsigned_64_bits() -> None:
    both = hashes(ROW)
    assert both[0] != both[1] and all(0 <= value < 2**64 for value in both)
