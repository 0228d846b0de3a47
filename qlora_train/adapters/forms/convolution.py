"""FLoRA's core space on convolutions, which are never quantised: the Tucker form of their weight's own shape."""

from __future__ import annotations

import math
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from qlora_train.adapters.forms.base import FACTORS, Shapes, Tensors, hold, layer_tensors
from qlora_train.errors import ModelError

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
CORE = "lora_core_c"
KERNEL = "lora_kernel_"  # lora_kernel_0 is the factor of the kernel's first side
KERNELS = tuple(f"{KERNEL}{side}" for side in range(3))
_APPLY = {3: nn.functional.conv1d, 4: nn.functional.conv2d, 5: nn.functional.conv3d}


def tucker_shapes(weight: tuple[int, ...], r: int, r_out: int, r_kernel: int | None) -> Shapes:
    """Shapes for a weight (out, in / groups, *kernel): a factor for each mode, and the core between them.

    No mode has a higher rank than its size; so one of size 1, as the inputs of a depthwise convolution, has rank 1.

    >>> tucker_shapes((64, 1, 4), r=8, r_out=16, r_kernel=2)
    {'lora_A': (1, 1), 'lora_B': (64, 16), 'lora_core_c': (1, 16, 2), 'lora_kernel_0': (4, 2)}
    """
    num_out, num_in, *kernel = weight
    rank_in, rank_out = min(r, num_in), min(r_out, num_out)
    ranks = [min(r_kernel or size, size) for size in kernel]
    return {
        "lora_A": (rank_in, num_in),
        "lora_B": (num_out, rank_out),
        CORE: (rank_in, rank_out, *ranks),
        **{f"{KERNEL}{side}": (size, rank) for side, (size, rank) in enumerate(zip(kernel, ranks, strict=True))},
    }


def start_factors(tensors: Tensors) -> None:
    """Kaiming-normal with a = sqrt(3) over the rank, N(0, 1 / (2 r)), and the core zero, as in the authors' program.

    The factor of a mode of size 1 is one number, which only scales: it starts at one.
    """
    for name, tensor in tensors.items():
        if name == CORE:
            nn.init.zeros_(tensor)
        elif tensor.numel() == 1:
            nn.init.ones_(tensor)
        else:
            nn.init.kaiming_normal_(tensor.T if name == "lora_A" else tensor, a=math.sqrt(3))


def _with_kernel(tensors: Tensors) -> Tensor:
    """The core with the kernel's own sides: (r_in, r_out, *kernel)."""
    core = tensors[CORE]
    for name in KERNELS[: core.ndim - 2]:  # each contraction takes the first side and puts it last
        core = torch.tensordot(core, tensors[name], dims=([2], [1]))
    return core


def tucker_product(tensors: Tensors) -> Tensor:
    """`G x_1 U_in x_2 U_out x_3 U_kernel ...` as a convolution has its weight: (out, in / groups, *kernel)."""
    whole = torch.tensordot(tensors["lora_A"].T, _with_kernel(tensors), dims=1)
    return torch.tensordot(tensors["lora_B"], whole, dims=([1], [1]))


class ConvolutionLayer(nn.Module, LoraLayer):
    """A convolution and its update in Tucker form (arXiv 2405.14739): `delta = scaling * G x_1 U_in x_2 U_out x_3 ...`.

    A plain convolution runs through the factors, 1 x 1 to r_in channels, the core, 1 x 1 to out: the dense update is
    never built. One with groups has a small weight, and runs with the updated one. `weight` is the updated weight, too,
    for transformers' mixers call no convolution: they read its weight (tests/methods/test_convolution.py).
    """

    adapter_layer_names = (*FACTORS, CORE, *KERNELS)
    num_fallbacks = 0

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, r: int, **kwargs: Any) -> None:
        nn.Module.__init__(self)
        LoraLayer.__init__(self, base_layer)
        for name in (CORE, *KERNELS):
            setattr(self, name, nn.ParameterDict())
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, config=config, **kwargs)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: Any, **kwargs: Any) -> None:
        """Factors and core of an adapter, at their start. ModelError for dropout, of which a weight has no inputs."""
        if config.lora_dropout:
            raise ModelError(
                "adapter.dropout: a convolution is adapted by its weight: there are no inputs of the adapter to drop",
                fix="remove dropout, or leave convolutions out of adapter.target_modules",
            )
        layer: Any = self
        layer.r[adapter_name], layer.lora_alpha[adapter_name] = r, lora_alpha
        layer.lora_variant[adapter_name], layer.scaling[adapter_name] = config.form, lora_alpha / r
        weight = layer.get_base_layer().weight
        tensors = {
            name: torch.empty(shape, dtype=torch.float32, device=weight.device)
            for name, shape in config.form.convolution_shapes(tuple(weight.shape), r).items()
        }
        start_factors(tensors)
        for name, values in tensors.items():
            hold(layer, name, adapter_name, values, is_buffer=False)
        layer.set_adapter(layer.active_adapters, inference_mode=config.inference_mode)

    def _tensors(self) -> tuple[Tensors, float] | None:
        """The active adapter's tensors and scaling; None where it is switched off."""
        layer: Any = self
        if layer.disable_adapters or not layer.active_adapters:
            return None
        (adapter,) = layer.active_adapters
        return layer_tensors(layer, adapter), layer.scaling[adapter]

    @property
    def weight(self) -> Tensor:
        """(out, in / groups, *kernel): base and update, summed in float32 and rounded once to the base's dtype."""
        layer: Any = self
        weight: Tensor = layer.get_base_layer().weight
        if (found := self._tensors()) is None:
            return weight
        tensors, scaling = found
        return (weight.float() + scaling * tucker_product(tensors)).to(weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in, *size) -> (batch, out, *size)."""
        layer: Any = self
        base: Any = layer.get_base_layer()
        if (found := self._tensors()) is None:
            result: Tensor = base(x)
            return result
        if base.groups > 1:
            grouped: Tensor = base._conv_forward(x, self.weight, base.bias)
            return grouped
        tensors, scaling = found
        apply, ones = _APPLY[base.weight.ndim], (1,) * (base.weight.ndim - 2)
        core = _with_kernel(tensors).transpose(0, 1).to(x.dtype)
        down = apply(x, tensors["lora_A"].to(x.dtype)[(...,) + (None,) * len(ones)])
        middle = base._conv_forward(down, core, None)  # with the base's stride, padding and dilation
        update: Tensor = apply(middle, tensors["lora_B"].to(x.dtype)[(...,) + (None,) * len(ones)])
        return update * scaling + base(x)
