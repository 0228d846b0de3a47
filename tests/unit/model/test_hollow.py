"""A model without weights: shapes, ties and buffers of the real one; parameters that can be filled and emptied."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from qlora_train.model.hollow import build_hollow, fill, parameter_names
from qlora_train.quant.bnb import Params4bit, QuantSettings, linear4bit_modules, quantize
from qlora_train.quant.fingerprint import BasePrint, TensorPrint
from tests.packs import CONFIGS, tiny_model

CPU = torch.device("cpu")
NF4: dict[str, Any] = {"quant_type": "nf4", "double_quant": True, "block_size": 64, "storage_dtype": "uint8"}


def hollow(family: str, base: BasePrint | None = None) -> Any:
    return build_hollow(copy.deepcopy(CONFIGS[family]), CPU, base)


@pytest.mark.parametrize("family", CONFIGS)
def test_everything_but_the_weights_is_the_real_models(family: str) -> None:
    made, real = hollow(family), tiny_model(family, "eager")
    shapes = {name: (p.shape, p.dtype) for name, p in real.named_parameters()}
    assert {name: (p.shape, p.dtype) for name, p in made.named_parameters()} == shapes, "ties too"
    buffers = dict(made.named_buffers())
    assert buffers.keys() == dict(real.named_buffers()).keys()
    assert all(torch.equal(buffers[name], value) for name, value in real.named_buffers())
    assert all(p.untyped_storage().nbytes() <= 8 and not p.requires_grad for p in made.parameters())


def test_filled_it_is_the_real_model_and_empty_again_it_is_not() -> None:
    made, real = hollow("gemma3"), tiny_model("gemma3", "sdpa")
    values = dict(real.named_parameters())
    assert parameter_names(made) == list(values)
    former = {name: fill(made, name, value.detach()) for name, value in values.items()}
    ids = torch.arange(3, 40)[None, :]
    with torch.no_grad():
        assert torch.equal(made(input_ids=ids).logits, real(input_ids=ids).logits)
    assert made.get_input_embeddings().weight is made.get_output_embeddings().weight, "tied"
    for name, parameter in former.items():
        fill(made, name, parameter)
    assert all(p.untyped_storage().nbytes() <= 8 for p in made.parameters())


def test_layers_are_quantised_where_the_base_was() -> None:
    def printed(name: str, parameter: nn.Parameter) -> TensorPrint:
        return TensorPrint("0" * 64, tuple(parameter.shape), "nf4", 0, "up_proj" in name, True)

    real = tiny_model("llama", "sdpa")
    base = BasePrint({name: printed(name, p) for name, p in real.named_parameters()}, NF4)
    made = hollow("llama", base)
    layers = dict(linear4bit_modules(made))
    assert list(layers) == [f"model.layers.{i}.mlp.up_proj" for i in (0, 1)]
    assert all(layer.weight.untyped_storage().nbytes() <= 8 for layer in layers.values())
    assert made.is_loaded_in_4bit and not any(layer.support_avx512bf16_for_cpu for layer in layers.values())
    values = dict(real.named_parameters())
    for name in parameter_names(made):
        value = quantize(values[name].detach(), QuantSettings(**NF4)) if "up_proj" in name else values[name].detach()
        fill(made, name, value)
    filled = dict(linear4bit_modules(made))["model.layers.0.mlp.up_proj"]
    assert isinstance(filled.weight, Params4bit) and filled.weight.quant_state.dtype == torch.float32
    ids = torch.arange(3, 40)[None, :]
    with torch.no_grad():
        off = (made(input_ids=ids).logits - real(input_ids=ids).logits).abs().max()
    assert 0 < off < 0.5 * real(input_ids=ids).logits.abs().max()
