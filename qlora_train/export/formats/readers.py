"""What was written, read back as weights to compute with: each format's `Weights` (export/layers.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from qlora_train.adapters.fold import Delta
from qlora_train.errors import ModelError
from qlora_train.export.base import as_float32
from qlora_train.export.formats.gguf_file import GgufModel
from qlora_train.export.layers import Weights
from qlora_train.export.safetensors_reader import read_rows
from qlora_train.model.files import weight_files
from qlora_train.quant.bnb import dequantize, from_packed
from qlora_train.untrusted import read_header


@dataclass(frozen=True)
class GgufWeights:
    """A model in GGUF."""

    model: GgufModel

    def value(self, name: str) -> Tensor:
        """Dequantised."""
        return self.model[name]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Of any tensor; of an embedding or a head no others are dequantised."""
        return self.model.rows(name, start, stop)


@dataclass(frozen=True)
class AdapterWeights:
    """A base with the updates that an adapter's files make."""

    base: Weights
    updates: Mapping[str, Delta]

    def value(self, name: str) -> Tensor:
        """Base and update added in float32."""
        held = as_float32(self.base.value(name))
        return self.updates[name].applied(held) if name in self.updates else held

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Of an unquantised tensor, adapted or not."""
        if name in self.updates:
            return self.value(name)[start:stop]
        return self.base.rows(name, start, stop)


class FourBitFolder:
    """A folder of 4-bit weights in safetensors, of bitsandbytes or of compressed-tensors.

    `stored` gives the name in the files for each parameter. Raises ModelError for tensors that belong to no parameter.
    """

    def __init__(self, folder: Path, stored: Mapping[str, str]) -> None:
        self._places = {name: path for path in weight_files(folder) for name in read_header(path)}
        self._parts: dict[str, list[str]] = {name: [] for name in stored}
        by_stored = {stored_name: name for name, stored_name in stored.items()}
        by_stem = {stored_name.removesuffix(".weight"): name for name, stored_name in stored.items()}
        for part in self._places:
            owner = by_stored.get(part) or by_stored.get(_nf4_owner(part)) or by_stem.get(part.rpartition(".")[0])
            if owner is None:
                raise ModelError(f"{folder} holds {part}, which belongs to no weight", fix="export again")
            self._parts[owner].append(part)
        if missing := sorted(name for name, parts in self._parts.items() if not parts):
            raise ModelError(f"{folder} lacks {len(missing)} weights, first {missing[0]}", fix="export again")
        self._stored = dict(stored)

    def value(self, name: str) -> Tensor:
        """Dequantised."""
        parts = {part: self._read(part) for part in self._parts[name]}
        stored = self._stored[name]
        if len(parts) == 1:
            return parts[stored].float()
        if stored in parts:
            state = {part.removeprefix(f"{stored}."): value for part, value in parts.items() if part != stored}
            return dequantize(from_packed(parts[stored], state))
        stem = stored.removesuffix(".weight")
        return unpack_groups(parts[f"{stem}.weight_packed"], parts[f"{stem}.weight_scale"])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Of any tensor; one that is not quantised is read no further than these."""
        parts = self._parts[name]
        if len(parts) == 1:
            return read_rows(self._places[parts[0]], parts[0], start, stop).float()
        return self.value(name)[start:stop]

    def _read(self, part: str) -> Tensor:
        with safe_open(self._places[part], framework="pt") as file:
            tensor: Tensor = file.get_tensor(part)
            return tensor


def unpack_groups(packed: Tensor, scale: Tensor) -> Tensor:
    """The float32 weight (O, I) of compressed-tensors' 4-bit groups: see four_bit.packed_parts for the layout."""
    shifts = 4 * torch.arange(8, dtype=torch.int32)
    codes = ((packed[..., None] >> shifts) & 15) - 8
    return (codes.flatten(1).unflatten(1, (scale.shape[1], -1)) * scale.float()[..., None]).flatten(1)


def _nf4_owner(part: str) -> str:
    """`a.weight` of `a.weight.absmax` and of `a.weight.quant_state.bitsandbytes__nf4`."""
    return part.partition(".weight.")[0] + ".weight"
