"""One conversation, checked: roles, order, and an answer to train on."""

from __future__ import annotations

from collections.abc import Mapping

from qlora_train.data.jsonl import json_name, text_value
from qlora_train.data.problems import RowFault

ROLES = ("system", "user", "assistant")
Message = dict[str, str]


def parse_messages(value: object, name: str = "messages") -> tuple[Message, ...]:
    """The turns of a conversation, or RowFault. A message's null fields are as if absent; its others must be text."""
    if not isinstance(value, list):
        raise RowFault(f"{name} is {json_name(value)}; expected a list of messages", _SHAPE)
    if not value:
        raise RowFault(f"{name} is empty", "leave the row out")
    messages = tuple(_message(entry, f"{name}[{index}]") for index, entry in enumerate(value))
    _check_order(messages, name)
    return messages


def _message(entry: object, name: str) -> Message:
    """One turn with its text fields."""
    if not isinstance(entry, Mapping):
        raise RowFault(f"{name} is {json_name(entry)}; expected an object with role and content", _SHAPE)
    for field in ("role", "content"):
        if field not in entry:
            found = ", ".join(map(repr, entry)) or "none"
            raise RowFault(f"{name} has no {field!r}; fields found: {found}", _SHAPE)
    if entry.get("tool_calls"):
        raise RowFault(
            f"{name} calls a tool, which cannot be trained on", "leave the row out, or write the call as text"
        )
    # `tool_calls: null` and `[]` are what exporters write where there is no call.
    empty = [field for field in entry if entry[field] is None or field == "tool_calls"]
    message = {
        field: text_value(entry[field], f"{name}.{field}")
        for field in entry
        if field not in empty or field in ("role", "content")
    }
    if message["role"] not in ROLES:
        raise RowFault(f"{name}.role is {message['role']!r}; known: {', '.join(ROLES)}", "rename the role")
    if message["role"] == "assistant" and not message["content"].strip():
        raise RowFault(f"{name} is an empty answer", "fill it in, or leave the row out")
    return message


def _check_order(messages: tuple[Message, ...], name: str) -> None:
    """RowFault unless every answer follows something to answer, and the last turn is one."""
    roles = [message["role"] for message in messages]
    if roles[0] == "assistant":
        raise RowFault(f"{name}[0] is an answer before any question", "begin with a user or system message")
    for index in range(1, len(roles)):
        if roles[index - 1] == roles[index] == "assistant":
            raise RowFault(f"{name}[{index}] is a second answer in a row", "join the two, or put a question between")
    if roles[-1] != "assistant":
        what = f"{name} ends with a {roles[-1]} message: there is no answer to train"
        raise RowFault(what, "end the conversation with an assistant message")


_SHAPE = 'write [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'
