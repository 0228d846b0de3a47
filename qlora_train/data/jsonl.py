"""JSONL files to objects, line by line, with nothing guessed: every line is an object, or a problem with its place."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import BinaryIO, NoReturn

from qlora_train.data.problems import ProblemList, RowFault
from qlora_train.errors import MachineError

SUFFIXES = (".jsonl", ".ndjson", ".json")
MAX_LINE_BYTES = 16 * 2**20  # a line is held in memory several times over while it is read, rendered and tokenised
_BOM = b"\xef\xbb\xbf"
_SIGNATURES = {
    b"\xff\xfe": ("is UTF-16 or UTF-32 text", "re-encode it: iconv -f UTF-16 -t UTF-8 FILE"),
    b"\xfe\xff": ("is UTF-16 text", "re-encode it: iconv -f UTF-16 -t UTF-8 FILE"),
    b"\x1f\x8b": ("is compressed with gzip", "unpack it: gunzip FILE"),
    b"\x28\xb5\x2f\xfd": ("is compressed with zstd", "unpack it: unzstd FILE"),
    b"PK\x03\x04": ("is a zip archive", "unpack it: unzip FILE"),
    b"PAR1": ("is a Parquet file", "convert it to JSONL, one object per line"),
    b"ARROW1": ("is an Arrow file", "convert it to JSONL, one object per line"),
}
_JSON_NAMES = {str: "text", bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}


@dataclass(frozen=True)
class _Line:
    number: int  # 1-based
    offset: int  # of its first byte in the file
    num_bytes: int
    raw: bytes | None  # None: longer than MAX_LINE_BYTES

    @property
    def ended(self) -> bool:
        return self.raw is None or self.raw.endswith(b"\n")


def json_name(value: object) -> str:
    """The JSON word for a value's type, for messages."""
    return "null" if value is None else _JSON_NAMES[type(value)]


def text_value(value: object, name: str) -> str:
    """`value` as text that a tokenizer accepts, or RowFault."""
    if not isinstance(value, str):
        raise RowFault(f"{name} is {json_name(value)}; expected text", "put the value in quotes, or leave the row out")
    if "\0" in value:
        raise RowFault(f"{name} holds a NUL character at {value.index(chr(0))}", "remove it")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        unit = f"\\u{ord(value[error.start]):04x}"
        fix = f"write the whole pair, or \\ufffd in place of {unit}"
        raise RowFault(f"{name} holds half of a surrogate pair, {unit}, at character {error.start}", fix) from None
    return value


def read_objects(path: Path, problems: ProblemList) -> Iterator[tuple[str, dict[str, object]]]:
    """Each line's place (`path:line`) and object. What is wrong goes to `problems`; MachineError if reading fails."""
    try:
        if (fault := _file_fault(path)) is not None:
            problems.add(*fault, str(path))
            return
        with path.open("rb") as file:
            if (fault := _content_fault(file)) is not None:
                problems.add(*fault, str(path))
                return
            for line in _lines(file):
                if line.raw is not None and not line.raw.strip():
                    continue
                where = f"{path}:{line.number}"
                try:
                    yield where, _object(line)
                except RowFault as row_fault:
                    problems.add(row_fault.what, row_fault.fix, where)
    except OSError as error:
        fix = "give this user the right to read it" if isinstance(error, PermissionError) else "check the path and disk"
        raise MachineError(f"cannot be read: {error.strerror or error}", fix=fix, where=str(path)) from error


def _file_fault(path: Path) -> tuple[str, str] | None:
    """What keeps a path from being a file of rows, and the fix, told without reading it."""
    if not path.exists():
        names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        near = get_close_matches(path.name, names, n=1)
        return "there is no such file", f"did you mean {path.parent / near[0]}?" if near else "check the path"
    if path.is_dir():
        found = sorted(entry.name for entry in path.iterdir() if entry.suffix in SUFFIXES)
        return "is a directory", f"name a file in it, such as {path / found[0]}" if found else "name a JSONL file"
    if not path.is_file():
        return "is not a regular file", "write the rows to a file: they are read more than once"
    if path.suffix.lower() not in SUFFIXES:
        known = ", ".join(SUFFIXES)
        return f"has the extension {path.suffix!r}, which is not one of {known}", "convert it to JSONL, or rename it"
    return None


def _content_fault(file: BinaryIO) -> tuple[str, str] | None:
    """What the first bytes say against JSONL, and the fix. Leaves the file at its first row."""
    head = file.read(64)
    file.seek(len(_BOM) if head.startswith(_BOM) else 0)
    for signature, fault in _SIGNATURES.items():
        if head.startswith(signature):
            return fault
    if head[:2].count(0) == 1 and head[2:4].count(0) == 1:
        return "is UTF-16 text without a byte-order mark", "re-encode it: iconv -f UTF-16LE -t UTF-8 FILE"
    if head.removeprefix(_BOM).lstrip().startswith(b"["):
        return "holds one JSON list; expected an object on each line", "convert it: jq -c '.[]' FILE > FILE.jsonl"
    return None


def _lines(file: BinaryIO) -> Iterator[_Line]:
    """The lines with their byte offsets; of a giant one only the length is kept."""
    number, offset = 0, file.tell()
    while raw := file.readline(MAX_LINE_BYTES + 1):
        number, num_bytes = number + 1, len(raw)
        giant, chunk = len(raw) > MAX_LINE_BYTES, raw
        while giant and chunk and not chunk.endswith(b"\n"):
            chunk = file.readline(MAX_LINE_BYTES)
            num_bytes += len(chunk)
        yield _Line(number, offset, num_bytes, None if giant else raw)
        offset += num_bytes


def _object(line: _Line) -> dict[str, object]:
    """The object on a line, or RowFault."""
    if line.raw is None:
        limit = f"the limit is {MAX_LINE_BYTES:,}"
        raise RowFault(f"the line is {line.num_bytes:,} bytes long; {limit}", "split the row into shorter ones")
    try:
        text = line.raw.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = f"byte 0x{line.raw[error.start]:02x} at byte offset {line.offset + error.start:,} of the file"
        raise RowFault(f"{byte} is not UTF-8", "re-encode the file: iconv -f ENCODING -t UTF-8 FILE") from None
    try:
        value = _DECODER.decode(text)
    except RecursionError:
        raise RowFault("the JSON is nested too deeply", "flatten the row") from None
    except json.JSONDecodeError as error:
        raise _syntax_fault(line, text, error) from None
    except ValueError as error:  # an integer of thousands of digits
        raise RowFault(f"is not usable JSON: {error}", "mend the value, or put it in quotes") from None
    if not isinstance(value, dict):
        raise RowFault(f"the row is {json_name(value)}; expected an object", 'write the row as {"column": value}')
    return value


def _syntax_fault(line: _Line, text: str, error: json.JSONDecodeError) -> RowFault:
    """The fault of a line that is not JSON, with the place in the file."""
    offset = line.offset + len(text[: error.pos].encode("utf-8"))
    what = f"is not JSON: {error.msg} at column {error.pos + 1}, byte offset {offset:,} of the file"
    if not line.ended and (error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated")):
        return RowFault(f"{what}; the file ends within this row", "copy the file again: it was cut off")
    return RowFault(what, "write one JSON object per line")


def _reject_constant(name: str) -> NoReturn:
    raise RowFault(f"holds {name}, which JSON does not have", "write null or a number")


def _unique_columns(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """The pairs as a dict; a name that stands twice would lose its first value without a word."""
    columns = dict(pairs)
    if len(columns) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RowFault(f"{twice!r} stands twice in one object", "keep one of them")
    return columns


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_columns, parse_constant=_reject_constant)
