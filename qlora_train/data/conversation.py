"""One conversation, checked: roles, order, and an answer to train on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, NamedTuple

from qlora_train.data.problems import RowFault
from qlora_train.data.rows import Message
from qlora_train.data.sources.decode import decode_text
from qlora_train.data.values import check_plain, json_name, text_value

ROLES = {role: role for role in ("system", "developer", "user", "assistant", "tool")}
SHAREGPT_ROLES = {
    **ROLES,
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "bot", "function_call"), "assistant"),
    **dict.fromkeys(("observation", "function_response", "ipython"), "tool"),
}
# What templates read beside role and content. A message's other fields (ids, scores) are left out of the row.
_TEXT_FIELDS = ("name", "tool_call_id", "reasoning_content", "reasoning", "thinking", "tool_plan")
_SHAPE = 'write [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'
_SHAREGPT_FIX = "they are of the format sharegpt: write data.columns: {conversations: messages}"
_CALL_SHAPE = 'write {"type": "function", "function": {"name": "...", "arguments": {...}}}'

_LEAST_WEIGHT, _MOST_WEIGHT = 1e-6, 1e6  # well within float32, in which losses are weighted
_WEIGHT_FIX = "write 0, or a number from 1e-6 to 1e6"


class Turns(NamedTuple):
    """A conversation's messages, their weights (None: 1 for every answer; else 0 for what is none), and notes on it."""

    messages: tuple[Message, ...]
    weights: tuple[float, ...] | None
    notes: tuple[str, ...]


def parse_messages(
    value: object,
    name: str = "messages",
    keys: tuple[str, str] = ("role", "content"),
    roles: Mapping[str, str] = ROLES,
) -> Turns:
    """The turns of a conversation up to its last answer.

    `keys` are the names that role and content have in the file, `roles` the roles there and what they are here; other
    names that are known (SHAREGPT_ROLES), in letters of either case, are taken with a note, as turns after the last
    answer are left out with one. A null field is as if absent; text in place of the list is read as JSON.
    """
    entries = json_list(value, name, "messages", _SHAPE)
    if not entries:
        raise RowFault(f"{name} is empty", "leave the row out")
    messages: list[Message] = []
    weights: list[float] = []
    weighted = False
    notes: dict[str, None] = {}
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict):
            where = f"{name}[{index}]"
            raise RowFault(f"{where} is {json_name(entry)}; expected an object with {' and '.join(keys)}", _SHAPE)
        message = _plain_message(entry, keys, roles) or _message(entry, f"{name}[{index}]", keys, roles)
        if (written := entry[keys[0]]) not in roles:
            notes[f"the role {written!r} is read as {message['role']!r}"] = None
        is_answer = message["role"] == "assistant"
        weight = float(is_answer)
        if "weight" in entry or "train" in entry:
            weight = _weight(entry, f"{name}[{index}]", is_answer)
            weighted = weighted or weight != is_answer
        messages.append(message)
        weights.append(weight)
    _check_order(messages, name)
    count = 1 + max(index for index, message in enumerate(messages) if message["role"] == "assistant")
    if count < len(messages):
        notes["the turns after the last answer are left out"] = None
    if weighted and not any(weights):
        raise RowFault(f"every answer of {name} has the weight 0: there is nothing to train", "leave the row out")
    return Turns(tuple(messages[:count]), tuple(weights[:count]) if weighted else None, tuple(notes))


def json_list(value: object, name: str, of: str, fix: str) -> list[Any]:
    """The list, or the list that JSON text holds, as where a table has no type for one."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        value = _decoded(value, name, fix)
    if not isinstance(value, list):
        raise RowFault(f"{name} is {json_name(value)}; expected a list of {of}", fix)
    return value


def parse_tools(value: object, name: str = "tools") -> tuple[Mapping[str, Any], ...]:
    """The functions that the model may call, as they stand: a list of JSON schemas, or JSON text of one."""
    if value is None or value == "" or value == []:
        return ()
    fix = 'write [{"type": "function", "function": {"name": "...", "parameters": {...}}}]'
    tools = json_list(value, name, "function schemas", fix)
    for index, tool in enumerate(tools):
        if not isinstance(tool, dict) or not (isinstance(tool.get("function"), dict) or "name" in tool):
            seen = "an object without a function" if isinstance(tool, dict) else json_name(tool)
            raise RowFault(f"{name}[{index}] is {seen}; expected the JSON schema of a function", fix)
        check_plain(tool, f"{name}[{index}]")
    return tuple(tools)


def _plain_message(entry: dict[str, Any], keys: tuple[str, str], roles: Mapping[str, str]) -> Message | None:
    """The message where it is nothing but a role and text that is fine, as nearly all are; None: look closer."""
    role_key, content_key = keys
    if len(entry) != 2 or role_key not in entry or content_key not in entry:
        return None
    role, content = entry[role_key], entry[content_key]
    if type(role) is not str or role not in roles or type(content) is not str or not content or "\0" in content:
        return None
    if not content.isascii():
        try:
            content.encode()
        except UnicodeEncodeError:
            return None
    if content.isspace() and roles[role] == "assistant":
        return None
    return {"role": roles[role], "content": content}


def _message(entry: dict[str, Any], name: str, keys: tuple[str, str], roles: Mapping[str, str]) -> Message:
    """One turn with its content and what else templates read."""
    role_key, content_key = keys
    if role_key not in entry:
        fix = _SHAREGPT_FIX if entry.keys() >= {"from", "value"} and name.startswith("messages[") else _SHAPE
        raise RowFault(f"{name} has no {role_key!r}; fields found: {_listed(entry)}", fix)
    written = text_value(entry[role_key], f"{name}.{role_key}")
    role = roles.get(written) or SHAREGPT_ROLES.get(written.lower())
    if role is None:
        raise RowFault(f"{name}.{role_key} is {written!r}; known: {', '.join(roles)}", _near_role(written, roles))
    calls = _calls(entry.get("tool_calls"), f"{name}.tool_calls", role)
    if content_key not in entry and not calls:
        raise RowFault(f"{name} has no {content_key!r}; fields found: {_listed(entry)}", _SHAPE)
    content = entry.get(content_key)
    content = "" if content is None and calls else _content(content, f"{name}.{content_key}")
    if role == "assistant" and not calls and not content.strip():
        raise RowFault(f"{name} is an empty answer", "fill it in, or leave the row out")
    message: dict[str, Any] = {"role": role, "content": content}
    if calls:
        message["tool_calls"] = calls
    for field in _TEXT_FIELDS:
        if entry.get(field) is not None:
            message[field] = text_value(entry[field], f"{name}.{field}")
    return message


def _content(value: object, name: str) -> str:
    """The text of a message; of a list of parts, all of them joined."""
    if not isinstance(value, list):
        return text_value(value, name)
    texts = []
    for index, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(part, dict) or kind != "text":
            seen = f"of the type {kind!r}" if isinstance(kind, str) else json_name(part)
            raise RowFault(f"{name}[{index}] is {seen}; only text can be trained on", "leave the row out")
        texts.append(text_value(part.get("text"), f"{name}[{index}].text"))
    return "".join(texts)


def _calls(value: object, name: str, role: str) -> list[dict[str, Any]]:
    """The calls in one shape, their arguments as objects: what serving programs hand to templates."""
    if not value:  # null and [] are what exporters write where there is no call
        return []
    if role != "assistant":
        raise RowFault(f"{name} stands in a {role} message; only the assistant calls tools", "move it, or remove it")
    calls = []
    for index, call in enumerate(json_list(value, name, "calls", _CALL_SHAPE)):
        where = f"{name}[{index}]"
        if not isinstance(call, dict):
            raise RowFault(f"{where} is {json_name(call)}; expected an object", _CALL_SHAPE)
        function = call.get("function", call)
        if not isinstance(function, dict) or "name" not in function:
            raise RowFault(f"{where} names no function; fields found: {_listed(call)}", _CALL_SHAPE)
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            arguments = _decoded(arguments or "{}", f"{where}.arguments", _CALL_SHAPE)
        arguments = {} if arguments is None else arguments
        if not isinstance(arguments, dict):
            raise RowFault(f"{where}.arguments is {json_name(arguments)}; expected an object", _CALL_SHAPE)
        check_plain(arguments, f"{where}.arguments")
        identity = {} if call.get("id") is None else {"id": text_value(call["id"], f"{where}.id")}
        called = {"name": text_value(function["name"], f"{where}.name"), "arguments": arguments}
        calls.append({"type": "function", **identity, "function": called})
    return calls


def _weight(entry: dict[str, Any], name: str, is_answer: bool) -> float:
    """What the message's `weight` and `train` say together."""
    weight, train = entry.get("weight"), entry.get("train")
    if train is not None and not isinstance(train, bool):
        raise RowFault(f"{name}.train is {json_name(train)}; expected true or false", "write true or false")
    if weight is not None:
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise RowFault(f"{name}.weight is {json_name(weight)}; expected a number", _WEIGHT_FIX)
        try:
            weight = float(weight)
        except OverflowError:
            weight = math.inf
        if weight and not _LEAST_WEIGHT <= weight <= _MOST_WEIGHT:
            raise RowFault(f"{name}.weight is {weight}", _WEIGHT_FIX)
    if not is_answer and (weight or train):
        role = "its role is not the assistant's"
        raise RowFault(f"{name} has a weight, but {role}: only answers are weighted", "remove it")
    return 0.0 if train is False or not is_answer else 1.0 if weight is None else weight


def _check_order(messages: Sequence[Message], name: str) -> None:
    """RowFault unless there is an answer, and every answer follows something to answer."""
    before = ""
    for index, message in enumerate(messages):
        role = message["role"]
        if role == "assistant":
            if not before:
                raise RowFault(f"{name}[0] is an answer before any question", "begin with a user or system message")
            if before == "assistant":
                fix = "join the two, or put a question between"
                raise RowFault(f"{name}[{index}] is a second answer in a row", fix)
        elif role == "tool" and before not in ("assistant", "tool"):
            raise RowFault(f"{name}[{index}] is a tool's result, but no answer that calls it stands before it", _SHAPE)
        before = role
    if all(message["role"] != "assistant" for message in messages):
        what = f"{name} ends with a {before} message: there is no answer to train"
        raise RowFault(what, "end the conversation with an assistant message, or leave the row out")


def _decoded(text: str, name: str, fix: str) -> object:
    """The value that a piece of JSON text holds."""
    try:
        return decode_text(text)
    except RowFault as fault:
        raise RowFault(f"{name}: {fault.what}", fix) from None


def _near_role(written: str, roles: Mapping[str, str]) -> str:
    known = next(iter(get_close_matches(written.lower(), roles, n=1)), None)
    return f"rename it to {known!r}" if known else "rename the role"


def _listed(entry: Mapping[str, object]) -> str:
    return ", ".join(map(repr, entry)) or "none"
