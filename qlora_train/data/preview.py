"""Rows as a person can check them: each token's text, and whether it is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from qlora_train.data.strange import random_rows, strangest
from qlora_train.data.table import TokenRow, TokenTable
from qlora_train.printable import printable

MAX_TOKENS = 600  # of a row that are shown: half at its start, half at its end
MAX_TOKEN_CHARS = 200


class PreviewToken(NamedTuple):
    """A token's text, safe to print, and its weight in the loss; 0: not trained."""

    text: str
    weight: float


@dataclass(frozen=True)
class PreviewRow:
    """One row. Where it is too long to show, `tokens` are its first and `tail` its last ones."""

    where: str
    tokens: tuple[PreviewToken, ...]
    num_left_out: int = 0
    tail: tuple[PreviewToken, ...] = ()
    reason: str = ""  # for showing this row; "": by chance


def preview(table: TokenTable, tokenizer: PreTrainedTokenizerBase, indices: Sequence[int]) -> list[PreviewRow]:
    """The rows of the table at `indices`."""
    rows = table.rows(indices)
    return [_preview_row(row, tokenizer, table.where(index)) for index, row in zip(indices, rows, strict=True)]


def rows_to_look_at(
    table: TokenTable, tokenizer: PreTrainedTokenizerBase, seed: int, num_random: int = 10, num_strange: int = 5
) -> list[PreviewRow]:
    """Random rows, then the strangest ones with the reason."""
    strange = strangest(table, num_strange)
    shown = preview(table, tokenizer, [row.index for row in strange])
    reasons = [
        PreviewRow(row.where, row.tokens, row.num_left_out, row.tail, entry.reason)
        for row, entry in zip(shown, strange, strict=True)
    ]
    return preview(table, tokenizer, random_rows(table, num_random, seed)) + reasons


def _preview_row(row: TokenRow, tokenizer: PreTrainedTokenizerBase, where: str) -> PreviewRow:
    length = len(row.ids)
    if length <= MAX_TOKENS:
        return PreviewRow(where, _tokens(row, tokenizer, 0, length))
    half = MAX_TOKENS // 2
    head, tail = _tokens(row, tokenizer, 0, half), _tokens(row, tokenizer, length - half, length)
    return PreviewRow(where, head, length - 2 * half, tail)


def _tokens(row: TokenRow, tokenizer: PreTrainedTokenizerBase, start: int, stop: int) -> tuple[PreviewToken, ...]:
    texts = [_token_text(tokenizer, token_id) for token_id in row.ids[start:stop].tolist()]
    return tuple(map(PreviewToken, texts, _weights(row)[start:stop].tolist()))


def _weights(row: TokenRow) -> NDArray[np.float32]:
    """The weight of each token in the loss."""
    weights = np.zeros(len(row.ids), dtype=np.float32)
    for start, stop, weight in zip(row.span_starts, row.span_stops, row.span_weights, strict=True):
        weights[start:stop] = weight
    return weights


def _token_text(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    """One token's text, cut if it is long. A token that is part of a character shows as U+FFFD."""
    text = str(tokenizer.decode([token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False))
    piece = tokenizer.convert_ids_to_tokens(token_id)
    # SentencePiece decoders drop the first space of what they take for a whole text.
    spaced = isinstance(piece, str) and piece.startswith("\u2581") and not text.startswith(" ")
    text = " " + text if spaced else text
    left_out = len(text) - MAX_TOKEN_CHARS
    return printable(text[:MAX_TOKEN_CHARS]) + (f"... ({left_out:,} characters more)" if left_out > 0 else "")
