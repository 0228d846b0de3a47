"""Reading one tensor, or some of its rows, of a safetensors file into memory of its own, and nothing beside it.

safetensors maps the file: its pages count as resident memory as long as a tensor of it lives, and they are read when a
value is first looked at, in whatever runs then.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from torch import Tensor

_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}


def read_tensor(path: Path, name: str) -> Tensor:
    """A whole tensor. The file's header has been checked by then (`untrusted.read_header`)."""
    return _read(path, name, None)


def read_rows(path: Path, name: str, start: int, stop: int) -> Tensor:
    """Rows `start` to `stop` of a tensor."""
    return _read(path, name, (start, stop))


def _read(path: Path, name: str, rows: tuple[int, int] | None) -> Tensor:
    with path.open("rb", buffering=0) as file:
        length = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(length))[name]
        dtype, shape = _DTYPES[entry["dtype"]], list(entry["shape"])
        offset = 8 + length + entry["data_offsets"][0]
        if rows is not None:
            offset += rows[0] * math.prod(shape[1:]) * dtype.itemsize
            shape[0] = rows[1] - rows[0]
        tensor = torch.empty(shape, dtype=dtype)
        view = tensor.reshape(-1).view(torch.uint8).numpy().data
        file.seek(offset)
        while view and (count := file.readinto(view)):  # one call reads at most 2 GiB
            view = view[count:]
        if view:
            raise EOFError(f"{path} ends within {name}")
    return tensor
