"""Numbers that tell rows with the same content, and rows with the same prompt."""

from __future__ import annotations

import json
from hashlib import blake2b

from qlora_train.data.rows import MessagesRow, PromptCompletionRow, Row

_encode = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":"), check_circular=False).encode


def content_hash(row: Row) -> int:
    """64 bits of all that is rendered; rows that differ only in their weights or their place have the same."""
    prompt, answer = _parts(row)
    return _hash(prompt + answer)


def prompt_hash(row: Row) -> int:
    """64 bits of the row without its last answer; of plain text, which has none, of all."""
    return _hash(_parts(row)[0])


def hashes(row: Row) -> tuple[int, int]:
    """`content_hash` and `prompt_hash`, for the price of one."""
    prompt, answer = _parts(row)
    return _hash(prompt + answer), _hash(prompt)


def _parts(row: Row) -> tuple[str, str]:
    """The row in two pieces. Each is a JSON value after a letter for its kind, so no two rows share one encoding."""
    if isinstance(row, MessagesRow):
        return "m" + _encode([row.tools, row.messages[:-1]]), _encode(row.messages[-1])
    if isinstance(row, PromptCompletionRow):
        return "p" + _encode(row.prompt), _encode(row.completion)
    return "t" + _encode(row.text), ""


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")
