"""`Lora4bit` and `LoraFloat`: PEFT's LoRA layers with our forward, registered through PEFT's custom modules.

Parameters, names and files are PEFT's. The forward is the fused function of `kernels/lora_linear.py`, or its plain
twin. Both run the adapter's branch first and the base matmul last: under non-reentrant checkpointing the recompute of a
block then stops before its last base matmul.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn

from qlora_train.kernels.dense import FrozenLinear, Workspace, content_state
from qlora_train.kernels.lora_linear import Branch, lora_linear
from qlora_train.quant.bnb import Linear4bit

# Layers of one parent that are called with one tensor, in this order. A model that does otherwise gets the right
# result more slowly: what was computed for a sibling is then not asked for.
READ_THE_SAME = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
FEW_TOKENS = 16
_LAYER_INDEX = re.compile(r"\.\d+\.")  # "model.layers.3.mlp.down_proj": the place is what follows the last index


class _Siblings:
    """Layers that read one tensor: the first that is called computes for all, the others find their result here."""

    def __init__(self, layers: Sequence[Lora4bit | LoraFloat]) -> None:
        self._layers = layers
        self._made_for: tuple[Tensor, object] | None = None
        self._waiting: dict[nn.Module, Tensor] = {}

    def all_plain(self) -> bool:
        """Whether one function can compute them all. With dropout it cannot: PEFT draws a mask for each layer."""
        return all(layer.is_plain() for layer in self._layers)

    def forward(self, layer: nn.Module, x: Tensor) -> Tensor:
        """The result of `layer`, which is one of these."""
        branches = [one.branch() for one in self._layers]
        weights = [weight for branch in branches for weight in (branch.weight_A_rI, branch.weight_B_Or)]
        state = torch.is_grad_enabled(), [content_state(tensor) for tensor in (x, *weights)]
        fresh = self._made_for is not None and self._made_for[0] is x and self._made_for[1] == state
        if not fresh or layer not in self._waiting:
            self._waiting = dict(zip(self._layers, lora_linear(x, branches), strict=True))
            self._made_for = (x, state)
        result = self._waiting.pop(layer)
        if not self._waiting:
            self._made_for = None  # nothing may keep activations alive
        return result


class _OwnForward:
    """Our forward for one active plain adapter; everything else falls back to PEFT's and is counted."""

    num_fallbacks = 0
    frozen: FrozenLinear | None = None  # None: the plain twin of the fused function
    siblings: _Siblings | None = None

    def _plain_adapter(self, kwargs: dict[str, Any]) -> str | None:
        """The one adapter our forward can serve; None when merged, disabled, several, a variant, or given arguments."""
        layer: Any = self
        if kwargs or layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
            return None
        name: str = layer.active_adapters[0]
        plain = name in layer.lora_A and name not in layer.lora_variant and not layer.lora_bias[name]
        return name if plain and not getattr(layer, "fan_in_fan_out", False) else None

    def branch(self) -> Branch:
        """What the fused function needs of this layer, whose one active adapter is plain."""
        layer: Any = self
        assert self.frozen is not None
        name = layer.active_adapters[0]
        return Branch(self.frozen, layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])

    def dropout_now(self) -> float:
        """The active adapter's dropout; 0 outside training."""
        layer: Any = self
        dropout = layer.lora_dropout[layer.active_adapters[0]]
        return dropout.p if layer.training and isinstance(dropout, nn.Dropout) else 0.0

    def is_plain(self) -> bool:
        """Whether the fused function can stand in for this layer without dropout."""
        return self.frozen is not None and self._plain_adapter({}) is not None and not self.dropout_now()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`base(x) + scaling * B A dropout(x)`; x (..., in) in the compute dtype, to which A and B are cast."""
        layer: Any = self
        name = None if args else self._plain_adapter(kwargs)
        if name is None:
            layer.num_fallbacks += 1
            result: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
            return result
        if self.frozen is not None and not _few_on_cuda(x):
            if self.siblings is not None and self.siblings.all_plain():
                return self.siblings.forward(layer, x)
            return lora_linear(x, [self.branch()], self.dropout_now())[0]
        dropped: Tensor = layer.lora_dropout[name](x)
        down = nn.functional.linear(dropped, layer.lora_A[name].weight.to(x.dtype)) * layer.scaling[name]
        update = nn.functional.linear(down, layer.lora_B[name].weight.to(x.dtype))
        return update + layer.base_layer(x)


def _few_on_cuda(x: Tensor) -> bool:
    """Generation on a card: bitsandbytes multiplies so few tokens with the codes themselves, dequantising nothing."""
    return x.is_cuda and not torch.is_grad_enabled() and x.numel() <= FEW_TOKENS * x.shape[-1]


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


def use_fused(model: nn.Module) -> Workspace:
    """From now on every adapted layer of `model` runs the fused function; they share the workspace that is returned."""
    workspace = Workspace()
    layers = lora_layers(model)
    for name, layer in layers.items():
        layer.frozen = FrozenLinear(layer.base_layer, _LAYER_INDEX.split(name)[-1], workspace)
        parent, _, own_name = name.rpartition(".")
        for names in READ_THE_SAME:
            together = [layers[f"{parent}.{one}"] for one in names if f"{parent}.{one}" in layers]
            if own_name in names and len(together) > 1:
                layer.siblings = _Siblings(together) if layer is together[0] else together[0].siblings
    return workspace


def keep_dense(model: nn.Module, dtype: torch.dtype) -> int:
    """Keep dense copies of the base weights of every fused layer in `model`; returns their bytes."""
    return sum(layer.frozen.make_resident(dtype) for layer in lora_layers(model).values() if layer.frozen is not None)


@torch.no_grad()
def delta_weight(layer: Lora4bit | LoraFloat, adapter: str) -> Tensor:
    """The dense update (O, I) in float32, scaling included: `scaling * B A`."""
    weight_A, weight_B = layer.lora_A[adapter].weight.float(), layer.lora_B[adapter].weight.float()
    return (weight_B @ weight_A) * layer.scaling[adapter]
