"""Rows of a table read from their sources again: as they were written, or as tokens where none are kept on disk."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from qlora_train.data.cache import CachedSource
from qlora_train.data.encode import Encoder
from qlora_train.data.formats import parse_row
from qlora_train.data.problems import RowFault, SourceFault
from qlora_train.data.rows import Row
from qlora_train.data.table import Origin, TokenRow
from qlora_train.data.template import Renderer
from qlora_train.errors import DataError


def read_rows(sources: Sequence[CachedSource], origins: Sequence[Origin]) -> list[Row]:
    """Rows as they were written, in the order asked for. DataError where they are not there any more.

    Pieces of one row (`data.overlong: split`) are the same row, which is read once.
    """
    rows: dict[Origin, Row] = {}
    for index, cached in enumerate(sources):
        mine = list(dict.fromkeys(origin for origin in origins if origin.source == index))
        try:
            found = cached.source.fetch([origin.locator for origin in mine]) if mine else []
            for origin, columns in zip(mine, found, strict=True):
                where = cached.source.place(origin.number)
                rows[origin] = parse_row(where, columns, cached.facts.row_format, cached.reading.columns)
        except (SourceFault, RowFault) as fault:
            raise DataError(fault.what, fix=fault.fix, where=cached.source.name) from fault
    return [rows[origin] for origin in origins]


class Reencoder:
    """Makes the tokens of rows anew, for `data.streaming`. Its template's worker lives as long as it does."""

    def __init__(self, sources: Sequence[CachedSource], encoder: Encoder, loss_on: str) -> None:
        self._sources, self._encoder = sources, encoder
        self._renderer = Renderer(encoder.tokenizer, loss_on)

    def __call__(self, origins: Sequence[Origin]) -> list[NDArray[np.int32]]:
        """The ids of each row."""
        rows = read_rows(self._sources, origins)
        rendered = next(iter(self._renderer.render([rows])))
        encoded = iter(self._encoder.encode([entry for entry in rendered if not isinstance(entry, RowFault)]))
        ids = []
        for row, entry in zip(rows, rendered, strict=True):
            tokens = entry if isinstance(entry, RowFault) else next(encoded)
            if not isinstance(tokens, TokenRow):
                raise DataError(f"the row is not what it was: {tokens.what}", fix="start a new run", where=row.where)
            ids.append(tokens.ids)
        return ids
