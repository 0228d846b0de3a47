"""JSON text to values with nothing guessed: no name twice, no NaN, and every fault with its place."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NoReturn

from qlora_train.data.problems import RowFault
from qlora_train.data.values import json_name

MAX_ROW_BYTES = 16 * 2**20  # a row is held in memory several times over while it is read, rendered and tokenised


def too_long(num_bytes: int) -> RowFault:
    """The fault of a row above the limit."""
    what = f"the row is {num_bytes:,} bytes long; the limit is {MAX_ROW_BYTES:,}"
    return RowFault(what, "split the row into shorter ones")


def not_utf8(error: UnicodeDecodeError, offset: int) -> RowFault:
    """The fault of bytes that begin `offset` bytes into their file."""
    byte = f"byte 0x{error.object[error.start]:02x} at byte offset {offset + error.start:,} of the file"
    return RowFault(f"{byte} is not UTF-8", "re-encode the file: iconv -f ENCODING -t UTF-8 FILE")


def decode_text(text: str) -> object:
    """The value that the whole text is, or RowFault."""
    try:
        return _guarded(DECODER.decode, text)
    except json.JSONDecodeError as error:
        raise RowFault(f"is not JSON: {error.msg} at character {error.pos}", "mend it") from None


def decode_line(raw: bytes, offset: int) -> dict[str, object]:
    """The object on a line that begins at this byte of the file, or RowFault."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise not_utf8(error, offset) from None
    try:
        return as_row(_guarded(DECODER.decode, text))
    except json.JSONDecodeError as error:
        place = offset + len(text[: error.pos].encode("utf-8"))
        what = f"is not JSON: {error.msg} at column {error.pos + 1}, byte offset {place:,} of the file"
        if not raw.endswith(b"\n") and is_cut_short(error, text):
            raise RowFault(f"{what}; the file ends within this row", "copy the file again: it was cut off") from None
        raise RowFault(what, "write one JSON object per line") from None


def decode_first(text: str, start: int) -> tuple[object, int]:
    """The value that begins at a character, and where it ends. JSONDecodeError where it is none, or is cut short."""
    return _guarded(DECODER.raw_decode, text, start)


def as_row(value: object) -> dict[str, object]:
    """The value, which must be an object."""
    if not isinstance(value, dict):
        raise RowFault(f"the row is {json_name(value)}; expected an object", 'write the row as {"column": value}')
    return value


def is_cut_short(error: json.JSONDecodeError, text: str) -> bool:
    """Whether it is the end of the text that the decoder stumbled over."""
    return error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated")


def _guarded(decode: Callable[..., Any], *arguments: object) -> Any:
    """What `decode` gives; RowFault for what Python cannot hold, JSONDecodeError for what is not JSON."""
    try:
        return decode(*arguments)
    except RecursionError:
        raise RowFault("the JSON is nested too deeply", "flatten the row") from None
    except json.JSONDecodeError:
        raise
    except ValueError as error:  # an integer of thousands of digits
        raise RowFault(f"is not usable JSON: {error}", "mend the value, or put it in quotes") from None


def _reject_constant(name: str) -> NoReturn:
    raise RowFault(f"holds {name}, which JSON does not have", "write null or a number")


def _unique_columns(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """The pairs as a dict; a name that stands twice would lose its first value without a word."""
    columns = dict(pairs)
    if len(columns) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RowFault(f"{twice!r} stands twice in one object", "keep one of them")
    return columns


DECODER = json.JSONDecoder(object_pairs_hook=_unique_columns, parse_constant=_reject_constant)
