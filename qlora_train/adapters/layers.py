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
from peft.tuners.lora.layer import Embedding as PeftEmbedding
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn

from qlora_train.adapters.forms.base import Form, apply_gain, layer_tensors
from qlora_train.adapters.forms.convolution import CONVOLUTIONS, ConvolutionLayer
from qlora_train.adapters.forms.cores import CoreForm
from qlora_train.adapters.forms.delta import DeltaForm, DeltaLayer
from qlora_train.adapters.updates import Delta, Update
from qlora_train.errors import ModelError
from qlora_train.kernels.dense import FrozenLinear, Workspace, content_state
from qlora_train.kernels.lora_linear import Branch, lora_linear
from qlora_train.quant.bnb import Linear4bit

# Layers of one parent that are called with one tensor, in this order. A model that does otherwise gets the right
# result more slowly: what was computed for a sibling is then not asked for.
READ_THE_SAME = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
FEW_TOKENS = 16
PLAIN = Form()
_LAYER_INDEX = re.compile(r"\.\d+\.")  # "model.layers.3.mlp.down_proj": the place is what follows the last index


class _Siblings:
    """Layers that read one tensor: the first that is called computes for all, the others find their result here."""

    def __init__(self, layers: Sequence[Lora4bit | LoraFloat]) -> None:
        self._layers = layers
        self._made_for: Tensor | None = None
        self._made_of: tuple[Tensor, ...] = ()
        self._state: object = None
        self._waiting: dict[nn.Module, Tensor] = {}

    def forward(self, layer: nn.Module, x: Tensor) -> Tensor | None:
        """The result of `layer`, which is one of these; None where one function cannot compute them all.

        With dropout it cannot: PEFT draws a mask for each layer.
        """
        fresh = self._made_for is x and layer in self._waiting and self._state == self._state_of(x)
        if not fresh:
            if not all(one.is_served() for one in self._layers):
                return None
            branches, self._made_of = [one.branch() for one in self._layers], self._tensors()
            self._waiting = dict(zip(self._layers, lora_linear(x, branches), strict=True))
            self._made_for, self._state = x, self._state_of(x)
        result = self._waiting.pop(layer)
        if not self._waiting:
            self._made_for, self._made_of = None, ()  # nothing may keep activations or an adapter alive
        return result

    def _tensors(self) -> tuple[Tensor, ...]:
        return tuple(tensor for layer in self._layers for tensor in layer.own_tensors().values())

    def _state_of(self, x: Tensor) -> object:
        """Another one when what was computed does not hold any more."""
        how = [(layer.training, layer.active_adapter) for layer in self._layers]
        return torch.is_grad_enabled(), how, [content_state(tensor) for tensor in (x, *self._made_of)]


class _OwnForward:
    """Our forward for one active adapter; everything else falls back to PEFT's and is counted."""

    num_fallbacks = 0
    frozen: FrozenLinear | None = None  # None: the plain twin of the fused function
    siblings: _Siblings | None = None
    layer_gate: Any = None  # adapters/layer_gates.py: of the decoder layer, where its matrices share one

    def resolve_lora_variant(self, *, config: LoraConfig, **kwargs: Any) -> LoraVariant | None:
        """The method's form, which PEFT calls a variant; its own plain form is no variant at all."""
        form = getattr(config, "form", None)
        if form is None:
            found: LoraVariant | None = super().resolve_lora_variant(config=config, **kwargs)  # type: ignore[misc]
            return found
        return None if type(form) is Form else form

    def _served_adapter(self, kwargs: dict[str, Any]) -> str | None:
        """The one adapter our forward can serve; None when merged, disabled, several, foreign, or given arguments."""
        layer: Any = self
        if kwargs or layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
            return None
        name: str = layer.active_adapters[0]
        known = name in layer.lora_A and isinstance(layer.lora_variant.get(name, PLAIN), Form)
        served = known and not layer.lora_bias[name] and not getattr(layer, "fan_in_fan_out", False)
        return name if served else None

    def form(self) -> Form:
        """How the active adapter's tensors make its update."""
        layer: Any = self
        form: Form = layer.lora_variant.get(layer.active_adapters[0], PLAIN)
        return form

    def own_tensors(self) -> dict[str, Tensor]:
        """The active adapter's tensors by attribute."""
        layer: Any = self
        return layer_tensors(layer, layer.active_adapters[0])

    def branch(self) -> Branch:
        """What the fused function needs of this layer, whose one active adapter is served."""
        layer: Any = self
        assert self.frozen is not None
        return Branch(self.frozen, *self.form().factors(self.own_tensors()), layer.scaling[layer.active_adapters[0]])

    def dropout_now(self) -> float:
        """The active adapter's dropout; 0 outside training."""
        layer: Any = self
        dropout = layer.lora_dropout[layer.active_adapters[0]]
        return dropout.p if layer.training and isinstance(dropout, nn.Dropout) else 0.0

    def is_served(self) -> bool:
        """Whether the fused function can stand in for this layer without dropout."""
        return self.frozen is not None and self._served_adapter({}) is not None and not self.dropout_now()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`base(x) + scaling * B' A' dropout(x)`; x (..., in) in the compute dtype, to which both factors are cast."""
        layer: Any = self
        name = None if args else self._served_adapter(kwargs)
        if name is None:
            layer.num_fallbacks += 1
            result: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
            return result
        form = self.form()
        if form.own_forward is not None:
            return form.own_forward(layer, name, x)
        summed = self._summed(x, name, form)
        gain = form.gain(self.own_tensors(), layer, name, x.dtype)
        return apply_gain(summed, gain, getattr(layer.base_layer, "bias", None))

    def _summed(self, x: Tensor, name: str, form: Form) -> Tensor:
        """Base and adapter's branch, by the fused function or its twin."""
        layer: Any = self
        if self.frozen is not None and not _few_on_cuda(x):
            if self.siblings is not None and (found := self.siblings.forward(layer, x)) is not None:
                return found
            return lora_linear(x, [self.branch()], self.dropout_now())[0]
        weight_A, weight_B = form.factors(self.own_tensors())
        dropped: Tensor = layer.lora_dropout[name](x)
        down = nn.functional.linear(dropped, weight_A.to(x.dtype)) * layer.scaling[name]
        update = nn.functional.linear(down, weight_B.to(x.dtype))
        result: Tensor = update + layer.base_layer(x)
        return result


def _few_on_cuda(x: Tensor) -> bool:
    """Generation on a card: the base layer's own forward, for bitsandbytes multiplies so few tokens with the codes
    themselves, dequantising nothing. INT4 weights are dequantised there, too."""
    return x.is_cuda and not torch.is_grad_enabled() and x.numel() <= FEW_TOKENS * x.shape[-1]


class Lora4bit(_OwnForward, PeftLinear4bit):
    """LoRA on a bitsandbytes 4-bit linear layer."""


class LoraFloat(_OwnForward, PeftLinear):
    """LoRA on an unquantised linear layer."""


class LoraEmbedding(PeftEmbedding):
    """LoRA on the token embedding, as PEFT computes it: its A (r, vocabulary) starts at zero, its B is random."""

    num_fallbacks = 0


AdaptedLayer = Lora4bit | LoraFloat | LoraEmbedding | DeltaLayer | ConvolutionLayer


def register_layers(config: LoraConfig) -> LoraConfig:
    """Make PEFT build our layers for this config. The mapping is not saved: call again after loading."""
    if isinstance(getattr(config, "form", None), DeltaForm):
        config._register_custom_module({nn.Module: DeltaLayer})
        return config
    # bitsandbytes' class is an nn.Linear, and the first match wins.
    config._register_custom_module({Linear4bit: Lora4bit, nn.Linear: LoraFloat, nn.Embedding: LoraEmbedding})
    if isinstance(getattr(config, "form", None), CoreForm):
        config._register_custom_module(dict.fromkeys(CONVOLUTIONS, ConvolutionLayer))
    return config


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLayer]:
    """Every module that carries something trained, by its dotted name in `model`."""
    kinds = (Lora4bit, LoraFloat, LoraEmbedding, DeltaLayer, ConvolutionLayer)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def lora_layers(model: nn.Module) -> dict[str, Lora4bit | LoraFloat]:
    """Every linear layer that carries an adapter, by its dotted name in `model`."""
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


def layer_update(layer: Lora4bit | LoraFloat, adapter: str) -> Update:
    """What the adapter does to the layer's weight, as `adapters.fold` reads it from a folder."""
    form: Form = layer.lora_variant.get(adapter, PLAIN)
    tensors = {name: tensor.detach() for name, tensor in layer_tensors(layer, adapter).items()}
    return form.update(tensors, layer.scaling[adapter])


@torch.no_grad()
def delta_weight(layer: Lora4bit | LoraFloat, adapter: str) -> Tensor:
    """The dense update (O, I) in float32, scaling included: `scaling * B' A'`. ModelError where there is none."""
    update = layer_update(layer, adapter)
    if not isinstance(update, Delta):
        raise ModelError("this method's update is no product of two factors", fix="use `layer_update`")
    return update.dense(layer.lora_A[adapter].weight.device)
