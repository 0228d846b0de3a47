"""The 4-bit layer without values has the sizes of the one that loading makes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qlora_train.quant.bnb import QuantSettings, dequantize_into, meta_linear4bit, packed_parts, quantize


@pytest.mark.parametrize(
    "settings",
    [
        QuantSettings("nf4", True, 64, "uint8"),
        QuantSettings("nf4", False, 64, "uint8"),
        QuantSettings("fp4", True, 128, "bfloat16"),
        QuantSettings("nf4", True, 32, "float32"),
    ],
    ids=str,
)
def test_sizes_are_those_of_a_real_layer(settings: QuantSettings) -> None:
    weight = torch.randn(192, 128, dtype=torch.bfloat16)
    real = packed_parts(quantize(weight, settings))
    layer = nn.Linear(128, 192, dtype=torch.bfloat16, device="meta")
    made = meta_linear4bit(layer, settings)
    planned = packed_parts(made.weight)
    assert planned.keys() == real.keys()
    for name, tensor in real.items():
        assert (planned[name].numel(), planned[name].dtype) == (tensor.numel(), tensor.dtype), name
    assert made.weight.is_meta and made.bias is layer.bias


def test_it_is_dequantised_into_a_buffer() -> None:
    layer = nn.Linear(128, 192, bias=False, dtype=torch.bfloat16, device="meta")
    made = meta_linear4bit(layer, QuantSettings("nf4", True, 64, "uint8"))
    dequantize_into(made.weight, torch.empty(192, 128, dtype=torch.bfloat16, device="meta"))
    out = made(torch.empty(3, 128, dtype=torch.bfloat16, device="meta"))
    assert out.shape == (3, 192) and out.is_meta
