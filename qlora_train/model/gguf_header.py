"""A GGUF file's header, held against the file: counts, lengths and places, before the libraries that trust them."""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from qlora_train.errors import ModelError

MAX_HEADER_BYTES = 512 * 2**20  # vocabularies of 250,000 tokens with their merges take 30 MB
MAX_KEYS, MAX_TENSORS, MAX_DIMENSIONS = 10_000, 1_000_000, 4
MAX_NAME_BYTES = 2**16  # GGUF's own limit for keys
_SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9


class _Cursor:
    """A place in the header that never leaves the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path, self._data, self.at = path, data, 0

    def number(self, pattern: str) -> int:
        """The next little-endian number."""
        size = struct.calcsize(pattern)
        start = self._advance(size)
        return int(struct.unpack_from(f"<{pattern}", self._data, start)[0])

    def text(self, most: int) -> bytes:
        """The next string, which has at most so many bytes."""
        length = self.number("Q")
        if length > most:
            raise _refused(self._path, f"a string of {length:,} bytes at byte {self.at:,}; the limit is {most:,}")
        start = self._advance(length)
        return self._data[start : start + length]

    def skip_strings(self, count: int) -> None:
        """Pass over strings; their lengths are looked at, not their bytes."""
        for _ in range(count):
            self._advance(self.number("Q"))

    def skip(self, num_bytes: int) -> None:
        """Pass over bytes."""
        self._advance(num_bytes)

    def _advance(self, num_bytes: int) -> int:
        start = self.at
        if num_bytes > min(len(self._data), MAX_HEADER_BYTES) - start:
            raise _refused(
                self._path, f"its header asks for {num_bytes:,} bytes at byte {start:,}, which are not there"
            )
        self.at = start + num_bytes
        return start


def _refused(path: Path, what: str) -> ModelError:
    return ModelError(f"{path} could not be read as GGUF: {what}", fix="download the file again, or use another one")


def check_gguf(path: Path) -> None:
    """ModelError unless every count, length and place in the header of a GGUF file is possible in a file of its size.

    The format: ggml, docs/gguf.md (versions 2 and 3, little-endian): magic, version, numbers of tensors and of keys;
    keys with their values; names, shapes, types and places of the tensors; then, aligned, their data.
    Cost: reads the header, no data.
    """
    if path.stat().st_size < 24:
        raise _refused(path, "it is shorter than any GGUF file")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        cursor = _Cursor(path, data)
        if data[:4] != b"GGUF":
            raise _refused(path, "it does not start with GGUF")
        cursor.skip(4)
        if (version := cursor.number("I")) not in (2, 3):
            raise _refused(path, f"its version is {version}; versions 2 and 3 are known")
        num_tensors, num_keys = cursor.number("Q"), cursor.number("Q")
        if num_keys > MAX_KEYS or num_tensors > MAX_TENSORS:
            raise _refused(path, f"it has {num_keys:,} keys and {num_tensors:,} tensors, more than any model")
        alignment = _check_keys(path, cursor, num_keys)
        places = _tensor_places(path, cursor, num_tensors)
        start = cursor.at + -cursor.at % alignment
        _check_places(path, places, alignment, len(data) - start)


def _check_keys(path: Path, cursor: _Cursor, count: int) -> int:
    """Walk over the keys; the alignment of the data."""
    alignment = 32
    for _ in range(count):
        key, kind = cursor.text(MAX_NAME_BYTES), cursor.number("I")
        if key == b"general.alignment" and kind == 4:
            alignment = cursor.number("I")
        else:
            _skip_value(path, cursor, kind)
    if alignment not in (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096):
        raise _refused(path, f"its alignment is {alignment}")
    return alignment


def _skip_value(path: Path, cursor: _Cursor, kind: int) -> None:
    if kind == _STRING:
        cursor.skip_strings(1)
        return
    count = 1
    if kind == _ARRAY:
        kind, count = cursor.number("I"), cursor.number("Q")
    if kind == _STRING:
        cursor.skip_strings(count)
    elif kind in _SCALAR_BYTES:
        cursor.skip(count * _SCALAR_BYTES[kind])
    else:
        raise _refused(path, f"a value of type {kind} at byte {cursor.at:,}, which is unknown or nested")


def _tensor_places(path: Path, cursor: _Cursor, count: int) -> list[tuple[int, int, bytes]]:
    """First byte in the data, number of bytes, and name of each tensor."""
    places, names = [], set()
    for _ in range(count):
        name, num_dimensions = cursor.text(MAX_NAME_BYTES), cursor.number("I")
        if num_dimensions > MAX_DIMENSIONS or name in names:
            what = "is there twice" if name in names else f"has {num_dimensions:,} dimensions"
            raise _refused(path, f"the tensor {_shown(name)} {what}")
        names.add(name)
        shape = [cursor.number("Q") for _ in range(num_dimensions)]
        kind, start = cursor.number("I"), cursor.number("Q")
        try:
            block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except (ValueError, KeyError):
            raise _refused(path, f"the tensor {_shown(name)} is of type {kind}, which is unknown") from None
        if shape and shape[0] % block:
            raise _refused(path, f"the tensor {_shown(name)} has rows of {shape[0]:,}, no multiple of {block}")
        places.append((start, math.prod(shape) // block * block_bytes, name))
    return places


def _check_places(path: Path, places: list[tuple[int, int, bytes]], alignment: int, num_bytes: int) -> None:
    """Tensors follow each other without overlap, each within the file."""
    end = 0
    for start, length, name in sorted(places):
        if start % alignment or start < end or start + length > num_bytes:
            what = f"bytes {start:,} to {start + length:,} of {num_bytes:,}, after one that ends at {end:,}"
            raise _refused(path, f"the tensor {_shown(name)} lies at {what}")
        end = start + length


def _shown(name: bytes) -> str:
    return repr(name[:80].decode("utf-8", "replace"))
