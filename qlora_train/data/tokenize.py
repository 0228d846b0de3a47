"""Rows to one table of tokens, with every row kept or accounted for."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from qlora_train.data.audit import Audit, RowFate
from qlora_train.data.encode import Encoder
from qlora_train.data.formats import Row
from qlora_train.data.problems import ProblemList, Rejection
from qlora_train.data.template import Rendered, Renderer
from qlora_train.errors import DataError
from qlora_train.recipe.schema import DataSection

# Per call of the tokenizer: enough for its threads, and a bound on what its Python lists hold.
_BATCH_ROWS, _BATCH_CHARS = 256, 2**20

_Judged = tuple[RowFate, NDArray[np.int32] | None, NDArray[np.bool_] | None]  # ids and mask of a kept row


@dataclass(frozen=True, eq=False)
class TokenTable:
    """Tokens of all kept rows, end to end: row i is `ids[starts[i]:starts[i + 1]]`. Labels are not shifted."""

    ids: NDArray[np.int32]
    supervised: NDArray[np.bool_]
    starts: NDArray[np.int64]
    where: tuple[str, ...]

    @property
    def num_rows(self) -> int:
        """Rows in the table."""
        return len(self.where)

    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row."""
        return np.diff(self.starts)

    def row(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """One row's ids and mask, as views."""
        part = slice(self.starts[index], self.starts[index + 1])
        return self.ids[part], self.supervised[part]

    def end_token_ids(self) -> list[int]:
        """The tokens that rows were taught to end with: the last supervised one of each."""
        ends = {int(ids[np.flatnonzero(mask)[-1]]) for ids, mask in map(self.row, range(self.num_rows)) if mask.any()}
        return sorted(ends)

    def fingerprint(self) -> str:
        """SHA-256 of what is trained: ids, mask and row borders. Where the files lie does not enter."""
        digest = hashlib.sha256()
        for array, dtype in ((self.starts, "<i8"), (self.ids, "<i4"), (self.supervised, "|b1")):
            digest.update(np.ascontiguousarray(array, dtype=dtype).tobytes())
        return digest.hexdigest()


def tokenize_rows(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    section: DataSection,
    split: str,
    not_selected: Sequence[RowFate] = (),
) -> tuple[TokenTable, Audit]:
    """The table of the rows that can be trained on, and the account of all (`not_selected`: those of `select_rows`).

    DataError if no row remains, or if `section.overlong` is "fail" and a row is longer than `section.seq_len`.
    """
    kept: list[tuple[str, NDArray[np.int32], NDArray[np.bool_]]] = []
    fates: list[RowFate] = list(not_selected)
    overlong = ProblemList()
    for fate, ids, mask in _judged_rows(rows, tokenizer, section):
        fates.append(fate)
        if fate.fate == "dropped":
            overlong.add(fate.reason, "raise data.seq_len, or set data.overlong: drop", fate.where)
        elif ids is not None and mask is not None:
            kept.append((fate.where, ids, mask))
    if section.overlong == "fail":
        overlong.raise_if_any()
    if not kept:
        raise _nothing_left(split, fates)
    return _table(kept), Audit.of(split, fates)


def _judged_rows(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, section: DataSection) -> Iterator[_Judged]:
    """Every row's fate, in order, with the tokens and mask of the kept ones. The tokenizer is called in batches."""
    renderer, encoder = Renderer(tokenizer, section.loss_on), Encoder(tokenizer)
    batch: list[tuple[Row, Rendered | RowFate]] = []
    num_chars = 0
    for row in rows:
        entry = _rendered(row, renderer, encoder, section.seq_len)
        batch.append((row, entry))
        num_chars += len(entry.text) if isinstance(entry, Rendered) else 0
        if len(batch) == _BATCH_ROWS or num_chars >= _BATCH_CHARS:
            yield from _judged_batch(batch, encoder, section.seq_len)
            batch, num_chars = [], 0
    yield from _judged_batch(batch, encoder, section.seq_len)


def _rendered(row: Row, renderer: Renderer, encoder: Encoder, seq_len: int) -> Rendered | RowFate:
    """The row's text, or its fate where that is decided before it is tokenised."""
    try:
        rendered = renderer.render(row)
    except Rejection as rejection:
        return RowFate(row.where, "rejected", rejection.reason)
    num_chars = len(rendered.text)
    # Tokenising takes some 150 bytes per character: a row that cannot fit in any case is not worth gigabytes.
    if num_chars > max(_BATCH_CHARS, seq_len * encoder.longest_piece):
        num_tokens = num_chars // encoder.longest_piece
        reason = (
            f"the row is {num_chars:,} characters, so at least {num_tokens:,} tokens long; data.seq_len is {seq_len:,}"
        )
        return RowFate(row.where, "dropped", reason, num_tokens)
    return rendered


def _judged_batch(batch: Sequence[tuple[Row, Rendered | RowFate]], encoder: Encoder, seq_len: int) -> Iterator[_Judged]:
    every = iter(encoder.encode([entry for _, entry in batch if isinstance(entry, Rendered)]))
    for row, entry in batch:
        if isinstance(entry, RowFate):
            yield entry, None, None
            continue
        encoded = next(every)
        num_tokens = len(encoded.ids)
        try:
            mask = encoder.supervised(entry, encoded)
        except Rejection as rejection:
            yield RowFate(row.where, "rejected", rejection.reason, num_tokens), None, None
            continue
        num_supervised = int(mask.sum())
        if num_tokens > seq_len:
            reason = f"the row is {num_tokens:,} tokens long; data.seq_len is {seq_len:,}"
            yield RowFate(row.where, "dropped", reason, num_tokens, num_supervised), None, None
        else:
            yield RowFate(row.where, "kept", "", num_tokens, num_supervised), encoded.ids, mask


def _table(kept: Sequence[tuple[str, NDArray[np.int32], NDArray[np.bool_]]]) -> TokenTable:
    """The kept rows, laid end to end."""
    lengths = [len(ids) for _, ids, _ in kept]
    return TokenTable(
        ids=np.concatenate([ids for _, ids, _ in kept]),
        supervised=np.concatenate([mask for _, _, mask in kept]),
        starts=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        where=tuple(where for where, _, _ in kept),
    )


def _nothing_left(split: str, fates: Sequence[RowFate]) -> DataError:
    """The error for a split of which no row can be trained on, with the commonest reason, numbers apart."""
    tried = [entry for entry in fates if entry.fate != "not_selected"]
    if not tried:
        return DataError(f"0 trainable rows: the {split} split holds no rows", fix="fill its files")
    kinds = [re.sub(r"\d[\d,]*", "#", entry.reason) for entry in tried]
    kind, count = Counter(kinds).most_common(1)[0]
    example = tried[kinds.index(kind)]
    return DataError(
        f"0 trainable rows of {len(tried):,} in {split}. Likely cause ({count:,} rows): {example.reason}",
        fix="mend that first",
        where=example.where,
    )
