"""bitsandbytes' 4-bit functions against the readable oracle, and the bytes they take."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from qlora_train.quant import reference
from qlora_train.quant.bnb import (
    Linear4bit,
    Params4bit,
    QuantSettings,
    cpu_width_multiple,
    dequantize,
    forbid_cpu_repacking,
    linear4bit_modules,
    packed_parts,
    quantize,
    set_compute_dtype,
    settings_of,
)
from qlora_train.quant.fingerprint import print_tensor
from qlora_train.quant.reference import QuantType

SHAPE = (128, 512)


def weight(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(SHAPE, generator=torch.Generator().manual_seed(3)) * 0.02).to(dtype)


def settings(**changes: object) -> QuantSettings:
    values = {"quant_type": "nf4", "double_quant": True, "block_size": 64, "storage_dtype": "uint8", **changes}
    return QuantSettings(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block_size", [32, 64, 128, 256])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_dequantize_equals_the_oracle_to_the_bit(
    quant_type: QuantType, double_quant: bool, block_size: int, dtype: torch.dtype
) -> None:
    wanted = settings(quant_type=quant_type, double_quant=double_quant, block_size=block_size)
    packed = quantize(weight(dtype), wanted)
    assert settings_of(packed) == wanted
    found = dequantize(packed)
    oracle = reference.round_trip(weight(dtype), quant_type, block_size, double_quant=double_quant, on_cpu_grid=True)
    assert found.dtype == torch.float32 and torch.equal(found, oracle)
    assert not torch.equal(found, weight(dtype).float())


@pytest.mark.parametrize("storage_dtype", ["bfloat16", "float32"])
def test_the_container_changes_no_value(storage_dtype: str) -> None:
    packed = quantize(weight(), settings(storage_dtype=storage_dtype))
    assert settings_of(packed).storage_dtype == storage_dtype
    assert packed.dtype == getattr(torch, storage_dtype)
    assert torch.equal(dequantize(packed), dequantize(quantize(weight(), settings())))


def test_quantising_leaves_the_weight_alone_and_is_repeatable() -> None:
    given = weight()
    first, second = quantize(given, settings()), quantize(given, settings())
    assert torch.equal(given, weight())
    parts, again = packed_parts(first), packed_parts(second)
    assert parts.keys() == again.keys() == {"codes", "absmax", "absmax_of_absmax", "offset"}
    assert all(torch.equal(parts[name], again[name]) for name in parts)
    assert packed_parts(quantize(given, settings(double_quant=False))).keys() == {"codes", "absmax"}


def test_bytes_per_parameter() -> None:
    """Codes N / 2, absmax N / 64 in 8 bits, 4 bytes for each 256 of those, and the offset."""
    num = math.prod(SHAPE)
    nested = print_tensor(quantize(weight(), settings()))
    assert nested.num_bytes == num // 2 + num // 64 + 4 * num // 16384 + 4
    assert nested.num_bytes / num == pytest.approx(0.516, abs=0.01)
    plain = print_tensor(quantize(weight(), settings(double_quant=False)))
    assert plain.num_bytes == num // 2 + 4 * num // 64
    assert print_tensor(weight(torch.bfloat16)).num_bytes == 2 * num
    assert nested.shape == plain.shape == SHAPE


def test_a_repacked_weight_is_refused() -> None:
    packed = quantize(weight(), settings())
    packed.quant_state.packing_format_for_cpu = True
    with pytest.raises(RuntimeError, match="repacked"):
        dequantize(packed)


def test_the_width_is_a_multiple_of_64_and_of_the_block_size() -> None:
    assert [cpu_width_multiple(size) for size in (32, 64, 128, 256)] == [64, 64, 128, 256]


def layers() -> nn.Sequential:
    """Two 4-bit layers and a plain one."""
    model = nn.Sequential(Linear4bit(64, 64, bias=False), nn.Linear(64, 64), Linear4bit(64, 64, bias=False))
    for _, module in linear4bit_modules(model):
        module.weight = quantize(torch.randn(64, 64), settings())
    return model


def test_only_4_bit_layers_are_listed_and_changed() -> None:
    model = layers()
    assert [name for name, _ in linear4bit_modules(model)] == ["0", "2"]
    assert all(isinstance(module.weight, Params4bit) for _, module in linear4bit_modules(model))
    forbid_cpu_repacking(model)
    assert not any(module.support_avx512bf16_for_cpu for _, module in linear4bit_modules(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_set_compute_dtype_reaches_the_matmul(dtype: torch.dtype) -> None:
    model = layers()
    forbid_cpu_repacking(model)
    before = [dequantize(module.weight) for _, module in linear4bit_modules(model)]
    set_compute_dtype(model, dtype)
    for (_, module), exact in zip(linear4bit_modules(model), before, strict=True):
        assert torch.equal(dequantize(module.weight), exact), "the codes stay as they are"
        x = torch.randn(3, 64).to(dtype)
        assert module(x).dtype == dtype
        assert torch.equal(module(x), nn.functional.linear(x, exact.to(dtype)))
