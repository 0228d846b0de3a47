"""The tokens of rows as an Arrow table, memory-mapped from a file: rows are views, whatever the size of the set."""

from __future__ import annotations

import hashlib
import struct
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),  # absent where tokens are made again for each use (data.streaming)
        ("span_starts", pa.list_(pa.int32())),  # of the supervised tokens, in tokens of the row
        ("span_stops", pa.list_(pa.int32())),
        ("span_weights", pa.list_(pa.float32())),
        ("num_tokens", pa.int32()),
        ("num_supervised", pa.int32()),
        ("num_chars", pa.int32()),
        ("num_plain_specials", pa.int32()),  # special tokens' text inside content, encoded as text
        ("num_control_specials", pa.int32()),  # the same inside verbatim text: control tokens
        ("num_context_turns", pa.int32()),  # answers that stay context because the template drops their reasoning
        ("content_hash", pa.uint64()),  # of the whole row as it was written
        ("prompt_hash", pa.uint64()),  # of the row without its last answer
        ("source", pa.int16()),  # index of the source in the recipe
        ("number", pa.int64()),  # of the row in its source, as a person counts
        ("locator", pa.int64()),  # of the row in its source, for `Source.fetch`
    ]
)
Place = Callable[[int], str]  # the number of a row in its source -> `path:line`


class Origin(NamedTuple):
    """Where a row comes from: index of its source in the recipe, its number and its locator there."""

    source: int
    number: int
    locator: int


Encode = Callable[[Sequence[Origin]], list[NDArray[np.int32]]]  # the ids of rows, made again from their sources


@dataclass(frozen=True, eq=False)
class TokenRow:
    """One row: its ids, and the half-open spans of supervised tokens with the weight of each in the loss."""

    ids: NDArray[np.int32]
    span_starts: NDArray[np.int32]
    span_stops: NDArray[np.int32]
    span_weights: NDArray[np.float32]

    def supervised(self) -> NDArray[np.bool_]:
        """The spans as a mask over the tokens."""
        mask = np.zeros(len(self.ids), dtype=np.bool_)
        for start, stop in zip(self.span_starts, self.span_stops, strict=True):
            mask[start:stop] = True
        return mask


class TokenTable:
    """Rows that can be trained on, by index. Labels are not shifted: token i is supervised if it is to be predicted.

    A table may be a view: some of the rows (`chosen`), each cut to its first `max_tokens`, or to those from its entry
    in `starts` on.
    """

    def __init__(
        self,
        table: pa.Table,
        places: Sequence[Place],
        digest: str,
        *,
        encode: Encode | None = None,
        chosen: NDArray[np.int64] | None = None,
        max_tokens: int | None = None,
        starts: NDArray[np.int64] | None = None,
    ) -> None:
        assert (encode is None) == ("input_ids" in table.column_names)
        self._table, self._places, self._digest, self._encode = table, tuple(places), digest, encode
        self._chosen, self._max_tokens, self._starts = chosen, max_tokens, starts
        chunks = table.column("num_tokens").chunks
        self._chunk_starts = [0, *accumulate(len(chunk) for chunk in chunks)]
        names = ("input_ids",) if encode is None else ()
        self._lists = {
            name: [_flat(chunk) for chunk in table.column(name).chunks]
            for name in (*names, "span_starts", "span_stops", "span_weights")
        }

    @classmethod
    def of_rows(cls, rows: Sequence[TokenRow], source: str = "rows.jsonl") -> TokenTable:
        """A table in memory of rows that stand on lines 1, 2, ... of one source."""
        batch = record_batch(
            rows,
            num_chars=[len(row.ids) for row in rows],
            content_hash=range(len(rows)),
            prompt_hash=range(len(rows)),
            source=[0] * len(rows),
            number=range(1, len(rows) + 1),
            locator=range(len(rows)),
        )
        return cls(pa.Table.from_batches([batch]), [lambda number: f"{source}:{number}"], digest_rows(rows).hexdigest())

    def take(
        self, chosen: NDArray[np.int64], max_tokens: int | None = None, starts: NDArray[np.int64] | None = None
    ) -> TokenTable:
        """A view of the rows at these indices, cut where they are longer than `max_tokens`.

        With `starts`, each begins at that token of its row, which is not supervised: nothing stands before it.
        """
        assert self._chosen is None and self._max_tokens is None, "a view of a view"
        digest = hashlib.sha256(f"{self._digest} {max_tokens}".encode())
        for indices in (chosen, starts):
            if indices is not None:
                digest.update(indices.astype("<i8").tobytes())
        return TokenTable(
            self._table,
            self._places,
            digest.hexdigest(),
            encode=self._encode,
            chosen=chosen,
            max_tokens=max_tokens,
            starts=starts,
        )

    def take_pieces(self, chosen: NDArray[np.int64], max_tokens: int) -> TokenTable:
        """A view of the rows at these indices, each as consecutive pieces of at most `max_tokens`.

        A piece after the first begins with the last token of the one before. That token is context there, so every
        token that is supervised in the row is supervised in exactly one piece; a piece holds at least two tokens.
        """
        step = max_tokens - 1
        counts = np.maximum(1, -(-(self.lengths[chosen].astype(np.int64) - 1) // step))
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return self.take(np.repeat(chosen, counts), max_tokens, within * step)

    @property
    def num_rows(self) -> int:
        """Rows in the table."""
        return int(self._table.num_rows) if self._chosen is None else len(self._chosen)

    @cached_property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each row."""
        lengths = self.column("num_tokens")
        if self._starts is not None:
            lengths = lengths - self._starts.astype(np.int32)
        return lengths if self._max_tokens is None else np.minimum(lengths, np.int32(self._max_tokens))

    @cached_property
    def num_supervised(self) -> NDArray[np.int32]:
        """Supervised tokens of each row."""
        counts = self.column("num_supervised").copy()
        for index in np.flatnonzero(self.lengths < self.column("num_tokens")):
            row = self._spans(int(index))
            counts[index] = (row[1] - row[0]).sum()
        return counts

    def column(self, name: str) -> NDArray[Any]:
        """A column of numbers, copied into memory: at most 8 bytes a row."""
        values = self._table.column(name).to_numpy()
        return values if self._chosen is None else values[self._chosen]

    def where(self, index: int) -> str:
        """The row's place, `path:line`."""
        return self.places([index])[0]

    def places(self, indices: Sequence[int]) -> list[str]:
        """The places of rows."""
        return [self._places[origin.source](origin.number) for origin in self.origins(indices)]

    def origins(self, indices: Sequence[int]) -> list[Origin]:
        """Where the rows at these indices come from."""
        at = np.array([self._at(index) for index in indices], dtype=np.int64)
        columns = [self._origins[name][at].tolist() for name in Origin._fields]
        return [Origin(*origin) for origin in zip(*columns, strict=True)]

    @cached_property
    def _origins(self) -> dict[str, NDArray[Any]]:
        return {name: self._table.column(name).to_numpy() for name in Origin._fields}

    def rows(self, indices: Sequence[int]) -> list[TokenRow]:
        """The rows at these indices, as views of the table."""
        if self._encode is None:
            ids = [self._cell("input_ids", self._at(index)) for index in indices]
        else:
            ids = self._encode(self.origins(indices))
        rows = []
        for index, row_ids in zip(indices, ids, strict=True):
            start = self._start(index)
            rows.append(TokenRow(row_ids[start : start + int(self.lengths[index])], *self._spans(index)))
        return rows

    def row(self, index: int) -> TokenRow:
        """One row."""
        return self.rows([index])[0]

    def fingerprint(self) -> str:
        """SHA-256 of what is trained: ids, spans and weights, row by row. Where the files lie does not enter."""
        return self._digest

    def _at(self, index: int) -> int:
        return index if self._chosen is None else int(self._chosen[index])

    def _start(self, index: int) -> int:
        return 0 if self._starts is None else int(self._starts[index])

    def _spans(self, index: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """Starts, stops and weights of a row's spans, as far as they lie in what the view holds of it."""
        at = self._at(index)
        starts, stops, weights = (self._cell(f"span_{name}", at) for name in ("starts", "stops", "weights"))
        begin = self._start(index)
        if not begin and (self._max_tokens is None or not len(stops) or stops[-1] <= self._max_tokens):
            return starts, stops, weights
        low, high = np.int32(begin + 1 if begin else 0), np.int32(begin + self.lengths[index])
        inside = (starts < high) & (stops > low)
        return np.maximum(starts[inside], low) - begin, np.minimum(stops[inside], high) - begin, weights[inside]

    def _cell(self, name: str, at: int) -> NDArray[Any]:
        chunk = bisect_right(self._chunk_starts, at) - 1
        offsets, values = self._lists[name][chunk]
        within = at - self._chunk_starts[chunk]
        return values[offsets[within] : offsets[within + 1]]


def joined(tables: Sequence[TokenTable], encode: Encode | None = None) -> TokenTable:
    """Several whole tables, one after the other, without a copy; the `source` of a row is its table's index."""
    parts, places = [], []
    for index, table in enumerate(tables):
        assert table._chosen is None and len(table._places) == 1
        source = pa.array(np.full(table.num_rows, index, dtype=np.int16))
        at = table._table.schema.get_field_index("source")
        parts.append(table._table.set_column(at, "source", source))
        places.append(table._places[0])
    digest = hashlib.sha256(" ".join(table.fingerprint() for table in tables).encode()).hexdigest()
    return TokenTable(pa.concat_tables(parts), places, digest, encode=encode)


def record_batch(rows: Sequence[TokenRow], *, with_ids: bool = True, **columns: Sequence[int]) -> pa.RecordBatch:
    """Rows with their other columns, for a file of tables."""
    lists: dict[str, list[NDArray[Any]]] = {
        "input_ids": [row.ids for row in rows],
        "span_starts": [row.span_starts for row in rows],
        "span_stops": [row.span_stops for row in rows],
        "span_weights": [row.span_weights for row in rows],
    }
    counts: dict[str, Sequence[int]] = {
        "num_tokens": [len(row.ids) for row in rows],
        "num_supervised": [int((row.span_stops - row.span_starts).sum()) for row in rows],
        **{name: [0] * len(rows) for name in ("num_plain_specials", "num_control_specials", "num_context_turns")},
    }
    schema = SCHEMA if with_ids else SCHEMA.remove(SCHEMA.get_field_index("input_ids"))
    arrays = []
    for field in schema:
        if field.name in lists:
            cells = lists[field.name]
            offsets = np.concatenate([[0], np.cumsum([len(cell) for cell in cells])]).astype(np.int32)
            values = np.concatenate(cells) if cells else np.empty(0)
            arrays.append(pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, type=field.type.value_type)))
        else:
            arrays.append(pa.array((counts | columns)[field.name], type=field.type))
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def digest_rows(rows: Iterable[TokenRow], digest: Any = None) -> Any:
    """A SHA-256 object over ids, spans and weights of the rows, in order; `digest` is one to go on with."""
    digest = digest or hashlib.sha256()
    for row in rows:
        digest.update(struct.pack("<qq", len(row.ids), len(row.span_starts)))
        for values in (row.ids, row.span_starts, row.span_stops, row.span_weights):
            digest.update(values.tobytes())
    return digest


def _flat(chunk: pa.ListArray) -> tuple[NDArray[np.int32], NDArray[Any]]:
    """Offsets and values of a chunk of lists, without a copy."""
    return chunk.offsets.to_numpy(), chunk.values.to_numpy(zero_copy_only=True)
