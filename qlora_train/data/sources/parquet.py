"""Parquet files, read by row group and never whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from qlora_train.data.sources.columnar import BATCH_ROWS, ColumnarFiles, arrow_errors, holds_wanted
from qlora_train.data.sources.files import system_errors

_BUFFER_BYTES = 2**20  # without one, a column of a row group is read whole


class ParquetSource(ColumnarFiles):
    """One Parquet file, or several that follow one another. `fetch` decodes the row groups it needs, each once."""

    kind = "parquet"

    def _batches(self, wanted: Sequence[int] | None) -> Iterator[tuple[int, pa.RecordBatch]]:
        first = 0
        for file in self._files:
            file.check_unchanged()
            with (
                system_errors(file.path),
                arrow_errors(file.path),
                pq.ParquetFile(file.path, buffer_size=_BUFFER_BYTES, pre_buffer=False) as parquet,
            ):
                for group in range(parquet.num_row_groups):
                    num_rows = parquet.metadata.row_group(group).num_rows
                    if holds_wanted(wanted, first, num_rows):
                        start = first
                        for batch in parquet.iter_batches(BATCH_ROWS, row_groups=[group], use_threads=False):
                            yield start, batch
                            start += batch.num_rows
                    first += num_rows
