"""JSONL files line by line: every line is an object, or a fault with its place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qlora_train.data.problems import RowFault
from qlora_train.data.sources.base import Columns, OnFault, RawRow
from qlora_train.data.sources.decode import MAX_ROW_BYTES, decode_line, too_long
from qlora_train.data.sources.files import TextFile, gone, no_rows

BOM = b"\xef\xbb\xbf"
SKIP_BYTES = 2**20  # at a time, to the end of a line that is too long
_HEAD_BYTES = 1000  # of a line too long to be listed whole


class JsonlSource(TextFile):
    """A file with an object on each line; blank lines are passed over."""

    kind = "jsonl"

    def read(self, on_fault: OnFault) -> Iterator[RawRow]:
        any_row = False
        for number, offset, raw, num_bytes in self._lines():
            if num_bytes > MAX_ROW_BYTES:
                on_fault(number, too_long(num_bytes), raw.decode(errors="replace") + "...", num_bytes)
            elif raw.isspace():
                continue
            else:
                try:
                    columns = decode_line(raw, offset)
                except RowFault as fault:
                    on_fault(number, fault, raw.decode(errors="replace").rstrip("\r\n"), num_bytes)
                else:
                    yield RawRow(number, offset, columns)
            any_row = True
        if not any_row:
            raise no_rows()

    def fetch(self, locators: Sequence[int]) -> list[Columns]:
        raws = []
        with self._file.opened() as file:
            for offset in locators:
                file.seek(offset)
                raws.append(file.readline(MAX_ROW_BYTES))
        return [_fetched(raw, offset) for raw, offset in zip(raws, locators, strict=True)]

    def _lines(self) -> Iterator[tuple[int, int, bytes, int]]:
        """Number, byte offset, bytes and length of each line; of one that is too long, only the first bytes."""
        with self._file.opened() as file:
            number, offset = 0, len(BOM) if file.read(len(BOM)) == BOM else 0
            file.seek(offset)
            while raw := file.readline(MAX_ROW_BYTES + 1):
                number, num_bytes = number + 1, len(raw)
                if num_bytes > MAX_ROW_BYTES:
                    chunk, raw = raw, raw[:_HEAD_BYTES]
                    while chunk and not chunk.endswith(b"\n"):
                        chunk = file.readline(SKIP_BYTES)
                        num_bytes += len(chunk)
                yield number, offset, raw, num_bytes
                offset += num_bytes


def _fetched(raw: bytes, offset: int) -> Columns:
    try:
        return decode_line(raw, offset)
    except RowFault:
        raise gone(offset) from None
