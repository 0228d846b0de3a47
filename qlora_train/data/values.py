"""Single values of a row: what JSON calls them, and whether a tokenizer and a template can take them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from qlora_train.data.problems import RowFault

MAX_DEPTH = 64  # of schemas and of the arguments of calls; templates walk them recursively
_JSON_NAMES = {str: "text", bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}


@dataclass(frozen=True)
class NotJson:
    """Stands for a value that JSON has no type for, such as a date; a fault only where somebody reads it."""

    type_name: str


def json_name(value: object) -> str:
    """The JSON word for a value's type, for messages."""
    if isinstance(value, NotJson):
        return f"of the type {value.type_name}"
    return "null" if value is None else _JSON_NAMES.get(type(value), f"of the type {type(value).__name__}")


def text_value(value: object, name: str) -> str:
    """`value` as text that a tokenizer accepts, or RowFault."""
    if not isinstance(value, str):
        fix = "fill it in" if value is None else "put the value in quotes"
        raise RowFault(f"{name} is {json_name(value)}; expected text", f"{fix}, or leave the row out")
    if "\0" in value:
        raise RowFault(f"{name} holds a NUL character at {value.index(chr(0))}", "remove it")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        unit = f"\\u{ord(value[error.start]):04x}"
        fix = f"write the whole pair, or \\ufffd in place of {unit}"
        raise RowFault(f"{name} holds half of a surrogate pair, {unit}, at character {error.start}", fix) from None
    return value


def check_plain(value: object, name: str, depth: int = 0) -> None:
    """RowFault unless everything inside the value can be written as JSON text, and is nested at most `MAX_DEPTH`."""
    if depth > MAX_DEPTH:
        raise RowFault(f"the value is nested more than {MAX_DEPTH} levels deep", "flatten it")
    if isinstance(value, str):
        text_value(value, name)
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            text_value(key, f"a key of {name}")
            check_plain(inner, f"{name}.{key}", depth + 1)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            check_plain(inner, f"{name}[{index}]", depth + 1)
    elif isinstance(value, float) and not math.isfinite(value):
        raise RowFault(f"{name} is {value}, which JSON does not have", "write null or a number")
    elif value is not None and not isinstance(value, bool | int | float):
        raise RowFault(f"{name} is {json_name(value)}, which JSON does not have", "write it as text")
