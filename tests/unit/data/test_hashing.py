"""Rows with the same content have the same hash whatever their format, and rows that differ do not."""

from __future__ import annotations

from qlora_train.data.formats import parse_row
from qlora_train.data.hashing import content_hash, hashes, prompt_hash
from qlora_train.data.rows import MessagesRow, PromptCompletionRow, Row, TextRow

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
ROW = MessagesRow("f:1", (USER, ANSWER))


def test_place_weights_and_order_of_fields_do_not_count() -> None:
    turned = {"content": "a", "role": "assistant"}
    assert content_hash(MessagesRow("g:9", (USER, turned), (), (0.0, 0.5))) == content_hash(ROW)
    assert content_hash(parse_row("h:1", {"instruction": "q", "output": "a"}, "alpaca")) == content_hash(ROW)


def test_the_prompt_is_all_but_the_last_answer() -> None:
    other = MessagesRow("f:2", (USER, {**ANSWER, "content": "b"}))
    assert prompt_hash(other) == prompt_hash(ROW) and content_hash(other) != content_hash(ROW)
    longer = MessagesRow("f:3", (USER, ANSWER, USER, ANSWER))
    assert prompt_hash(longer) not in (prompt_hash(ROW), content_hash(ROW))
    assert prompt_hash(PromptCompletionRow("", "a", "b")) == prompt_hash(PromptCompletionRow("", "a", "c"))
    assert prompt_hash(TextRow("", "a")) == content_hash(TextRow("", "a"))


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


def test_both_at_once_are_unsigned_64_bits() -> None:
    both = hashes(ROW)
    assert both == (content_hash(ROW), prompt_hash(ROW)) and both[0] != both[1]
    assert all(0 <= value < 2**64 for value in both)
