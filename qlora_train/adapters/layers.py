"""`Lora4bit` and `LoraFloat`: PEFT's LoRA layers with our forward, registered through PEFT's custom modules.

Parameters, names and files are PEFT's. The forward runs the adapter's branch first and the base matmul last: under
non-reentrant checkpointing the recompute of a block then stops before its last base matmul.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn

from qlora_train.quant.bnb import Linear4bit


class _OwnForward:
    """Our forward for one active plain adapter; everything else falls back to PEFT's and is counted."""

    num_fallbacks = 0

    def _plain_adapter(self, kwargs: dict[str, Any]) -> str | None:
        """The one adapter our forward can serve; None when merged, disabled, several, a variant, or given arguments."""
        layer: Any = self
        if kwargs or layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
            return None
        name: str = layer.active_adapters[0]
        plain = name in layer.lora_A and name not in layer.lora_variant and not layer.lora_bias[name]
        return name if plain and not getattr(layer, "fan_in_fan_out", False) else None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`base(x) + scaling * B A dropout(x)`; x (..., in) in the compute dtype, to which A and B are cast."""
        layer: Any = self
        name = None if args else self._plain_adapter(kwargs)
        if name is None:
            layer.num_fallbacks += 1
            result: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
            return result
        weight_A, weight_B = layer.lora_A[name].weight, layer.lora_B[name].weight
        dropped: Tensor = layer.lora_dropout[name](x)
        down = nn.functional.linear(dropped, weight_A.to(x.dtype)) * layer.scaling[name]
        update = nn.functional.linear(down, weight_B.to(x.dtype))
        return update + layer.base_layer(x)


class Lora4bit(_OwnForward, PeftLinear4bit):
    """LoRA on a bitsandbytes 4-bit linear layer."""


class LoraFloat(_OwnForward, PeftLinear):
    """LoRA on an unquantised linear layer."""


def register_layers(config: LoraConfig) -> LoraConfig:
    """Make PEFT build our layers for this config. The mapping is not saved: call again after loading."""
    # bitsandbytes' class is an nn.Linear, and the first match wins.
    config._register_custom_module({Linear4bit: Lora4bit, nn.Linear: LoraFloat})
    return config


def lora_layers(model: nn.Module) -> dict[str, Lora4bit | LoraFloat]:
    """Every layer that carries an adapter, by its dotted name in `model`."""
    return {name: module for name, module in model.named_modules() if isinstance(module, (Lora4bit, LoraFloat))}


@torch.no_grad()
def delta_weight(layer: Lora4bit | LoraFloat, adapter: str) -> Tensor:
    """The dense update (O, I) in float32, scaling included: `scaling * B A`."""
    weight_A, weight_B = layer.lora_A[adapter].weight.float(), layer.lora_B[adapter].weight.float()
    return (weight_B @ weight_A) * layer.scaling[adapter]
