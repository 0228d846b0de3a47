"""CSV and TSV files: a header, and records whose cells are text, or null where they are empty."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from qlora_train.data.problems import RowFault, SourceFault
from qlora_train.data.sources.base import Columns, OnFault, RawRow
from qlora_train.data.sources.decode import MAX_ROW_BYTES, not_utf8, too_long
from qlora_train.data.sources.files import TextFile, gone, no_rows
from qlora_train.data.sources.jsonl import BOM, SKIP_BYTES

_Record = tuple[int, int, list[str] | RowFault, str, int]  # first line's number and byte offset, cells, text, bytes
_QUOTED = re.compile(r'"[^"]*+(?:""[^"]*+)*+"')


def delimiter_of(header: bytes) -> str:
    """A comma, unless the header holds none and one of the other marks between cells."""
    line = header.removeprefix(BOM).partition(b"\n")[0].decode(errors="replace")
    counts = {mark: line.count(mark) for mark in ",;\t|"}
    return "," if counts[","] or not any(counts.values()) else max(counts, key=counts.__getitem__)


class CsvSource(TextFile):
    """A file whose first record names the columns. A record's place is the line it begins on."""

    def __init__(self, name: str, path: Path, delimiter: str) -> None:
        super().__init__(name, path)
        self.kind, self._delimiter = f"csv:{delimiter}", delimiter
        self._header: list[str] = []

    def read(self, on_fault: OnFault) -> Iterator[RawRow]:
        records = self._records()
        self._header = _checked_header(next(records, None))
        any_row = False
        for line, offset, cells, text, num_bytes in records:
            any_row = True
            if isinstance(cells, RowFault):
                on_fault(line, cells, text, num_bytes)
            elif len(cells) != len(self._header):
                what = f"has {len(cells)} cells, but the header names {len(self._header)} columns"
                mark = "a comma" if self._delimiter == "," else repr(self._delimiter)
                fix = f"put cells that hold {mark} or a line break in double quotes"
                on_fault(line, RowFault(what, fix), text, num_bytes)
            else:
                yield RawRow(line, offset, self._columns(cells))
        if not any_row:
            raise no_rows()

    def fetch(self, locators: Sequence[int]) -> list[Columns]:
        if not self._header:
            self._header = _checked_header(next(self._records(), None))
        rows = []
        for offset in locators:
            record = next(self._records(offset), None)
            if record is None or isinstance(record[2], RowFault) or len(record[2]) != len(self._header):
                raise gone(offset)
            rows.append(self._columns(record[2]))
        return rows

    def _columns(self, cells: list[str]) -> Columns:
        return {name: cell or None for name, cell in zip(self._header, cells, strict=True)}

    def _records(self, offset: int = 0) -> Iterator[_Record]:
        """The records from this byte on, blank lines left out.

        SourceFault where a quote is not closed in its record: what follows it may be any number of rows.
        """
        csv.field_size_limit(MAX_ROW_BYTES)  # of the whole process: the module knows no other
        with self._file.opened() as file:
            if offset == 0 and file.read(len(BOM)) == BOM:
                offset = len(BOM)
            lines = _Lines(file, offset)
            reader = csv.reader(lines, delimiter=self._delimiter, strict=True)
            while True:
                number, start = lines.number + 1, lines.offset
                lines.begin_record()
                try:
                    cells: list[str] | RowFault = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    cells = RowFault(f"is not CSV: {error}", _FIX)
                except RowFault as fault:
                    cells = fault
                text = "".join(lines.record)
                if isinstance(cells, RowFault) and (lines.number > number or lines.in_quotes):
                    line = number + text.count("\n", 0, _wrong_quote(text, self._delimiter))
                    what = f"line {line}: a quote opens here, and where its cell ends cannot be told"
                    raise SourceFault(f"{what}: {cells.what}", _FIX)
                if cells:
                    yield number, start, lines.fault or cells, text.rstrip("\r\n"), lines.offset - start


class _Lines:
    """Lines as text for csv.reader, with their number and byte offset. Bytes that are no text fail the record."""

    def __init__(self, file: BinaryIO, offset: int) -> None:
        file.seek(offset)
        self._file = file
        self.number, self.offset = 0, offset
        self.in_quotes = False  # at the end of the file, or of a line that is too long, should the record fail there
        self.begin_record()

    def begin_record(self) -> None:
        self.record: list[str] = []
        self.fault: RowFault | None = None
        self._start = self.offset

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        raw = self._file.readline(MAX_ROW_BYTES + 1)
        if not raw:
            self.in_quotes = True  # or csv.reader would find nothing amiss
            raise StopIteration
        begin = self.offset
        self.number, self.offset = self.number + 1, begin + len(raw)
        chunk, num_quotes = raw, raw.count(b'"')
        while len(raw) > MAX_ROW_BYTES and chunk and not chunk.endswith(b"\n"):
            chunk = self._file.readline(SKIP_BYTES)
            self.offset += len(chunk)
            num_quotes += chunk.count(b'"')
        if self.offset - self._start > MAX_ROW_BYTES:
            self.in_quotes = num_quotes % 2 == 1
            raise too_long(self.offset - self._start)  # csv.reader begins anew at the next line
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            # csv.reader must see the rest of the record, or it would begin the next one amid this one's quotes.
            text, self.fault = raw.decode(errors="replace"), self.fault or not_utf8(error, begin)
        self.record.append(text)
        return text


def _checked_header(record: _Record | None) -> list[str]:
    """The names of the columns, or SourceFault."""
    if record is None:
        raise no_rows()
    line, _, cells, _, _ = record
    if isinstance(cells, RowFault):
        raise SourceFault(f"the header, line {line}: {cells.what}", cells.fix)
    if "" in cells:
        fix = "name every column; pandas writes a nameless one unless told index=False"
        raise SourceFault(f"the header names no column {cells.index('') + 1}", fix)
    if twice := [name for name, count in Counter(cells).items() if count > 1]:
        raise SourceFault(f"the header names the column {twice[0]!r} twice", "rename one of them")
    return cells


def _wrong_quote(text: str, delimiter: str) -> int:
    """Where the quoted cell of a record begins that does not end as it should; 0 where there is none."""
    at = 0
    while True:
        if text.startswith('"', at):
            cell = _QUOTED.match(text, at)
            if not cell or not text.startswith(delimiter, cell.end()):
                return at
            at = cell.end()
        at = text.find(delimiter, at) + 1
        if not at:
            return 0


_FIX = 'put cells that hold quotes in double quotes, with each quote inside doubled: "say ""so"""'
