"""The tokens of `adapter.new_tokens` in a tokenizer: what it knows already, and what is added to it."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
from tokenizers import AddedToken

from qlora_train.adapters.tokens import NewTokens
from qlora_train.data.table import TokenTable
from qlora_train.errors import ModelError, Problem

_SHOWN = 6  # pieces of a word
_ROWS_AT_ONCE = 4096
_JOINTS = re.compile("[-'\u2019]")  # of the parts of a word: e-mail, don't
LOOKED_AT = 100_000  # rows, where a token comes in none of them


def add_new_tokens(tokenizer: Any, texts: Sequence[str]) -> NewTokens | None:
    """Give each text an id of its own, in place: the one that it has, else the next free one. None where there is none.

    A token that the chat template writes is added as a special one: it structures conversations, and text that spells
    it stays text. Any other is added as a word: it has its id wherever it stands in a row, and generated answers show
    it (special tokens are left out of them). Raises ModelError for ordinary words, and where the next free id is none.
    """
    if not texts:
        return None
    if problems := [problem for text in texts if (problem := _ordinary_word(tokenizer, text))]:
        raise ModelError(problems)
    added = [_known_id(tokenizer, text) is None for text in texts]
    taken = {number: word for word, number in tokenizer.get_vocab().items()} if any(added) else {}
    template = str(tokenizer.chat_template or "")
    for text, is_new in zip(texts, added, strict=True):
        if is_new:
            tokenizer.add_tokens([AddedToken(text, normalized=False, special=text in template)])
    ids = []
    for text, is_new in zip(texts, added, strict=True):
        number = _known_id(tokenizer, text)
        if is_new and (other := taken.get(number, text)) != text:
            raise ModelError(
                f"adapter.new_tokens: {text!r} was added with the id {number:,}, which is that of {other!r}: "
                "the tokenizer numbers added tokens by how many it has, and the ids of its vocabulary have gaps",
                fix="name a token that the tokenizer knows, or use a tokenizer whose ids have no gaps",
            )
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
    if not all(map(_is_word, text.split())) or _known_id(tokenizer, text) is not None:
        return None
    return Problem(
        f"adapter.new_tokens: {text!r} is an ordinary word, which the tokenizer writes as {_pieces(tokenizer, text)}: "
        "as a token of its own it would be cut out of every text, also from within longer words",
        f"mark it as no word, <{'_'.join(text.split())}> say; or leave it out: words are learned in their pieces",
    )


def _is_word(text: str) -> bool:
    """Letters, digits and the marks on them; in two parts at most, with a hyphen or an apostrophe between them."""
    parts = _JOINTS.split(text)
    return len(parts) <= 2 and all(part and all(map(_is_in_words, part)) for part in parts)


def _is_in_words(char: str) -> bool:
    return char.isalnum() or unicodedata.category(char) in ("Mn", "Mc")  # vowel signs of Hindi, accents


def _pieces(tokenizer: Any, text: str) -> str:
    pieces = [tokenizer.decode([number]) for number in tokenizer(text, add_special_tokens=False)["input_ids"]]
    more = f" and {len(pieces) - _SHOWN} more" if len(pieces) > _SHOWN else ""
    return " ".join(map(repr, pieces[:_SHOWN])) + more
