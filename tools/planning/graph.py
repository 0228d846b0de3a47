"""Parts of other trainers' models, on the meta device: written after their sources, with the same tensors kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qlora_train.memory.meta import DeviceKind, MetaModel, ModelStyle
from qlora_train.quant.bnb import QuantSettings, meta_linear4bit

BF16 = torch.bfloat16
QUANT = {
    "nf4": QuantSettings("nf4", double_quant=False, block_size=64, storage_dtype="uint8"),
    "nf4-dq": QuantSettings("nf4", double_quant=True, block_size=64, storage_dtype="uint8"),
}


class OwnGraph(MetaModel):
    """A model with a graph of its own, where the trace expects ours."""

    def __init__(self, model: nn.Module, device: DeviceKind = "cuda") -> None:
        self.model, self.style, self.device = model, ModelStyle(), device

    def hidden(self, batch: Any) -> Tensor:
        """The last hidden state (B, T, H)."""
        hidden: Tensor = self.model(batch.input_ids)
        return hidden


def frozen_linear(num_in: int, num_out: int, quant: str, *, bias: bool = False) -> nn.Module:
    """A frozen layer in 4 bit, or in bfloat16 where `quant` names no 4-bit code."""
    with torch.device("meta"):
        layer = nn.Linear(num_in, num_out, bias=bias, dtype=BF16)
    made: nn.Module = meta_linear4bit(layer, QUANT[quant]) if quant in QUANT else layer
    return made.requires_grad_(False)


def parameter(*shape: int, dtype: torch.dtype = BF16, trained: bool = False) -> nn.Parameter:
    """A tensor of the model."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=trained)


class OldMatmul4bit(torch.autograd.Function):
    """bitsandbytes' matmul before 0.43.2, on weights that were quantised from float16, as Lightning Fabric does.

    The dense weight comes as float16 and is copied into bfloat16. The input is kept until the graph is gone, although
    a frozen weight needs none (bitsandbytes' pull request 1270).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any) -> Tensor:
        ctx.x, ctx.layer = x, layer
        return nn.functional.linear(x, _dense(layer), layer.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ _dense(ctx.layer), None


def _dense(layer: Any) -> Tensor:
    return torch.empty(layer.out_features, layer.in_features, dtype=torch.float16, device="meta").to(BF16)
