"""Files that others wrote: held against what they say of themselves, within limits, before any library reads them.

safetensors has no checksum, and transformers and PEFT follow names out of a folder and load what is incomplete
(checked on safetensors 0.8, transformers 5.23, peft 0.21). Nothing here reads a tensor or builds a model.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_train.errors import ModelError, SecurityError

MAX_CONFIG_BYTES = 16 * 2**20  # config.json, adapter_config.json, the index of shards
MAX_HEADER_BYTES = 10 * 2**20  # safetensors' own limit is 100 MB; 100,000 tensors take 10
DTYPE_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
}
_TENSOR_NAME = re.compile(r"[!-~]{1,500}")  # printing ASCII without spaces
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz")
# What a file starts with that would be unpickled: pickle protocols 2 to 5; torch.save's zip; numpy's own two.
_PICKLE_STARTS = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04", b"\x93NUMPY")


@dataclass(frozen=True)
class TensorEntry:
    """What the header of a safetensors file says of a tensor."""

    dtype: str  # safetensors' own code: F32, BF16, ...
    shape: tuple[int, ...]


def read_json_object(path: Path, *, max_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """The JSON object that a regular file holds. ModelError where there is none, or more than `max_bytes`."""
    try:
        _refuse_irregular(path)
        if (size := path.stat().st_size) > max_bytes:
            raise ModelError(f"{path} is {size:,} bytes long; the limit is {max_bytes:,}", fix="restore the file")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path.parent} holds no {path.name}", fix="name a folder that holds one") from None
    except (OSError, ValueError, RecursionError) as error:
        what = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ModelError(f"{path} is no readable {path.name}: {what}", fix="restore the file") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds no JSON object", fix="restore the file")
    return value


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file by name, from its header. ModelError where header and file do not agree.

    The format (huggingface/safetensors, README, "Format"): 8 bytes of little-endian header length, a JSON header, then
    the data of all tensors without a gap. Each name must stand there once, in printing characters, with a known dtype,
    a shape, and offsets that follow on the tensor before it; the last one must end where the file ends.
    Cost: reads the header, no data.
    """
    try:
        _refuse_irregular(path)
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise _damaged(path, f"cut short: it is {size:,} bytes long, and its header alone is {length:,}")
            if length > MAX_HEADER_BYTES:
                raise _damaged(path, f"not usable: its header has {length:,} bytes; the limit is {MAX_HEADER_BYTES:,}")
            header = json.loads(file.read(length), object_pairs_hook=_unique)
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, f"not readable: {error}") from None
    if not isinstance(header, dict):
        raise _damaged(path, "not usable: its header is no JSON object")
    header.pop("__metadata__", None)
    spans = sorted((_span(path, name, entry), name) for name, entry in header.items())
    end = 0
    for (start, stop), name in spans:
        if start != end:
            raise _damaged(path, f"not usable: {name} starts at byte {start:,} of the data, not at {end:,}")
        end = stop
    if end != size - 8 - length:
        kind = "cut short" if end > size - 8 - length else "not usable"
        raise _damaged(path, f"{kind}: {size:,} bytes, where its header asks for {8 + length + end:,}")
    return {name: TensorEntry(entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}


def refuse_pickles(files: Iterable[Path], what: str) -> None:
    """SecurityError for the first file that is a pickle by its name or its first bytes. No more of it is read."""
    for path in files:
        if path.suffix.lower() in PICKLE_SUFFIXES or _first_bytes(path).startswith(_PICKLE_STARTS):
            raise SecurityError(
                f"{what} holds {path.name}, a pickle: loading one can run any code",
                fix="remove it; weights are read from safetensors only (convert them in a place you trust)",
            )


def refuse_links_out(folder: Path, files: Iterable[Path] | None = None) -> None:
    """SecurityError for a link among files of a folder that leads out of it; default: all, in its own folders too.

    The hub client's own cache is a folder of links: `snapshots/COMMIT/FILE` may point to `blobs/` beside `snapshots/`.
    """
    root = folder.resolve()
    roots = [root]
    if "snapshots" in (root.parent.name, root.parent.parent.name):
        snapshots = root.parent if root.parent.name == "snapshots" else root.parent.parent
        roots.append(snapshots.parent / "blobs")
    for path in sorted([*folder.glob("*"), *folder.glob("*/*")] if files is None else files):
        if not path.is_symlink():
            continue
        target = Path(os.path.realpath(path))  # unlike Path.resolve, no exception for links in a circle
        if not any(target.is_relative_to(known) for known in roots):
            raise SecurityError(
                f"{path} is a link to {target}, outside of {folder}",
                fix="put the file itself there, if you trust where it comes from",
            )


def inside(folder: Path, name: object) -> Path:
    """The file of a folder that a file of it names. SecurityError for anything but a plain name."""
    if not isinstance(name, str) or name in ("", ".", "..") or Path(name).name != name or "\\" in name or "\0" in name:
        raise SecurityError(
            f"{folder} names {name!r} as a file of its own, which is outside of it", fix="download the folder again"
        )
    return folder / name


def _refuse_irregular(path: Path) -> None:
    """A pipe would block whoever opens it, a device may never end."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ModelError(f"{path} is no regular file", fix="put the file itself there")


def _first_bytes(path: Path) -> bytes:
    """The first eight bytes of a regular file; none of anything else, and of what cannot be read."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return b""
        with path.open("rb") as file:
            return file.read(8)
    except OSError:
        return b""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose names are all different; the default would keep the last of two."""
    values = dict(pairs)
    if len(values) != len(pairs):
        (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"its header holds {twice[:100]!r} twice")
    return values


def _span(path: Path, name: str, entry: Any) -> tuple[int, int]:
    """First byte and end of a tensor's data; ModelError for an entry that makes no sense."""
    if not _TENSOR_NAME.fullmatch(name):
        raise _damaged(path, f"not usable: the tensor name {name[:100]!r} is not plain text")
    if not isinstance(entry, dict) or str(entry.get("dtype")) not in DTYPE_BITS:
        kind = entry.get("dtype") if isinstance(entry, dict) else entry
        raise _damaged(path, f"not usable: {name} has the dtype {str(kind)[:40]!r}, which is unknown")
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        raise _damaged(path, f"not usable: {name} has no shape or no place in the file")
    num_bytes, rest = divmod(math.prod(shape) * DTYPE_BITS[entry["dtype"]], 8)
    if rest or offsets[1] - offsets[0] != num_bytes:
        what = (
            f"{name} of {entry['dtype']} {tuple(shape)} takes {num_bytes:,} bytes, and has {offsets[1] - offsets[0]:,}"
        )
        raise _damaged(path, f"not usable: {what}")
    return offsets[0], offsets[1]


def _counts(values: object) -> bool:
    """Whether it is a short list of whole numbers from 0 on that a file can hold."""
    return (
        isinstance(values, list)
        and len(values) <= 16
        and all(type(value) is int and 0 <= value < 2**48 for value in values)
    )


def _damaged(path: Path, what: str) -> ModelError:
    return ModelError(f"{path} is {what}", fix="download or copy the file again")
