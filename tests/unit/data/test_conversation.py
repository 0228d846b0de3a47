"""A conversation is taken apart as templates need it, or refused with the message that is wrong."""

from __future__ import annotations

import datetime
from typing import Any

import pytest

from qlora_train.data.conversation import SHAREGPT_ROLES, parse_messages, parse_tools
from qlora_train.data.problems import RowFault

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "c1", "name": "add", "content": "2"}


def refusal(value: object, **kwargs: Any) -> RowFault:
    with pytest.raises(RowFault) as caught:
        parse_messages(value, **kwargs)
    assert caught.value.fix
    return caught.value


def test_plain_turns_are_kept_in_order() -> None:
    turns = [{"role": "system", "content": "s"}, USER, ANSWER, USER, ANSWER]
    assert parse_messages(turns) == (tuple(turns), None, ())


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ("hello", "messages is text; expected a list of messages"),
        (None, "messages is null"),
        ({"role": "user"}, "messages is an object; expected a list"),
        ('[{"role": "user"', "messages: is not JSON"),
        ([], "messages is empty"),
        (["hello"], "messages[0] is text; expected an object with role and content"),
        ([{"content": "q"}, ANSWER], "messages[0] has no 'role'; fields found: 'content'"),
        ([USER, {"role": "assistant"}], "messages[1] has no 'content'; fields found: 'role'"),
        ([USER, {"role": "assistant", "content": None}], "messages[1].content is null"),
        ([{"role": 3, "content": "q"}, ANSWER], "messages[0].role is a number"),
        ([USER, {"role": "assistant", "content": " \n"}], "messages[1] is an empty answer"),
        ([USER, {**ANSWER, "content": "", "reasoning_content": "hm"}], "messages[1] is an empty answer"),
        ([ANSWER, USER, ANSWER], "messages[0] is an answer before any question"),
        ([USER, ANSWER, ANSWER], "messages[2] is a second answer in a row"),
        ([{"role": "system", "content": "s"}, USER], "messages ends with a user message: there is no answer to train"),
        ([USER, {"role": "assistant", "content": 3}], "messages[1].content is a number"),
        ([USER, RESULT, ANSWER], "messages[1] is a tool's result"),
        ([USER, {"role": "assistant", "content": "\ud800"}], "messages[1].content holds half of a surrogate pair"),
        ([{"role": "user", "content": "a\0"}, ANSWER], "messages[0].content holds a NUL character at 1"),
        ([USER, {**ANSWER, "reasoning_content": 3}], "messages[1].reasoning_content is a number"),
    ],
)
def test_faults_of_turns(messages: object, says: str) -> None:
    assert says in refusal(messages).what


@pytest.mark.parametrize(
    ("role", "fix"),
    [
        ("asistant", "rename it to 'assistant'"),
        ("zebra", "rename the role"),
    ],
)
def test_unknown_role_names_the_nearest(role: str, fix: str) -> None:
    fault = refusal([{"role": role, "content": "q"}, ANSWER])
    assert fault.what == f"messages[0].role is {role!r}; known: system, developer, user, assistant, tool"
    assert fault.fix == fix


def test_null_fields_are_as_if_absent_and_unread_ones_are_left_out() -> None:
    answer = {**ANSWER, "tool_calls": None, "name": "bot", "reasoning_content": None, "id": 7, "score": {"x": [1]}}
    user: dict[str, object] = {**USER, "tool_calls": [], "weight": None, "train": None}
    assert parse_messages([user, answer]) == ((USER, {**ANSWER, "name": "bot"}), None, ())


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking", "name"])
def test_text_that_templates_read_is_kept(field: str) -> None:
    assert parse_messages([USER, {**ANSWER, field: "é"}])[0][1] == {**ANSWER, field: "é"}


def test_text_that_holds_json_is_read() -> None:
    text = '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]'
    assert parse_messages(text) == ((USER, ANSWER), None, ())


def test_parts_of_text_are_joined_and_others_refused() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert parse_messages([{"role": "user", "content": parts}, ANSWER])[0][0] == {"role": "user", "content": "ab"}
    image = [{"type": "image", "url": "x"}]
    assert "messages[0].content[0] is of the type 'image'" in refusal([{"role": "user", "content": image}, ANSWER]).what
    assert "messages[0].content[0] is text" in refusal([{"role": "user", "content": ["x"]}, ANSWER]).what


def test_calls_and_their_results() -> None:
    messages, weights, _ = parse_messages([USER, CALLS, RESULT, RESULT, ANSWER])
    assert messages == (USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, RESULT, RESULT, ANSWER)
    assert weights is None


@pytest.mark.parametrize(
    "call",
    [
        {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}},
        {"id": "c1", "name": "add", "arguments": {"a": 1}},
    ],
)
def test_calls_come_out_in_one_shape(call: object) -> None:
    assert parse_messages([USER, {"role": "assistant", "tool_calls": [call]}])[0][1]["tool_calls"] == [CALL]


def test_call_without_arguments() -> None:
    calls = [{"function": {"name": "now"}}, {"function": {"name": "now", "arguments": ""}}]
    (_, answer), _, _ = parse_messages([USER, {"role": "assistant", "content": "", "tool_calls": calls}])
    assert [call["function"] for call in answer["tool_calls"]] == [{"name": "now", "arguments": {}}] * 2


@pytest.mark.parametrize(
    ("calls", "says"),
    [
        ("x", "messages[1].tool_calls is text; expected a list of calls"),
        ([1], "messages[1].tool_calls[0] is a number"),
        ([{"id": "1"}], "messages[1].tool_calls[0] names no function; fields found: 'id'"),
        ([{"function": {"name": "f", "arguments": "{"}}], "tool_calls[0].arguments: is not JSON"),
        ([{"function": {"name": "f", "arguments": [1]}}], "tool_calls[0].arguments is a list"),
        ([{"function": {"name": "f", "arguments": {"a": "\ud800"}}}], "arguments.a holds half of a surrogate pair"),
        ([{"function": {"name": "f", "arguments": {"a": [1e999]}}}], "arguments.a[0] is inf"),
        ([{"function": {"name": "f", "arguments": {"a": datetime.date(2024, 1, 1)}}}], "of the type date"),
        ([{"function": {"name": None}}], "tool_calls[0].name is null"),
    ],
)
def test_faults_of_calls(calls: object, says: str) -> None:
    assert says in refusal([USER, {**ANSWER, "tool_calls": calls}]).what


def test_only_the_assistant_calls() -> None:
    assert "stands in a user message" in refusal([{**USER, "tool_calls": [CALL]}, ANSWER]).what


def test_deep_arguments_are_refused() -> None:
    deep: object = {}
    for _ in range(100):
        deep = {"a": deep}
    calls = [{"function": {"name": "f", "arguments": deep}}]
    assert "nested more than 64 levels" in refusal([USER, {**ANSWER, "tool_calls": calls}]).what


@pytest.mark.parametrize(
    ("marks", "expected"),
    [
        ({"weight": 0.5}, 0.5),
        ({"weight": 2}, 2.0),
        ({"weight": 0}, 0.0),
        ({"weight": 1e-6}, 1e-6),
        ({"weight": 10**6}, 1e6),
        ({"train": False}, 0.0),
        ({"train": True}, 1.0),
        ({"train": True, "weight": 3}, 3.0),
        ({"train": False, "weight": 3}, 0.0),
        ({"train": None, "weight": None}, 1.0),
    ],
)
def test_weight_and_train_become_weights(marks: dict[str, object], expected: float) -> None:
    user = {**USER, "weight": 0, "train": False}
    messages, weights, _ = parse_messages([user, {**ANSWER, **marks}, USER, ANSWER])
    assert messages == (USER, ANSWER, USER, ANSWER)
    assert weights == (None if expected == 1 else (0.0, expected, 0.0, 1.0))


@pytest.mark.parametrize(
    ("user", "answer", "says"),
    [
        ({}, {"weight": -1}, "messages[1].weight is -1.0"),
        ({}, {"weight": float("nan")}, "messages[1].weight is nan"),
        ({}, {"weight": 10**400}, "messages[1].weight is inf"),
        ({}, {"weight": 1e-50}, "messages[1].weight is 1e-50"),
        ({}, {"weight": 9e-7}, "messages[1].weight is 9e-07"),
        ({}, {"weight": 1000001}, "messages[1].weight is 1000001.0"),
        ({}, {"weight": 1e300}, "messages[1].weight is 1e+300"),
        ({}, {"weight": True}, "messages[1].weight is a boolean"),
        ({}, {"weight": "1"}, "messages[1].weight is text"),
        ({}, {"train": 1}, "messages[1].train is a number"),
        ({"weight": 1}, {}, "messages[0] has a weight"),
        ({"train": True}, {}, "messages[0] has a weight"),
        ({}, {"weight": 0}, "nothing to train"),
        ({}, {"train": False}, "nothing to train"),
    ],
)
def test_faults_of_weights(user: dict[str, object], answer: dict[str, object], says: str) -> None:
    assert says in refusal([{**USER, **user}, {**ANSWER, **answer}]).what


@pytest.mark.parametrize(
    ("role", "read_as"), [("User", "user"), ("human", "user"), ("GPT", "assistant"), ("Bot", "assistant")]
)
def test_well_known_names_of_roles_are_taken_with_a_note(role: str, read_as: str) -> None:
    turns = [dict(turn) for turn in (USER, ANSWER, USER, ANSWER)]
    for turn in turns:
        turn["role"] = role if turn["role"] == read_as else turn["role"]
    assert parse_messages(turns) == ((USER, ANSWER, USER, ANSWER), None, (f"the role {role!r} is read as {read_as!r}",))


@pytest.mark.parametrize("trailing", [[USER], [USER, USER], [CALLS, RESULT], [{"role": "system", "content": "s"}]])
def test_turns_after_the_last_answer_are_left_out_with_a_note(trailing: list[dict[str, Any]]) -> None:
    left = [turn for turn in trailing if turn is CALLS]
    before = [USER, ANSWER, USER] if left else [USER, ANSWER]
    weighted = [{**before[1], "weight": 2}, *before[2:]]
    messages, weights, notes = parse_messages([USER, *weighted, *trailing])
    assert [message["role"] for message in messages] == [turn["role"] for turn in (*before, *left)]
    assert weights is not None and len(weights) == len(messages) and weights[1] == 2
    assert notes == ("the turns after the last answer are left out",)


def test_a_null_is_to_be_filled_in_and_from_value_is_sharegpt() -> None:
    assert refusal([USER, {**ANSWER, "content": None}]).fix.startswith("fill it in")
    assert "data.columns: {conversations: messages}" in refusal([{"from": "human", "value": "q"}]).fix


def test_other_keys_and_roles() -> None:
    turns = [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": "f()"},
        {"from": "observation", "value": "2"},
    ]
    turns.append({"from": "gpt", "value": "a"})
    messages, _, _ = parse_messages(turns, "conversations", ("from", "value"), SHAREGPT_ROLES)
    assert [(message["role"], message["content"]) for message in messages] == [
        ("user", "q"),
        ("assistant", "f()"),
        ("tool", "2"),
        ("assistant", "a"),
    ]
    fault = refusal(
        [{"from": "humn", "value": "q"}], name="conversations", keys=("from", "value"), roles=SHAREGPT_ROLES
    )
    assert fault.what.startswith("conversations[0].from is 'humn'") and fault.fix == "rename it to 'human'"


def test_tools() -> None:
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    assert parse_tools([tool, {"name": "bare"}]) == (tool, {"name": "bare"})
    assert parse_tools('[{"name": "bare"}]') == ({"name": "bare"},)
    assert parse_tools(None) == parse_tools("") == parse_tools([]) == ()


@pytest.mark.parametrize(
    ("tools", "says"),
    [
        ("add", "tools is text; expected a list of function schemas"),
        ("[", "tools: is not JSON"),
        (["add"], "tools[0] is text"),
        ([{"type": "function"}], "tools[0] is an object without a function"),
        ([{"name": "a\0"}], "tools[0].name holds a NUL"),
    ],
)
def test_faults_of_tools(tools: object, says: str) -> None:
    with pytest.raises(RowFault) as caught:
        parse_tools(tools)
    assert says in caught.value.what
