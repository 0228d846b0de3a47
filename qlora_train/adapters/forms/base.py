"""What every form offers, and what it shares: its tensors by name, their start, and the two factors they make.

A form computes `scaling * B' A'` from the tensors of a layer. Training hands A' and B' to the fused function of
`kernels/lora_linear.py`, whatever they are made of; export and analysis read them from a folder by the same function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.lora.layer import LoraVariant
from peft.tuners.lora.variants import _register_frozen_peft_weight
from torch import Tensor, nn

from qlora_train.adapters.updates import Delta, RowDelta, Update
from qlora_train.quant.bnb import Params4bit, dequantize

Tensors = Mapping[str, Tensor]  # of one layer, by attribute: lora_A, lora_B, lora_core_c
Shapes = dict[str, tuple[int, ...]]
FACTORS = ("lora_A", "lora_B")
HOLDERS = (nn.ModuleDict, nn.ParameterDict, BufferDict)  # a layer's tensors of one kind, by adapter
EMBEDDING = ("lora_embedding_A", "lora_embedding_B")  # PEFT's factors (r, vocabulary) and (width, r) of an embedding


class Form(LoraVariant):
    """The update of one layer from its tensors. PEFT calls `init` and `forward`; it keeps one object per layer."""

    frozen: tuple[str, ...] = ()  # parameters that never train
    buffers: tuple[str, ...] = ()  # tensors that are no parameters, saved beside them
    own_forward: Callable[[Any, str, Tensor], Tensor] | None = None  # (layer, adapter, x): where factors do not do

    def shapes(self, r: int, num_in: int, num_out: int) -> Shapes:
        """Every tensor of a layer (out, in) at rank r."""
        return {"lora_A": (r, num_in), "lora_B": (num_out, r)}

    def expected(self, r: int, found: Mapping[str, tuple[int, ...]]) -> Shapes:
        """What one module of a folder must hold, going by the sizes of what it does hold."""
        if EMBEDDING[0] in found:
            return {EMBEDDING[0]: (r, *found[EMBEDDING[0]][1:]), EMBEDDING[1]: (*found.get(EMBEDDING[1], (0,))[:1], r)}
        sizes = self.sizes(found) if found.keys() >= set(FACTORS) else (1, 1)
        return self.shapes(r, *sizes)

    def sizes(self, found: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        """(in, out) of the layer that tensors of these shapes belong to."""
        return found["lora_A"][1], found["lora_B"][0]

    def start(self, tensors: dict[str, Tensor], layer: Any) -> None:
        """Fill the tensors in place. lora_A and lora_B come as PEFT starts them: A kaiming-uniform, B zero."""

    def factors(self, tensors: Tensors) -> tuple[Tensor, Tensor]:
        """A' (r', in) and B' (out, r') of the update `scaling * B' A'`, differentiable."""
        return tensors["lora_A"], tensors["lora_B"]

    def gain(self, tensors: Tensors, layer: Any, adapter: str, dtype: torch.dtype) -> Tensor | None:
        """(out,) what the rows of `W + update` are multiplied with, W being used in `dtype`; None: nothing."""
        return None

    def update(self, tensors: Tensors, scaling: float) -> Update:
        """What the tensors do to the layer's weight. ModelError where no weight does the same."""
        return Delta(*self.factors(tensors), scaling)

    def updates(self, tensors: Tensors, scaling: float) -> dict[str, Update]:
        """The same by the name of the module's parameter."""
        if EMBEDDING[0] in tensors:
            return {"weight": RowDelta(tensors[EMBEDDING[0]], tensors[EMBEDDING[1]], scaling)}
        return {"weight": self.update(tensors, scaling)}

    # What PEFT calls. Its own methods are static; it calls them on the object all the same.

    def init(self, module: Any, adapter_name: str, **kwargs: Any) -> None:
        """Make the layer's tensors beside lora_A and lora_B, freeze what is frozen, and start them."""
        wanted = self.shapes(module.r[adapter_name], module.in_features, module.out_features)
        like = module.lora_A[adapter_name].weight
        for name, shape in wanted.items():
            if name in FACTORS:
                _reshape(getattr(module, name), adapter_name, shape, like)
            else:
                hold(module, name, adapter_name, like.new_zeros(shape), is_buffer=name in self.buffers)
        for name in self.frozen:
            _register_frozen_peft_weight(module, adapter_name, name)
        with torch.no_grad():
            self.start(dict(layer_tensors(module, adapter_name)), module)

    def forward(self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """PEFT's way, for what our forward does not serve (several adapters at once)."""
        tensors = layer_tensors(module, active_adapter)
        weight_A, weight_B = self.factors(tensors)
        down = nn.functional.linear(module.lora_dropout[active_adapter](x), weight_A.to(x.dtype))
        moved = result + nn.functional.linear(down, weight_B.to(x.dtype)) * module.scaling[active_adapter]
        gain = self.gain(tensors, module, active_adapter, result.dtype)
        return apply_gain(moved, gain, getattr(module.base_layer, "bias", None))

    def merge_safe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """The trained weight from the base's."""
        update = self.update(layer_tensors(module, active_adapter), module.scaling[active_adapter])
        return update.applied(orig_weight.float()).to(orig_weight.dtype)

    def merge_unsafe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        """The same, in place."""
        orig_weight.data = self.merge_safe(module, active_adapter, orig_weight)

    def unmerge(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Only what was added can be taken off again."""
        update = self.update(layer_tensors(module, active_adapter), module.scaling[active_adapter])
        if not isinstance(update, Delta):
            raise NotImplementedError("this merge cannot be undone: load the base again")
        return orig_weight - update.dense(orig_weight.device).to(orig_weight.dtype)


def layer_tensors(layer: Any, adapter: str) -> dict[str, Tensor]:
    """The tensors of one adapter of a layer by attribute, as parameters: gradients flow to them."""
    found = {}
    children = layer._modules  # each layer asks several times a step: Module.__getattr__ would cost more than the rest
    for attribute in (*layer.adapter_layer_names, *layer.other_param_names):
        holder = children.get(attribute)
        if isinstance(holder, HOLDERS) and adapter in holder:
            value = holder[adapter]
            tensor = value if isinstance(value, Tensor) else getattr(value, "weight", None)
            if tensor is not None:  # lora_dropout has none
                found[attribute] = tensor
    return found


def hold(layer: Any, name: str, adapter: str, values: Tensor, *, is_buffer: bool) -> None:
    """Put a tensor into the layer's dictionary by adapter, made at the first one; PEFT saves what it is told of."""
    if not hasattr(layer, name):
        setattr(layer, name, BufferDict({}, persistent=True) if is_buffer else nn.ParameterDict())
        listed = "other_param_names" if is_buffer else "adapter_layer_names"
        setattr(layer, listed, (*getattr(layer, listed), name))
    holder = getattr(layer, name)
    if isinstance(holder, BufferDict):
        holder[adapter] = values
    else:
        holder[adapter] = _Vector(values) if isinstance(holder, nn.ModuleDict) else nn.Parameter(values)


def apply_gain(result: Tensor, gain_O: Tensor | None, bias_O: Tensor | None) -> Tensor:
    """`gain * (result - bias) + bias`.

    Written with `gain - 1`, of which a half-precision dtype keeps what it would lose of a gain near one; and so that a
    gain of one changes no bit.
    """
    if gain_O is None:
        return result
    without_bias = result if bias_O is None else result - bias_O.to(result.dtype)
    return torch.addcmul(result, without_bias, (gain_O - 1).to(result.dtype))


def base_weight(layer: Any) -> Tensor:
    """The float32 weight (O, I) that an adapted layer computes with; a temporary copy where it is quantised."""
    weight = layer.get_base_layer().weight
    return dequantize(weight) if isinstance(weight, Params4bit) else weight.detach().float()


def kaiming_uniform(tensor: Tensor, a: float = math.sqrt(5)) -> None:
    """PEFT's default start, with its `a`: U(-1/sqrt(in), 1/sqrt(in))."""
    nn.init.kaiming_uniform_(tensor, a=a)


def _reshape(holder: nn.ModuleDict, adapter: str, shape: tuple[int, ...], like: Tensor) -> None:
    """Give PEFT's factor another shape, where the form has one of its own."""
    weight = holder[adapter].weight
    assert isinstance(weight, Tensor)
    if tuple(weight.shape) != shape:
        made = nn.Linear(shape[1], shape[0], bias=False, device=like.device, dtype=like.dtype)
        nn.init.zeros_(made.weight)
        holder[adapter] = made


class _Vector(nn.Module):
    """One parameter, where PEFT's dictionary wants a module."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(values)
