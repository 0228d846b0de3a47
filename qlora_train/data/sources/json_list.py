"""JSON files that hold one list of objects, read element by element through a window over the file."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import BinaryIO

from qlora_train.data.problems import RowFault, SourceFault
from qlora_train.data.sources.base import Columns, OnFault, RawRow
from qlora_train.data.sources.decode import MAX_ROW_BYTES, as_row, decode_first, is_cut_short, not_utf8, too_long
from qlora_train.data.sources.files import TextFile, gone, no_rows
from qlora_train.data.sources.jsonl import BOM

_CHUNK_BYTES = 2**20
_FETCH_BYTES = 2**16
_LENIENT = json.JSONDecoder()  # finds the end of an element that the strict decoder does not take
_SPACE = " \t\r\n"


class JsonSource(TextFile):
    """A file with one list of objects, however it is laid out.

    An element's place is the line it begins on; its index, as `rows.json[17]`, where all are on one.
    """

    kind = "json"

    def place(self, number: int) -> str:
        return f"{self._path}[{number}]" if self._is_one_line else super().place(number)

    def read(self, on_fault: OnFault) -> Iterator[RawRow]:
        any_row = False
        for index, (line, offset, value, text) in enumerate(self._elements()):
            any_row = True
            number = index if self._is_one_line else line
            try:
                columns = _row(value)
            except RowFault as fault:
                on_fault(number, fault, text, len(text.encode()))
            else:
                yield RawRow(number, offset, columns)
        if not any_row:
            raise no_rows()

    def fetch(self, locators: Sequence[int]) -> list[Columns]:
        with self._file.opened() as file:
            return [_fetched(file, offset) for offset in locators]

    @cached_property
    def _is_one_line(self) -> bool:
        """Whether the whole list stands on one line, which tells no element from another."""
        with self._file.opened() as file:
            begun = False
            while chunk := file.read(_CHUNK_BYTES):
                chunk = chunk if begun else chunk.lstrip()
                begun = begun or bool(chunk)
                _, newline, after = chunk.partition(b"\n")
                if newline:
                    return not (after + file.read(_FETCH_BYTES)).strip()
        return True

    def _elements(self) -> Iterator[tuple[int, int, object, str]]:
        """Line, byte offset, value and text of each element; SourceFault where the list cannot be read on."""
        with self._file.opened() as file:
            window = _Window(file, len(BOM) if file.read(len(BOM)) == BOM else 0, _CHUNK_BYTES)
            if window.next_character() != "[":
                raise SourceFault(f"{window.here()}: no list begins here", _FIX)
            window.move(1)
            mark = window.next_character()
            while mark != "]":
                line, offset = window.line, window.offset
                value, text = window.element()
                yield line, offset, value, text
                mark = window.next_character()
                if mark == ",":
                    window.move(1)
                    window.next_character()
                elif mark != "]":
                    raise window.fault("Expecting ',' or ']'" if mark else "the file ends within the list")
            window.move(1)
            if window.next_character():
                raise window.fault("there is more after the end of the list")


class _Window:
    """The part of the file's text that is being read, and the place of the next character."""

    def __init__(self, file: BinaryIO, offset: int, chunk_bytes: int) -> None:
        file.seek(offset)
        self.line, self.offset = 1, offset
        self._file, self._chunk_bytes = file, chunk_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text, self._at, self._ended = "", 0, False

    def here(self) -> str:
        return f"line {self.line}, byte offset {self.offset:,}"

    def fault(self, what: str) -> SourceFault:
        return SourceFault(f"{self.here()}: is not JSON: {what}", _FIX)

    def move(self, count: int) -> None:
        """Go on by so many characters."""
        passed = self._text[self._at : self._at + count]
        self.line += passed.count("\n")
        self.offset += len(passed.encode())
        self._at += count

    def next_character(self) -> str:
        """The next that is no white space, which is then the place; "" at the end."""
        while True:
            rest = self._at
            while rest < len(self._text) and self._text[rest] in _SPACE:
                rest += 1
            self.move(rest - self._at)
            if self._at < len(self._text):
                return self._text[self._at]
            if self._ended:
                return ""
            self._grow()

    def element(self) -> tuple[object, str]:
        """The value that begins here (RowFault: what is wrong with it), and its text."""
        while True:
            value: object
            try:
                try:
                    value, end = decode_first(self._text, self._at)
                except RowFault as fault:
                    value, end = fault, self._end_of(fault)
            except json.JSONDecodeError as error:
                self._grow_or(error)
                continue
            if end == len(self._text) and not self._ended:  # a number may go on
                self._grow()
                continue
            text = self._text[self._at : end]
            self.move(end - self._at)
            return value, text

    def _end_of(self, fault: RowFault) -> int:
        """Where the faulty value ends that begins here."""
        try:
            return _LENIENT.raw_decode(self._text, self._at)[1]
        except json.JSONDecodeError:
            raise
        except (ValueError, RecursionError):
            raise SourceFault(f"{self.here()}: {fault.what}", fault.fix) from None

    def _grow_or(self, error: json.JSONDecodeError) -> None:
        """Read more, where that may mend the error; else SourceFault at its place."""
        held = len(self._text) - self._at
        if not self._ended and held <= MAX_ROW_BYTES:
            self._grow()
            return
        is_cut = is_cut_short(error, self._text)
        if not self._ended and is_cut:
            fault = too_long(held)
            raise SourceFault(f"{self.here()}: {fault.what}", fault.fix) from None
        self.move(error.pos - self._at)
        if is_cut:
            what = f"{self.here()}: is not JSON: {error.msg}; the file ends within the list"
            raise SourceFault(what, "copy the file again: it was cut off") from None
        raise self.fault(error.msg) from None

    def _grow(self) -> None:
        """Forget what was passed, and read as much again as is held, at least a chunk."""
        self._text, self._at = self._text[self._at :], 0
        pending = len(self._decoder.getstate()[0])
        start = self._file.tell() - pending
        chunk = self._file.read(max(self._chunk_bytes, len(self._text)))
        self._ended = not chunk
        try:
            self._text += self._decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            fault = not_utf8(error, start)
            bad_line = self.line + self._text.count("\n") + error.object[: error.start].count(b"\n")
            raise SourceFault(f"line {bad_line}: {fault.what}", fault.fix) from None


def _row(value: object) -> Columns:
    if isinstance(value, RowFault):
        raise value
    return as_row(value)


def _fetched(file: BinaryIO, offset: int) -> Columns:
    try:
        return _row(_Window(file, offset, _FETCH_BYTES).element()[0])
    except (RowFault, SourceFault):
        raise gone(offset) from None


_FIX = "mend it there, or write one JSON object per line: jq -c '.[]' FILE > FILE.jsonl"
