"""Shorthands of the tests: a tiny base in 4 bit with an adapter, and its dense twin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from qlora_train.adapters.attach import attach_adapter
from qlora_train.model.load import Base, load_base
from qlora_train.model.source import Source
from qlora_train.quant.bnb import dequantize, linear4bit_modules
from qlora_train.recipe.schema import AdapterSection, QuantSection

CPU = torch.device("cpu")


def tiny_base(folder: Path, *, dtype: torch.dtype = torch.float32, **quant: Any) -> Base:
    """The base of a folder, in NF4 with double quantisation unless `quant` says otherwise."""
    return load_base(Source("tiny", folder), QuantSection(**quant), dtype, CPU)


def with_adapter(base: Base, *, seed: int = 0, randomise: bool = True, **adapter: Any) -> PeftModel:
    """An adapter on a base; B is made non-zero, or half of the gradients would be zero."""
    model = attach_adapter(base.model, AdapterSection(**{"r": 4, "alpha": 8.0, **adapter}), seed, base_name="tiny")
    if randomise:
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.02
    return model


def dense_twin(base: Base, folder: Path) -> Base:
    """The same model with plain linear layers holding the dequantised weights, in the base's compute dtype."""
    twin = tiny_base(folder, dtype=base.compute_dtype, quant_type="none")
    with torch.no_grad():
        for name, module in linear4bit_modules(base.model):
            layer = twin.model.get_submodule(name)
            assert isinstance(layer, nn.Linear)
            layer.weight.copy_(dequantize(module.weight))
    return twin


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """The adapter's gradients by name, and none left behind."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found
