"""The tokens of `adapter.new_tokens` in a tokenizer: what it knows already, and what is added to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tokenizers import AddedToken

from qlora_train.adapters.tokens import NewTokens
from qlora_train.data.table import TokenTable
from qlora_train.errors import ModelError, Problem

_SHOWN = 6  # pieces of a word
_ROWS_AT_ONCE = 4096
LOOKED_AT = 100_000  # rows, where a token comes in none of them


def add_new_tokens(tokenizer: Any, texts: Sequence[str]) -> NewTokens | None:
    """Give each text an id of its own, in place: the one that it has, else the next free one. None where there is none.

    A token that the chat template writes is added as a special one: it structures conversations, and text that spells
    it stays text. Any other is added as a word: it has its id wherever it stands in a row, and generated answers show
    it (special tokens are left out of them). Raises ModelError for ordinary words.
    """
    if not texts:
        return None
    if problems := [problem for text in texts if (problem := _ordinary_word(tokenizer, text))]:
        raise ModelError(problems)
    added = [_known_id(tokenizer, text) is None for text in texts]
    template = str(tokenizer.chat_template or "")
    for text, is_new in zip(texts, added, strict=True):
        if is_new:
            tokenizer.add_tokens([AddedToken(text, normalized=False, special=text in template)])
    ids = []
    for text in texts:
        number = _known_id(tokenizer, text)
        if number is None:
            raise ModelError(
                f"adapter.new_tokens: the tokenizer still writes {text!r} as {_pieces(tokenizer, text)} after it was "
                "added: another token takes it to pieces",
                fix="name another text",
            )
        ids.append(number)
    return NewTokens(tuple(texts), tuple(ids), tuple(added))


def describe(tokens: NewTokens, num_rows: int) -> str:
    """A line for people: each token with its id, what is new of it, and how the embedding grows."""
    words = [
        f"{text} {number:,}{' (added)' if added else ''}"
        for text, number, added in zip(tokens.texts, tokens.ids, tokens.added, strict=True)
    ]
    count = tokens.num_lacking(num_rows)
    grown = f"; the embedding has {num_rows:,} rows and gets {count} more" if count else ""
    return f"new tokens: {', '.join(words)}{grown}"


def unused_tokens(table: TokenTable, tokens: NewTokens) -> list[str]:
    """Those that occur in none of the first LOOKED_AT rows of the table. Reads rows until all were seen."""
    wanting = dict(zip(tokens.ids, tokens.texts, strict=True))
    num_rows = min(table.num_rows, LOOKED_AT)
    for start in range(0, num_rows, _ROWS_AT_ONCE):
        rows = table.rows(range(start, min(start + _ROWS_AT_ONCE, num_rows)))
        for number in np.unique(np.concatenate([row.ids for row in rows])).tolist():
            wanting.pop(number, None)
        if not wanting:
            break
    return list(wanting.values())


def _known_id(tokenizer: Any, text: str) -> int | None:
    """The one id by which the tokenizer writes a text; None where it takes several, or none that says it."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1 or (ids[0] == tokenizer.unk_token_id and text != tokenizer.unk_token):
        return None
    number: int = ids[0]
    return number


def _ordinary_word(tokenizer: Any, text: str) -> Problem | None:
    """Why a text would be cut out of others: it is a word or a number that the tokenizer writes in several pieces."""
    if not all(part.isalnum() for part in text.split()) or _known_id(tokenizer, text) is not None:
        return None
    return Problem(
        f"adapter.new_tokens: {text!r} is an ordinary word, which the tokenizer writes as {_pieces(tokenizer, text)}: "
        "as a token of its own it would be cut out of every text, also from within longer words",
        f"mark it as no word, <{'_'.join(text.split())}> say; or leave it out: words are learned in their pieces",
    )


def _pieces(tokenizer: Any, text: str) -> str:
    pieces = [tokenizer.decode([number]) for number in tokenizer(text, add_special_tokens=False)["input_ids"]]
    more = f" and {len(pieces) - _SHOWN} more" if len(pieces) > _SHOWN else ""
    return " ".join(map(repr, pieces[:_SHOWN])) + more
