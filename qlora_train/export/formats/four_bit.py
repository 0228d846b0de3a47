"""Weights in 4 bit as servers load them: bitsandbytes NF4, and compressed-tensors W4A16 in groups.

Both round the merged weights once more: another model than the one that was trained, measured before it is published.
What is not quantised (embeddings, norms, biases, the head) is bfloat16.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from qlora_train.artifacts.files import explained
from qlora_train.errors import ModelError
from qlora_train.quant.bnb import Params4bit, QuantSettings, packed_state, quantize

NF4 = QuantSettings(quant_type="nf4", double_quant=True, block_size=64, storage_dtype="uint8")
GROUP_SIZES = (128, 64, 32)
_LOW, _HIGH = -8, 7
_HALF_RANGE = (_HIGH - _LOW) / 2
_SHRINKS = tuple(1 - 0.025 * step for step in range(13))  # of a group's scale: 1 to 0.7


class ShardWriter:
    """safetensors shards of at most `shard_bytes`, with their index. Holds one shard in memory."""

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self._folder, self._shard_bytes = folder, shard_bytes
        self._held: dict[str, Tensor] = {}
        self._held_bytes = self.total_bytes = 0
        self._shards: list[list[str]] = []

    def add(self, tensors: dict[str, Tensor]) -> None:
        """Take tensors that belong into one file."""
        num_bytes = sum(tensor.nbytes for tensor in tensors.values())
        if self._held and self._held_bytes + num_bytes > self._shard_bytes:
            self._write()
        self._held |= {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        self._held_bytes += num_bytes
        self.total_bytes += num_bytes

    def close(self) -> None:
        """Write what is held, give the files their names, and write the index where there are several."""
        self._write()
        count = len(self._shards)
        if count == 1:
            self._part(1).rename(self._folder / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards, 1):
            name = f"model-{number:05d}-of-{count:05d}.safetensors"
            self._part(number).rename(self._folder / name)
            weight_map |= dict.fromkeys(names, name)
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
        (self._folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")

    def _part(self, number: int) -> Path:
        return self._folder / f"part-{number:05d}.safetensors"

    def _write(self) -> None:
        self._shards.append(list(self._held))
        path = self._part(len(self._shards))
        with explained(path, num_bytes=self._held_bytes):
            save_file(self._held, path, metadata={"format": "pt"})
        self._held, self._held_bytes = {}, 0


def encode_nf4(name: str, weight_OI: Tensor) -> dict[str, Tensor]:
    """A weight as transformers stores it for bitsandbytes: codes, statistics, and a description of both."""
    return stored_parts(name, quantize(weight_OI.to(torch.bfloat16), NF4))


def stored_parts(name: str, weight: Params4bit) -> dict[str, Tensor]:
    """A 4-bit weight as transformers stores it."""
    return {name: weight.data, **{f"{name}.{key}": value for key, value in packed_state(weight).items()}}


def nf4_config(
    skipped: Collection[str], settings: QuantSettings = NF4, compute_dtype: str = "bfloat16"
) -> dict[str, Any]:
    """`quantization_config` of config.json. `skipped`: linear layers that are not quantised."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": settings.quant_type,
        "bnb_4bit_use_double_quant": settings.double_quant,
        "bnb_4bit_compute_dtype": compute_dtype,
        "bnb_4bit_quant_storage": settings.storage_dtype,
        "llm_int8_skip_modules": sorted(skipped),
    }


def group_size_for(widths: Collection[int]) -> int:
    """The largest group that divides every input width. ModelError where none does."""
    for size in GROUP_SIZES:
        if all(width % size == 0 for width in widths):
            return size
    raise ModelError(
        f"W4A16 needs input widths that are multiples of {GROUP_SIZES[-1]}, and this model has {sorted(set(widths))}",
        fix="use --format gguf-q8_0",
    )


def packed_parts(name: str, codes: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """A weight in compressed-tensors' `pack-quantized` layout: 4-bit symmetric groups along the input.

        weight_packed (O, I / 8) int32: value i of a row in bits 4 (i mod 8) of word i // 8, as q + 8
        weight_scale  (O, I / group) bfloat16
        weight_shape  (2,) int64

    Held against compressed-tensors' own reader in tests/unit/export_formats/test_four_bit.py.
    """

    nibbles = (codes.to(torch.int32) + 8).unflatten(1, (-1, 8))
    shifts = 4 * torch.arange(8, dtype=torch.int32, device=codes.device)
    stem = name.removesuffix(".weight")
    return {
        f"{stem}.weight_packed": (nibbles << shifts).sum(-1).to(torch.int32),
        f"{stem}.weight_scale": scale,
        f"{stem}.weight_shape": torch.tensor(codes.shape, dtype=torch.int64),
    }


def best_scales(groups: Tensor) -> Tensor:
    """The scale (...) of each group (..., G) in bfloat16, the best of a few.

    Best is the least squared error of code * scale: cutting off a group's largest value a little makes all others
    finer. Scales are rounded to bfloat16 before the codes are chosen, so nothing is rounded after. Cost: 13 passes.
    """
    largest = groups.abs().amax(-1).clamp(min=torch.finfo(torch.bfloat16).tiny)
    best_error = torch.full_like(largest, torch.inf)
    best_scale = torch.empty_like(largest, dtype=torch.bfloat16)
    for shrink in _SHRINKS:
        scale = (largest * shrink / _HALF_RANGE).to(torch.bfloat16)
        error = (nearest_codes(groups, scale) * scale.float()[..., None] - groups).square().sum(-1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
    return best_scale


def nearest_codes(groups: Tensor, scale: Tensor) -> Tensor:
    """The steps (..., G), -8 to 7, that are nearest to values in units of their group's scale (...)."""
    return (groups / scale.float()[..., None]).round().clamp(_LOW, _HIGH)


def w4a16_config(group_size: int, skipped: Collection[str]) -> dict[str, Any]:
    """`quantization_config` of config.json. `skipped`: linear layers that are not quantised."""
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": group_size,
        "dynamic": False,
        "actorder": None,
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": sorted(skipped),
        "kv_cache_scheme": None,
    }
