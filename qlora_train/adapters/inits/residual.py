"""What a start took from the base's weights: how the base without it is made, and how the whole is had back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from qlora_train.adapters.forms.base import layer_tensors
from qlora_train.adapters.forms.offset import START, ResidualForm
from qlora_train.adapters.inits.factors import Factors
from qlora_train.adapters.layers import lora_layers
from qlora_train.adapters.state import load_adapter_config, read_adapter_tensors
from qlora_train.names import PEFT_PREFIX


@dataclass(frozen=True)
class Taken:
    """`scaling * B0 A0`, subtracted from one weight before it was quantised."""

    factors: Factors
    scaling: float

    def delta(self) -> Tensor:
        """`scaling * B0 A0` in float32. Repeatable to the bit: see `Factors.delta`."""
        return self.factors.delta(self.scaling)

    def rest_of(self, weight_OI: Tensor) -> Tensor:
        """The residual W - scaling * B0 A0 in float32, to be quantised."""
        return weight_OI.float() - self.delta().to(weight_OI.device)


def taken_by(layer: Any) -> Taken | None:
    """What the start took from this layer's base weight; None where the base is as it was loaded."""
    adapter = layer.active_adapters[0]
    if not isinstance(layer.lora_variant.get(adapter), ResidualForm):
        return None
    tensors = layer_tensors(layer, adapter)
    return Taken(Factors(tensors[START[0]], tensors[START[1]]), layer.scaling[adapter])


def takes_from_base(adapter: Path) -> bool:
    """Whether an adapter folder belongs to a base that its start changed; no tensor is read."""
    return isinstance(load_adapter_config(adapter).form, ResidualForm)


def read_taken(adapter: Path) -> dict[str, Taken]:
    """The same of an adapter folder, by the base's parameter name; empty where its method takes nothing."""
    config = load_adapter_config(adapter)
    if not isinstance(config.form, ResidualForm):
        return {}
    tensors = read_adapter_tensors(adapter)
    stems = [name.removesuffix(f".{START[0]}") for name in tensors if name.endswith(f".{START[0]}")]
    return {
        f"{stem.removeprefix(PEFT_PREFIX)}.weight": Taken(
            Factors(tensors[f"{stem}.{START[0]}"], tensors[f"{stem}.{START[1]}"]), config.scaling_of(stem)
        )
        for stem in stems
    }


@contextmanager
def untrained(model: PeftModel) -> Iterator[None]:
    """The quantised base as if nothing had been trained.

    The adapter is off; where its start took a part of the base, that part stands in its place instead, since the rest
    alone is no language model.
    """
    layers = [layer for layer in lora_layers(model).values() if taken_by(layer) is not None]
    if not layers:
        with model.disable_adapter():
            yield
        return
    trained = []
    for layer in layers:
        tensors = layer_tensors(layer, layer.active_adapters[0])
        trained.append([tensors[name].detach().clone() for name in ("lora_A", "lora_B")])
        _put(layer, [tensors[name] for name in START])
    try:
        yield
    finally:
        for layer, values in zip(layers, trained, strict=True):
            _put(layer, values)


@torch.no_grad()
def _put(layer: Any, values: list[Tensor]) -> None:
    tensors = layer_tensors(layer, layer.active_adapters[0])
    for name, value in zip(("lora_A", "lora_B"), values, strict=True):
        tensors[name].copy_(value)
