"""Data sets of the Hugging Face hub, through the cache that `datasets` keeps."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from qlora_train.data.problems import SourceFault
from qlora_train.data.sources.columnar import ColumnarSource, arrow_errors, holds_wanted
from qlora_train.data.sources.files import DataFile, digest_of
from qlora_train.errors import first_line


def open_hub(name: str, revision: str | None, subset: str | None, split: str) -> HubSource:
    """The data set, downloaded where it is not in the cache. Code in its repository is never run: see load_dataset."""
    import datasets  # takes seconds, and only this source needs it

    try:
        dataset = datasets.load_dataset(name, name=subset, split=split, revision=revision)
    # Whatever goes wrong between here and a server, in the cache, or in reading foreign files: libraries of four
    # projects raise it, each in its own words.
    except Exception as error:
        fix = "check the name, `subset`, `split` and `revision`, the network and HF_HUB_OFFLINE; or give a local path"
        raise SourceFault(
            f"is no file here, and the hub data set cannot be loaded: {first_line(error)}", fix
        ) from error
    return HubSource(name, dataset, split)


class HubSource(ColumnarSource):
    """One split of a data set, memory-mapped."""

    kind = "hub"

    def __init__(self, name: str, dataset: Any, split: str) -> None:
        super().__init__(name)
        self._table: pa.Table = dataset.data.table
        self._split = split
        self._files = [DataFile(Path(entry["filename"])) for entry in dataset.cache_files]

    def digest(self) -> str:
        """SHA-256 of the cached files, and of the split where it is only a part of them, such as train[:10%]."""
        if not self._files:
            what = "is held in memory by `datasets`, so its rows cannot be told from others"
            raise SourceFault(what, "unset HF_DATASETS_IN_MEMORY_MAX_SIZE, or save the rows as a file and name that")
        digest = digest_of(self._files, with_names=True)
        return hashlib.sha256(f"{digest} {self._split}".encode()).hexdigest() if "[" in self._split else digest

    def _batches(self, wanted: Sequence[int] | None) -> Iterator[tuple[int, pa.RecordBatch]]:
        for file in self._files:
            file.check_unchanged()
        first = 0
        for batch in self._table.to_batches():
            if holds_wanted(wanted, first, batch.num_rows):
                with arrow_errors(self.name):
                    batch.validate(full=True)
                yield first, batch
            first += batch.num_rows
