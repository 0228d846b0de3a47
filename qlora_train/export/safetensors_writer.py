"""Sharded safetensors as a stream: the header first, from shapes known beforehand, then one tensor at a time."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qlora_train.artifacts.files import explained

_DTYPE_CODES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


@dataclass(frozen=True)
class Planned:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes on disk."""
        return math.prod(self.shape) * self.dtype.itemsize


def plan_shards(tensors: list[Planned], shard_bytes: int) -> list[list[Planned]]:
    """Cut a list into shards of at most `shard_bytes`, in order; a tensor larger than that has one of its own."""
    shards: list[list[Planned]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.num_bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.num_bytes
    return shards


def shard_names(count: int) -> list[str]:
    """File names as transformers knows them."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def write_shards(folder: Path, shards: list[list[Planned]], produce: Callable[[str], Tensor]) -> list[Path]:
    """Write every shard, asking `produce(name)` for one tensor at a time; an index file where there are several.

    Memory: one tensor. Raises as `write_shard` does.
    """
    names = shard_names(len(shards))
    for name, shard in zip(names, shards, strict=True):
        write_shard(folder / name, shard, produce)
    write_index(folder, shards)
    return [folder / name for name in names]


def write_index(folder: Path, shards: list[list[Planned]]) -> None:
    """The file that says which shard holds which tensor; none where there is one shard."""
    if len(shards) == 1:
        return
    names = shard_names(len(shards))
    weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    total = sum(tensor.num_bytes for shard in shards for tensor in shard)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def write_shard(path: Path, shard: list[Planned], produce: Callable[[str], Tensor]) -> str:
    """Write one file, a tensor at a time, to the disk itself; its SHA-256.

    The format: 8 bytes of little-endian header length, a JSON header padded to 8 bytes with spaces, then the raw
    little-endian data without gaps (huggingface/safetensors, README, "Format").
    Raises MachineError when the disk refuses; ValueError when a produced tensor is not what was planned.
    """
    digest = hashlib.sha256()
    with explained(path), path.open("wb", buffering=0) as file:
        for part in _parts(shard, produce):
            digest.update(part)
            while part:
                part = part[file.write(part) :]  # one call writes at most 2 GiB
        os.fsync(file.fileno())
    return digest.hexdigest()


def _parts(shard: list[Planned], produce: Callable[[str], Tensor]) -> Iterator[memoryview]:
    yield memoryview(_header(shard))
    for planned in shard:
        tensor = produce(planned.name)
        if tuple(tensor.shape) != planned.shape or tensor.dtype != planned.dtype:
            raise ValueError(f"{planned.name}: planned {planned}, got {tuple(tensor.shape)} {tensor.dtype}")
        yield tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data


def _header(shard: list[Planned]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for planned in shard:
        end = offset + planned.num_bytes
        header[planned.name] = {
            "dtype": _DTYPE_CODES[planned.dtype],
            "shape": list(planned.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded
