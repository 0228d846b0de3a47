"""Rows of Arrow record batches as plain JSON values, and what every source that has such batches does alike."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa

from qlora_train.data.problems import RowFault, SourceFault
from qlora_train.data.sources.base import Columns, OnFault, RawRow
from qlora_train.data.sources.decode import decode_text
from qlora_train.data.sources.files import DataFile, digest_of, gone, no_rows
from qlora_train.data.values import NotJson
from qlora_train.errors import first_line

BATCH_ROWS = 1000  # converted to Python values at a time
_Mend = Callable[[object], object]


class ColumnarSource(ABC):
    """A source whose rows have numbers instead of lines."""

    kind: str

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def digest(self) -> str:
        """SHA-256 of the content."""

    @abstractmethod
    def _batches(self, wanted: Sequence[int] | None) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Batches, each with its first row's index, in order; where rows are `wanted` (sorted), maybe only theirs."""

    def place(self, number: int) -> str:
        return f"{self.name}: row {number}"

    def read(self, on_fault: OnFault) -> Iterator[RawRow]:
        number = 0
        for _, batch in self._batches(None):
            for start in range(0, batch.num_rows, BATCH_ROWS):
                for columns in plain_rows(batch.slice(start, BATCH_ROWS)):
                    number += 1
                    yield RawRow(number, number - 1, columns)
        if not number:
            raise no_rows()

    def fetch(self, locators: Sequence[int]) -> list[Columns]:
        wanted = sorted(set(locators))
        rows: dict[int, Columns] = {}
        for first, batch in self._batches(wanted):
            for index in wanted[bisect_left(wanted, first) : bisect_left(wanted, first + batch.num_rows)]:
                (rows[index],) = plain_rows(batch.slice(index - first, 1))
            if len(rows) == len(wanted):
                break
        if missing := [index for index in wanted if index not in rows]:
            raise gone(missing[0])
        return [rows[index] for index in locators]


def holds_wanted(wanted: Sequence[int] | None, first: int, num_rows: int) -> bool:
    """Whether any wanted row is among these; all are wanted where none is named."""
    return wanted is None or bisect_left(wanted, first) < bisect_left(wanted, first + num_rows)


@contextmanager
def arrow_errors(path: Path | str) -> Iterator[None]:
    """What pyarrow finds wrong with a file, as SourceFault with the file's name."""
    try:
        yield
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        what = f"{Path(path).name} is damaged, or no such file as its name says: {first_line(error)}"
        raise SourceFault(what, "copy the file again, or write it again") from None


def plain_rows(batch: pa.RecordBatch) -> list[Columns]:
    """The rows as dicts. A value that JSON has no type for becomes NotJson, which is a fault only if it is read."""
    try:
        return _plain_rows(batch)
    except UnicodeDecodeError:
        raise SourceFault("the name of a column or field is not UTF-8", "rename it") from None


def _plain_rows(batch: pa.RecordBatch) -> list[Columns]:
    names = batch.schema.names
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise SourceFault(f"has two columns named {twice!r}", "rename one of them")
    if not names:
        return [{} for _ in range(batch.num_rows)]
    cells = [_plain_values(column) for column in batch.columns]
    return [dict(zip(names, row, strict=True)) for row in zip(*cells, strict=True)]


def _plain_values(array: pa.Array) -> list[object]:
    """One column's values."""
    if not _is_plain(array.type):
        return [NotJson(str(array.type)) if valid else None for valid in array.is_valid().to_pylist()]
    try:
        values: list[object] = array.to_pylist()
    except (ValueError, OverflowError):  # text that is not UTF-8, or a date inside a struct that Python cannot hold
        values = [_value(cell) for cell in array]
    mend = _mend(array.type) if _needs_mending(array) else None
    return [mend(value) for value in values] if mend else values


def _value(cell: pa.Scalar) -> object:
    try:
        return cell.as_py()
    except UnicodeDecodeError:
        return NotJson(f"{cell.type} that is not UTF-8")
    except (ValueError, OverflowError):
        return NotJson(str(cell.type))


def _is_plain(kind: pa.DataType) -> bool:
    """Whether JSON has the type, as far as can be told without looking into structs."""
    if pa.types.is_dictionary(kind):
        return _is_plain(kind.value_type)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _is_plain(kind.value_type)
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
    other = pa.types.is_boolean(kind) or pa.types.is_null(kind) or pa.types.is_struct(kind)
    return text or number or other or isinstance(kind, pa.JsonType)


def _needs_mending(array: pa.Array) -> bool:
    """Whether a struct inside has a null, or JSON stands inside as text."""
    if isinstance(array.type, pa.JsonType):
        return True
    if pa.types.is_struct(array.type):
        fields = [array.field(index) for index in range(array.type.num_fields)]
        return any(field.null_count or _needs_mending(field) for field in fields)
    return hasattr(array, "values") and _needs_mending(array.values)


def _mend(kind: pa.DataType) -> _Mend | None:
    """What makes Python values of this type plain: Arrow fills absent fields of structs with null; that is undone."""
    if isinstance(kind, pa.JsonType):
        return _from_json
    if pa.types.is_struct(kind):
        fields = {field.name: _mend(field.type) for field in kind}

        def mend_struct(value: object) -> object:
            if not isinstance(value, dict):
                return value
            present = ((name, inner, fields[name]) for name, inner in value.items() if inner is not None)
            return {name: mend(inner) if mend else inner for name, inner, mend in present}

        return mend_struct
    if hasattr(kind, "value_type") and (mend := _mend(kind.value_type)):
        return lambda value: [mend(inner) for inner in value] if isinstance(value, list) else value
    return None


def _from_json(value: object) -> object:
    """What a cell of Arrow's JSON type, as `datasets` writes for lists of mixed types, holds."""
    try:
        return decode_text(value) if isinstance(value, str) else value
    except RowFault as fault:
        return NotJson(f"JSON, but {fault.what}")


class ColumnarFiles(ColumnarSource):
    """One file, or several of a kind that follow one another."""

    def __init__(self, name: str, paths: Sequence[Path], in_folder: bool = False) -> None:
        super().__init__(name)
        self._files = [DataFile(path) for path in paths]
        self._in_folder = in_folder

    def digest(self) -> str:
        return digest_of(self._files, with_names=self._in_folder)
