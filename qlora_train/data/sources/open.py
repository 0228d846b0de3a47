"""What a recipe names, opened as the kind of source that its name and its first bytes say it is."""

from __future__ import annotations

import json
from difflib import get_close_matches
from pathlib import Path
from typing import BinaryIO

from qlora_train.data.problems import SourceFault
from qlora_train.data.sources.arrow import ArrowSource
from qlora_train.data.sources.base import Source
from qlora_train.data.sources.csv_records import CsvSource, delimiter_of
from qlora_train.data.sources.decode import MAX_ROW_BYTES
from qlora_train.data.sources.files import system_errors
from qlora_train.data.sources.folders import open_folder
from qlora_train.data.sources.hub import open_hub
from qlora_train.data.sources.json_list import JsonSource
from qlora_train.data.sources.jsonl import BOM, JsonlSource
from qlora_train.data.sources.parquet import ParquetSource
from qlora_train.recipe.sources import PACKED_SUFFIXES, SUFFIXES, is_hub_id

_TO_UTF8 = "re-encode it: iconv -f UTF-16 -t UTF-8 FILE"
_SIGNATURES = {
    b"\xff\xfe": ("is UTF-16 or UTF-32 text", _TO_UTF8),
    b"\xfe\xff": ("is UTF-16 text", _TO_UTF8),
    b"\x1f\x8b": ("is compressed with gzip", "unpack it: gunzip FILE"),
    b"\x28\xb5\x2f\xfd": ("is compressed with zstd", "unpack it: unzstd FILE"),
    b"PK\x03\x04": ("is a zip archive", "unpack it: unzip FILE"),
    b"PAR1": ("is a Parquet file", "give it the extension .parquet"),
    b"ARROW1": ("is an Arrow file", "give it the extension .arrow"),
}


def open_source(path: str, revision: str | None = None, subset: str | None = None, split: str = "train") -> Source:
    """The source that a path or a hub id names. SourceFault where it names none; MachineError if it cannot be read."""
    local = Path(path)
    with system_errors(local):
        if local.is_dir():
            return open_folder(path, local, split)
        if not local.exists() and is_hub_id(path):
            return open_hub(path, revision, subset, split)
        _check_file(local)
        with local.open("rb") as file:
            return _open_file(path, local, file)


def _check_file(path: Path) -> None:
    """SourceFault unless the path is a file with a name that we know."""
    if not path.exists():
        names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        near = get_close_matches(path.name, names, n=1)
        raise SourceFault(
            "there is no such file", f"did you mean {path.parent / near[0]}?" if near else "check the path"
        )
    if not path.is_file():
        raise SourceFault("is not a regular file", "write the rows to a file: they are read more than once")
    if path.suffix.lower() not in SUFFIXES:
        what = f"has the extension {path.suffix!r}, which is not one of {', '.join(SUFFIXES)}"
        packed = path.suffix.lower() in PACKED_SUFFIXES
        raise SourceFault(what, "unpack it" if packed else "convert it to JSONL, or rename it")


def _open_file(name: str, path: Path, file: BinaryIO) -> Source:
    """The source that a file is, told by its name and its first bytes."""
    suffix = path.suffix.lower()
    head = file.read(64)
    if suffix == ".parquet":
        return ParquetSource(name, [path])
    if suffix == ".arrow":
        return ArrowSource(name, [path])
    for signature, fault in _SIGNATURES.items():
        if head.startswith(signature):
            raise SourceFault(*fault)
    if head[:2].count(0) == 1 and head[2:4].count(0) == 1:
        raise SourceFault("is UTF-16 text without a byte-order mark", "re-encode it: iconv -f UTF-16LE -t UTF-8 FILE")
    if suffix in (".csv", ".tsv"):
        return CsvSource(name, path, "\t" if suffix == ".tsv" else delimiter_of(head + file.readline(MAX_ROW_BYTES)))
    text = head.removeprefix(BOM).lstrip()
    if text.startswith(b"["):
        return JsonSource(name, path)
    if text.startswith(b"{") and suffix == ".json":
        file.seek(0)
        _check_lines(file)
    return JsonlSource(name, path)


def _check_lines(file: BinaryIO) -> None:
    """SourceFault if a .json file holds one object over several lines instead of one on each line."""
    line = b""
    while not line.removeprefix(BOM).strip():
        line = file.readline(MAX_ROW_BYTES)
    text = line.decode(errors="replace").removeprefix("\ufeff").rstrip()
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        if error.pos >= len(text) and line.endswith(b"\n"):
            fix = "write a list of objects, or one object per line: jq -c '.KEY[]' FILE > FILE.jsonl"
            raise SourceFault("holds one JSON object over several lines", fix) from None
    except (ValueError, RecursionError):
        return  # a line that is wrong in itself, which reading it says better
