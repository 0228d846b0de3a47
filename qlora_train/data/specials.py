"""Special-token text: what a tokenizer takes for control tokens, and how such text in a conversation stays text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from qlora_train.data.problems import RowFault
from qlora_train.data.rows import Message, MessagesRow

# Put around special-token text before rendering. Noncharacters: no text that is meant for interchange holds them.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
to_json = json.JSONEncoder(ensure_ascii=False, check_circular=False, default=dict).encode


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Text to id of every token that is special to the tokenizer, by name (eos, pad, ...) or by its file."""
    ids = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    named = {token: token_id for token, token_id in ids if token_id is not None}
    marked = {str(token): token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {**named, **marked}


def any_of(literals: Iterable[str]) -> re.Pattern[str]:
    """Matches each of the literals, of several that begin alike the longest, as tokenizers do."""
    return re.compile("|".join(map(re.escape, sorted(literals, key=len, reverse=True))) or r"(?!)")


class SpecialText:
    """Marks special-token text in a conversation, so that it can be encoded as text.

    Which tokens: those that `apply_chat_template(sanitize_control_tokens=True)` of transformers takes, the special ones
    and added ones that the template itself writes, as <tool_call>. In answers the special ones only: an answer may call
    a tool or think in so many words. `literals` is the template's literal text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, literals: str) -> None:
        special = special_tokens(tokenizer)
        added = (token.content for token in tokenizer.added_tokens_decoder.values())
        control = {*special, *(text for text in added if text in literals and not text.isspace())}
        self._control, self._special = any_of(control), any_of(special)
        self._marked = re.compile(f"{_OPEN}({self._control.pattern}){_CLOSE}|[{_OPEN}{_CLOSE}]")
        self._any_in_json = any_of([*map(_in_json, control), _OPEN, _CLOSE])

    def stands_in(self, row_in_json: str) -> bool:
        """Whether a row has to be marked. RowFault if it holds what would be taken for a mark."""
        if not self._any_in_json.search(row_in_json):
            return False
        if _OPEN in row_in_json or _CLOSE in row_in_json:
            raise RowFault("the row holds U+FDD0 or U+FDD1, which are no characters", "take them out of its text")
        return True

    def mark(self, row: MessagesRow) -> MessagesRow:
        """The row with marks around the text that is to stay text. RowFault if the name of a field holds some."""
        messages: list[Message] = []
        for message in row.messages:
            literals = self._special if message["role"] == "assistant" else self._control
            marked = {key: text if key == "role" else self._mark(text, literals) for key, text in message.items()}
            messages.append(marked)
        return replace(row, messages=tuple(messages), tools=tuple(self._mark(row.tools, self._control)))

    def unmark(self, text: str) -> tuple[str, tuple[tuple[int, int], ...]]:
        """A rendering without the marks, and where the text between them stands in that."""
        pieces: list[str] = []
        places: list[tuple[int, int]] = []
        length = at = 0
        for found in self._marked.finditer(text):
            if found[1] is None:
                raise RowFault(
                    "the chat template takes special-token text in the row to pieces",
                    "take that text out of the row, or give a template that shows it whole",
                )
            pieces += text[at : found.start()], found[1]
            start = length + found.start() - at
            length, at = start + len(found[1]), found.end()
            places.append((start, length))
        return "".join([*pieces, text[at:]]), tuple(places)

    def _mark(self, value: Any, literals: re.Pattern[str]) -> Any:
        """Plain data with marks around the literals in its texts."""
        if isinstance(value, str):
            return literals.sub(rf"{_OPEN}\g<0>{_CLOSE}", value)
        if isinstance(value, Mapping):
            for key in value:  # a template looks fields up by their names: they cannot be marked
                if found := self._control.search(key):
                    raise RowFault(f"the row holds {found[0]!r} in the name of a field", "rename it")
            return {key: self._mark(entry, literals) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return [self._mark(entry, literals) for entry in value]
        return value


def without_marks(marked: str, position: int) -> int:
    """Where a position of a marked text is when the marks are gone."""
    return position - marked.count(_OPEN, 0, position) - marked.count(_CLOSE, 0, position)


def _in_json(text: str) -> str:
    return to_json(text)[1:-1]
