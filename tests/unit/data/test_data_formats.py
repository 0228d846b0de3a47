"""Each format's columns become a row, under whatever names; what is missing or wrong is named with a fix."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qlora_train.data import formats
from qlora_train.data.formats import FORMATS, detect, parse_row
from qlora_train.data.problems import RowFault
from qlora_train.data.rows import MessagesRow, PromptCompletionRow, TextRow
from qlora_train.recipe.sources import COLUMN_NAMES

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}
TOOL = {"type": "function", "function": {"name": "add"}}
HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}


def refusal(columns: dict[str, Any], row_format: str | None, column_map: dict[str, str] | None = None) -> RowFault:
    with pytest.raises(RowFault) as caught:
        parse_row("f:1", columns, row_format, column_map or {})
    assert caught.value.fix
    return caught.value


def conversation(columns: dict[str, Any], column_map: dict[str, str] | None = None) -> MessagesRow:
    row = parse_row("f:1", columns, detect(columns, column_map or {}), column_map or {})
    assert isinstance(row, MessagesRow) and row.where == "f:1"
    return row


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (["messages", "id"], "messages"),
        (["conversations", "system"], "sharegpt"),
        (["instruction", "output"], "alpaca"),
        (["instruction", "input", "output", "text"], "alpaca"),  # as the alpaca set itself has them
        (["prompt", "completion"], "prompt_completion"),
        (["text", "meta"], "text"),
        (["text", "completion", "prompt", "output", "instruction", "conversations", "messages"], "messages"),
        (["text", "completion", "prompt", "output", "instruction", "conversations"], "sharegpt"),
        (["text", "completion", "prompt", "output", "instruction"], "prompt_completion"),
        (["promt", "completion"], "prompt_completion"),
        (["Messages"], "messages"),
        (["a", "b"], None),
        ([], None),
    ],
)
def test_formats_are_told_by_columns(columns: list[str], expected: str | None) -> None:
    assert detect(dict.fromkeys(columns)) == expected


@pytest.mark.parametrize(
    ("columns", "column_map", "expected"),
    [
        (["dialogue"], {"messages": "dialogue"}, "messages"),
        (["question", "answer", "text"], {"instruction": "question", "output": "answer"}, "alpaca"),
        (["messages", "body"], {"text": "body"}, "text"),
        (["dialogue", "x"], {"conversations": "dialogue", "from": "who", "value": "said"}, "sharegpt"),
        (["dialog"], {"messages": "dialogue"}, "messages"),
        (["zzz"], {"messages": "dialogue"}, "messages"),
        (["text"], {"messages": "dialogue"}, "text"),  # one map for sources of several formats
    ],
)
def test_a_column_map_narrows_the_choice(columns: list[str], column_map: dict[str, str], expected: str) -> None:
    assert detect(dict.fromkeys(columns), column_map) == expected


def test_messages_with_tools_and_weights() -> None:
    row = conversation({"messages": [USER, ANSWER, USER, {**ANSWER, "train": False}], "tools": [TOOL]})
    assert row == MessagesRow("f:1", (USER, ANSWER, USER, ANSWER), (TOOL,), (0.0, 1.0, 0.0, 0.0))
    assert conversation({"messages": [USER, ANSWER], "tools": '[{"name": "add"}]'}).tools == ({"name": "add"},)


def test_sharegpt() -> None:
    row = conversation({"conversations": [HUMAN, GPT], "system": "s", "tools": '[{"name": "add"}]'})
    assert row == MessagesRow("f:1", (SYSTEM, USER, ANSWER), ({"name": "add"},))
    assert conversation({"conversations": [HUMAN, GPT], "system": "", "tools": ""}).messages == (USER, ANSWER)
    assert conversation({"conversations": [USER, ANSWER]}).messages == (USER, ANSWER)
    weighted = conversation({"conversations": [HUMAN, {**GPT, "weight": 0.5}], "system": "s"})
    assert weighted.weights == (0.0, 0.0, 0.5)


def test_sharegpt_faults() -> None:
    assert (
        "conversations[1].value is null" in refusal({"conversations": [HUMAN, {**GPT, "value": None}]}, "sharegpt").what
    )
    twice = {"conversations": [{"from": "system", "value": "s"}, HUMAN, GPT], "system": "s"}
    assert "system is given twice" in refusal(twice, "sharegpt").what
    assert "conversations is empty" in refusal({"conversations": [], "system": "s"}, "sharegpt").what


def test_alpaca() -> None:
    assert conversation({"instruction": "q", "output": "a"}).messages == (USER, ANSWER)
    assert conversation({"instruction": "q", "input": None, "output": "a"}).messages == (USER, ANSWER)
    assert conversation({"instruction": "q", "input": " ", "output": "a"}).messages == (USER, ANSWER)
    row = conversation({"instruction": "Add.", "input": "1 2", "output": "a"})
    assert row.messages == ({"role": "user", "content": "Add.\n\n1 2"}, ANSWER)
    full = {"instruction": "q", "output": "a", "system": "s", "history": [["q", "a"]]}
    assert conversation(full).messages == (SYSTEM, USER, ANSWER, USER, ANSWER)


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"instruction": "q", "output": " "}, "output is empty"),
        ({"instruction": "", "output": "a"}, "instruction is empty"),
        ({"instruction": "q", "output": None}, "output is null"),
        ({"instruction": "q", "output": "a", "input": 3}, "input is a number"),
        ({"instruction": "q", "output": "a", "history": [["q"]]}, "history[0] is a list of 1"),
        ({"instruction": "q", "output": "a", "history": ["q"]}, "history[0] is text"),
        ({"instruction": "q", "output": "a", "history": [["q", ""]]}, "history[0] has an empty answer"),
        ({"instruction": "q", "output": "a", "history": [["q", 1]]}, "history[0]'s assistant message is a number"),
    ],
)
def test_alpaca_faults(columns: dict[str, Any], says: str) -> None:
    assert says in refusal(columns, "alpaca").what


def test_prompt_completion_verbatim() -> None:
    assert parse_row("f:1", {"prompt": "", "completion": " b\n"}, "prompt_completion") == PromptCompletionRow(
        "f:1", "", " b\n"
    )
    assert refusal({"prompt": "a", "completion": " "}, "prompt_completion").what == "completion is empty"
    assert refusal({"prompt": "a", "completion": ["b"]}, "prompt_completion").what.startswith("completion is a list")
    assert refusal({"prompt": 3, "completion": "b"}, "prompt_completion").what.startswith("prompt is a number")


def test_lists_of_messages_may_stand_as_json_text() -> None:
    lists = {"prompt": [SYSTEM, USER], "completion": [ANSWER]}
    cells = {name: json.dumps(turns) for name, turns in lists.items()}
    assert conversation(cells) == conversation(lists)
    theirs = {name: cell.replace("role", "speaker") for name, cell in cells.items()}
    assert conversation(theirs, {"role": "speaker"}) == conversation(lists)


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        (json.dumps([USER]), "a"),
        ("write a chat as JSON", json.dumps([USER, ANSWER])),
        ("[1, 2]", "[3]"),
        (json.dumps([USER]), "[]"),
        (json.dumps([USER]), json.dumps([ANSWER])[:-1]),
        (json.dumps([{"text": "q"}]), json.dumps([{"text": "a"}])),
    ],
)
def test_other_json_text_is_text(prompt: str, completion: str) -> None:
    row = parse_row("f:1", {"prompt": prompt, "completion": completion}, "prompt_completion")
    assert row == PromptCompletionRow("f:1", prompt, completion)


def test_conversational_prompt_completion_trains_the_completion_alone() -> None:
    row = conversation({"prompt": [USER, ANSWER, USER], "completion": [ANSWER]})
    assert row == MessagesRow("f:1", (USER, ANSWER, USER, ANSWER), (), (0.0, 0.0, 0.0, 1.0))
    half = conversation({"prompt": [USER], "completion": [{**ANSWER, "weight": 0.5}]})
    assert half.weights == (0.0, 0.5)
    assert "completion is empty" in refusal({"prompt": [USER, ANSWER], "completion": []}, "prompt_completion").what
    untrained = {"prompt": [USER, ANSWER, USER], "completion": [{**ANSWER, "train": False}]}
    assert "completion holds no answer" in refusal(untrained, "prompt_completion").what


def test_text() -> None:
    assert parse_row("f:1", {"text": "x", "meta": {"score": 1.5}}, "text") == TextRow("f:1", "x")
    assert refusal({"text": " \n"}, "text").what == "text is empty"


def test_columns_under_other_names() -> None:
    assert conversation({"dialogue": [USER, ANSWER]}, {"messages": "dialogue"}).messages == (USER, ANSWER)
    said = [{"who": "human", "said": "q"}, {"who": "gpt", "said": "a"}]
    names = {"conversations": "turns", "from": "who", "value": "said"}
    assert conversation({"turns": said}, names).messages == (USER, ANSWER)
    both = {"text": "old", "body": "new"}
    assert parse_row("f:1", both, "text", {"text": "body"}) == TextRow("f:1", "new")


def test_mapped_column_that_is_missing() -> None:
    fault = refusal({"dialogues": []}, "messages", {"messages": "dialogue"})
    assert fault.what == "lacks 'dialogue', which is to be read as 'messages'; columns found: 'dialogues'"
    assert fault.fix == "map 'messages' to 'dialogues'"
    assert "correct the column map" in refusal({"zzz": 1}, "messages", {"messages": "dialogue"}).fix


def test_mapped_optional_column_that_a_row_lacks() -> None:
    names = {"input": "context", "system": "sys", "history": "before"}
    row = {"instruction": "q", "output": "a"}
    assert conversation(row, names).messages == (USER, ANSWER)
    assert conversation({**row, "context": "c"}, names).messages[0]["content"] == "q\n\nc"
    assert conversation({**row, "input": "c"}, names).messages == (USER, ANSWER)  # `input` is called context here
    assert conversation({"messages": [USER, ANSWER]}, {"tools": "functions"}).tools == ()


def test_the_recipe_knows_every_name_that_a_column_map_may_give() -> None:
    assert {name for entry in FORMATS.values() for name in entry.names} == set(COLUMN_NAMES)
    assert len(set(COLUMN_NAMES)) == len(COLUMN_NAMES)


def test_rows_of_the_same_columns_are_matched_by_spelling_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def get_close_matches(word: str, *_: object, **__: object) -> list[str]:
        calls.append(word)
        return []

    monkeypatch.setattr(formats, "get_close_matches", get_close_matches)
    for index in range(3):
        assert detect({"unheard-of": index, "column": index}, {"text": "body"}) is not None
    matched = len(calls)
    assert 0 < matched <= 2 * sum(len(entry.columns) for entry in FORMATS.values())
    assert detect({"unheard-of": 1}) is None and len(calls) > matched


@pytest.mark.parametrize(
    ("columns", "row_format", "says", "fix"),
    [
        ({"promt": "a", "completion": "b"}, "prompt_completion", "lacks 'prompt'", "rename 'promt' to 'prompt'"),
        ({"Messages": []}, "messages", "lacks 'messages'", "rename 'Messages' to 'messages'"),
        ({"prompt": "a"}, "prompt_completion", "lacks 'completion'", "add the column"),
        ({"text": "a"}, "messages", "which is the format 'text'", "one format"),
        ({"a": 1, "b": 2}, None, "no format fits; columns found: 'a', 'b'", "alpaca: instruction + output"),
        ({}, None, "columns found: none", "rename the columns"),
        ({"Query": 1, "response": 2}, None, "no format fits", "data.columns: {instruction: Query, output: response}"),
        ({"id": 1, "dialogue": []}, None, "no format fits", "data.columns: {messages: dialogue}"),
        ({"body": "a"}, None, "no format fits", "data.columns: {text: body}"),
        ({f"c{i}": 1 for i in range(15)}, None, "'c11' and 3 more", "rename the columns"),
    ],
)
def test_missing_columns(columns: dict[str, Any], row_format: str | None, says: str, fix: str) -> None:
    fault = refusal(columns, row_format)
    assert says in fault.what and fix in fault.fix


@pytest.mark.parametrize("row_format", FORMATS)
def test_surrogates_and_nul_are_refused_in_every_format(row_format: str) -> None:
    for bad, says in (("\ud800", "surrogate"), ("\0", "NUL")):
        columns = {
            "messages": [USER, {**ANSWER, "content": bad}],
            "conversations": [HUMAN, {**GPT, "value": bad}],
            **dict.fromkeys(("prompt", "completion", "instruction", "output", "text"), bad),
        }
        assert says in refusal(columns, row_format).what


def test_from_and_value_under_the_name_messages_are_sharegpt_by_a_column_map() -> None:
    columns, column_map = {"messages": [HUMAN, GPT]}, {"conversations": "messages"}
    assert detect(columns, column_map) == "sharegpt"
    row = parse_row("a.jsonl:1", columns, "sharegpt", column_map)
    assert isinstance(row, MessagesRow) and [message["role"] for message in row.messages] == ["user", "assistant"]


def test_an_answer_in_the_prompt_alone_is_no_completion() -> None:
    columns = {"prompt": [USER, ANSWER], "completion": [USER]}
    assert "completion holds no answer" in refusal(columns, "prompt_completion").what
