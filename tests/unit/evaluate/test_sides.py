"""The questions that held-out rows ask."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from qlora_train.data.rows import MessagesRow, PromptCompletionRow, Row, TextRow
from qlora_train.evaluate import sides
from qlora_train.evaluate.sides import questions_of
from tests.tiny import build_tiny_tokenizer

S, E = "<|im_start|>", "<|im_end|>"


class _Split:
    """Rows that can be read by index."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        self.sources = [SimpleNamespace(facts=SimpleNamespace(row_format=name)) for name in ("messages", "text")]
        kinds = np.array([isinstance(row, TextRow) for row in rows], dtype=np.int16)
        self.table = SimpleNamespace(num_rows=len(rows), column=lambda name: kinds)
        self.num_read = 0

    def read(self, indices: Sequence[int]) -> list[Row]:
        self.num_read += len(indices)
        return [self.rows[index] for index in indices]


def chat(question: str, answer: str, where: str) -> MessagesRow:
    return MessagesRow(where, ({"role": "user", "content": question}, {"role": "assistant", "content": answer}))


def test_questions_of_rows_of_all_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sides, "_ROWS_AT_A_TIME", 2)
    tokenizer = build_tiny_tokenizer()
    rows: list[Row] = [
        chat(f"What is {E}?", " An end. ", "a:1"),
        TextRow("a:2", "lazy dog"),
        PromptCompletionRow("a:3", "The quick", f" brown fox{E}"),
        *(chat("df", "ls", f"a:{line}") for line in range(4, 10)),
    ]
    split: Any = _Split(rows)
    questions = questions_of(split, tokenizer, 3)
    assert [(question.where, question.asked, question.reference) for question in questions] == [
        ("a:1", f"What is {E}?", "An end."),
        ("a:3", "The quick", "brown fox"),
        ("a:4", "df", "ls"),
    ]
    assert split.num_read == 4
    assert questions[0].prompt_ids.count(tokenizer.eos_token_id) == 2  # the system's and the user's own ends
    assert list(questions[1].prompt_ids) == tokenizer("The quick")["input_ids"]
    head = f"{S}system\nYou are a helpful assistant.{E}\n{S}user\ndf{E}\n{S}assistant\n"
    assert list(questions[2].prompt_ids) == tokenizer(head, add_special_tokens=False)["input_ids"]
    assert questions_of(split, tokenizer, 0) == []
    assert len(questions_of(split, tokenizer, 100)) == 8


def test_rows_that_ask_nothing_are_passed_over() -> None:
    untrained = MessagesRow("a:1", (*chat("a", "b", "").messages, *chat("c", "d", "").messages), weights=(0, 1, 0, 0))
    refused = chat("a", "the mark \ufdd0", "a:2")
    split: Any = _Split([untrained, refused, chat("df", "ls", "a:3"), chat("du", "ls", "a:4")])
    assert [question.where for question in questions_of(split, build_tiny_tokenizer(), 2)] == ["a:3", "a:4"]
