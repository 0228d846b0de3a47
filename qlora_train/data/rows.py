"""A row as the rest of the program knows it, whatever it was called in its file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# `role` and `content` (text; may be "" where there are tool calls), and what templates read besides: `name`,
# `reasoning_content`, `tool_calls`, `tool_call_id`. Plain JSON values only.
Message = Mapping[str, Any]
Tool = Mapping[str, Any]  # a JSON schema of a function, as chat templates take it


@dataclass(frozen=True)
class MessagesRow:
    """A conversation that ends with an answer. `notes`: what was not taken as it was written."""

    where: str  # path:line
    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    weights: tuple[float, ...] | None = None  # of each message's loss; 0: not trained. None: 1 for every answer
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class PromptCompletionRow:
    """A prompt and what is to follow it, both verbatim: no template, no space between them but their own."""

    where: str
    prompt: str
    completion: str


@dataclass(frozen=True)
class TextRow:
    """Plain text, trained on from end to end."""

    where: str
    text: str


Row = MessagesRow | PromptCompletionRow | TextRow


def size_of(row: Row) -> int:
    """Characters of a row, about: what it takes to hold it."""
    if isinstance(row, MessagesRow):
        return sum(len(message.get("content") or "") for message in row.messages)
    return len(row.prompt) + len(row.completion) if isinstance(row, PromptCompletionRow) else len(row.text)
