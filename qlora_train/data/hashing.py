"""Numbers that tell rows with the same content, and rows with the same prompt."""

from __future__ import annotations

import json
from hashlib import blake2b

from qlora_train.data.rows import MessagesRow, PromptCompletionRow, Row

_encode = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":"), check_circular=False).encode


def hashes(row: Row) -> tuple[int, int]:
    """Two numbers of 64 bits: of the whole content, and of the prompt, which is the row without its last answer.

    Weights belong to the content and not to the prompt: rows that differ in what is trained are no duplicates, but ask
    the same. Rows that differ in their place only have the same. Plain text, and a row whose prompt is empty, ask
    nothing that another row could ask too: their prompt is the content.
    """
    prompt, answer = _parts(row)
    content = _hash(prompt + answer + _weights(row))
    return content, _hash(prompt) if _asks(row) else content


def _asks(row: Row) -> bool:
    return isinstance(row, MessagesRow) or (isinstance(row, PromptCompletionRow) and bool(row.prompt.strip()))


def _parts(row: Row) -> tuple[str, str]:
    """The row in two pieces. Each is a JSON value after a letter for its kind, so no two rows share one encoding."""
    if isinstance(row, MessagesRow):
        return "m" + _encode([row.tools, row.messages[:-1]]), _encode(row.messages[-1])
    if isinstance(row, PromptCompletionRow):
        return "p" + _encode(row.prompt), _encode(row.completion)
    return "t" + _encode(row.text), ""


def _weights(row: Row) -> str:
    """What is trained of a conversation, where that is not each answer alike."""
    if not isinstance(row, MessagesRow) or row.weights is None:
        return ""
    weights = [float(weight) for weight in row.weights]
    usual = [float(message["role"] == "assistant") for message in row.messages]
    return "" if weights == usual else _encode(weights)


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")
