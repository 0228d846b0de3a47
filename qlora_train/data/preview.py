"""Rows as a person can check them: each token's text, and whether it is trained."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from qlora_train.data.tokenize import TokenTable


@dataclass(frozen=True)
class PreviewRow:
    """The tokens of one row, as (text, supervised). The text is safe to print."""

    where: str
    tokens: tuple[tuple[str, bool], ...]


def preview(table: TokenTable, tokenizer: PreTrainedTokenizerBase, indices: Iterable[int]) -> list[PreviewRow]:
    """The rows of the table at `indices`."""
    return [_preview_row(table, tokenizer, index) for index in indices]


def printable(text: str) -> str:
    r"""The text with what could steer a terminal written as escapes: controls, direction marks, line separators.

    >>> printable("a\x1b[2Jb\n")
    'a\\x1b[2Jb\\n'
    """
    return "".join(char if _is_plain(char) else char.encode("unicode_escape").decode("ascii") for char in text)


def _is_plain(char: str) -> bool:
    """Letters, marks, numbers, punctuation, symbols and the plain space: not C* (controls, formats), Zl or Zp."""
    category = unicodedata.category(char)
    return category[0] != "C" and category not in ("Zl", "Zp")


def _preview_row(table: TokenTable, tokenizer: PreTrainedTokenizerBase, index: int) -> PreviewRow:
    ids, supervised = table.row(index)
    texts = [printable(_token_text(tokenizer, token_id)) for token_id in ids.tolist()]
    return PreviewRow(table.where[index], tuple(zip(texts, supervised.tolist(), strict=True)))


def _token_text(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    """One token's text. A token that is part of a character shows as U+FFFD."""
    text = str(tokenizer.decode([token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False))
    piece = tokenizer.convert_ids_to_tokens(token_id)
    # SentencePiece decoders drop the first space of what they take for a whole text.
    spaced = isinstance(piece, str) and piece.startswith("\u2581") and not text.startswith(" ")
    return " " + text if spaced else text
