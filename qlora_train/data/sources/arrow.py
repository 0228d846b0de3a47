"""Arrow IPC files and streams, memory-mapped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa

from qlora_train.data.sources.columnar import ColumnarFiles, arrow_errors, holds_wanted
from qlora_train.data.sources.files import system_errors

_MAGIC = b"ARROW1"


class ArrowSource(ColumnarFiles):
    """One Arrow file, or several that follow one another."""

    kind = "arrow"

    def _batches(self, wanted: Sequence[int] | None) -> Iterator[tuple[int, pa.RecordBatch]]:
        first = 0
        for file in self._files:
            file.check_unchanged()
            for batch in _batches_of(file.path):
                if holds_wanted(wanted, first, batch.num_rows):
                    with arrow_errors(file.path):
                        batch.validate(full=True)  # or a damaged file could make us read outside its memory
                    yield first, batch
                first += batch.num_rows


def _batches_of(path: Path) -> Iterator[pa.RecordBatch]:
    with system_errors(path), arrow_errors(path):
        if not path.stat().st_size:
            return
        with pa.memory_map(str(path)) as memory:
            if memory.read(len(_MAGIC)) == _MAGIC:
                with pa.ipc.open_file(memory) as reader:
                    for index in range(reader.num_record_batches):
                        yield reader.get_batch(index)
            else:
                memory.seek(0)
                with pa.ipc.open_stream(memory) as stream:
                    yield from stream
