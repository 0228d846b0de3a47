"""The step of transformers' Trainer with PEFT's layers, as LLaMA-Factory, TRL and axolotl run it.

It is our trace of transformers' own model, with mixed precision, FlashAttention-2 and the loss heads of those tools.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from planning.unsloth import cut_loss
from qlora_train.memory.meta import MetaModel, ModelStyle, build_meta_model
from qlora_train.recipe.schema import AdapterSection, QuantSection

FLASH = "attention_2"  # transformers looks for a package behind names with "flash"
Head = Literal["shifted copy", "shifted copy, outputs in half", "padded labels", "cut cross-entropy"]


class MixedPrecision:
    """torch.autocast to bfloat16, which the meta device has not: linear layers cast what is float32.

    The copies of trained weights are kept until the forward pass is over, as autocast's cache does; those of frozen
    ones are not. Norms, softmax and losses work in float32 without being told (aten/src/ATen/autocast_mode.h).
    """

    def __init__(self) -> None:
        self._copies: dict[int, Tensor] = {}
        self._in_forward = True

    def linear(self, layer: nn.Linear, x: Tensor) -> Tensor:
        """What stands in for nn.Linear's forward."""
        bias = None if layer.bias is None else layer.bias.to(torch.bfloat16)
        return nn.functional.linear(x.to(torch.bfloat16), self._half(layer.weight), bias)

    def end_forward(self) -> None:
        """Forget the copies. A layer that is computed again makes its own."""
        self._copies.clear()
        self._in_forward = False

    def _half(self, weight: Tensor) -> Tensor:
        if weight.dtype != torch.float32 or not (self._in_forward and weight.requires_grad):
            return weight.to(torch.bfloat16)
        if id(weight) not in self._copies:
            self._copies[id(weight)] = weight.to(torch.bfloat16)
        return self._copies[id(weight)]


@contextmanager
def mixed_precision() -> Iterator[MixedPrecision]:
    """Mixed precision while a step is traced; PEFT's layers ask torch whether it is on."""
    real, mode = torch.is_autocast_enabled, MixedPrecision()

    def is_on(*device: str) -> bool:
        return real(*device) if device else True

    def forward(layer: nn.Linear, x: Tensor) -> Tensor:
        return mode.linear(layer, x)

    with mock.patch("torch.is_autocast_enabled", is_on), mock.patch.object(nn.Linear, "forward", forward):
        yield mode


def _flash_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """FlashAttention-2: half precision, key and value heads as they are, output as (B, T, H, D)."""
    q, k, v = (each.to(torch.bfloat16) for each in (query, key, value))
    out = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0]
    return out.transpose(1, 2), None


AttentionInterface.register(FLASH, _flash_attention)
AttentionMaskInterface.register(FLASH, lambda *args, **kwargs: None)


def trainer_model(
    config: Any,
    *,
    r: int,
    targets: tuple[str, ...] | Literal["all-linear"] = "all-linear",
    quant_type: Literal["nf4", "none"] = "nf4",
    double_quant: bool = True,
    dropout: float = 0.0,
    attention: str = FLASH,
    upcast: Literal["none", "norms", "all"] = "none",
) -> MetaModel:
    """A model with PEFT's layers and float32 adapters."""
    style = ModelStyle(
        adapter=AdapterSection(r=r, target_modules=targets, dropout=dropout),
        quant=QuantSection(quant_type=quant_type, double_quant=double_quant),
        attention=attention,
        linear="peft",
        upcast=upcast,
    )
    return build_meta_model(config, style, "cuda")


def trainer_loss(model: Any, batch: Any, *, head: Head, mode: MixedPrecision | None = None) -> Tensor:
    """The loss as the Trainer's `compute_loss` leaves it: what the model returned besides is gone.

    "shifted copy": transformers before 4.45 made all logits float32 and copied them without the last. From 4.45 on the
    model returned them in half precision, and accelerate upcasts what is returned. From 4.50 on labels are padded
    instead.
    """
    hidden = model.hidden(batch)
    weight = model.head.weight_VH
    cut = head == "cut cross-entropy"
    loss = cut_loss(hidden, weight) if cut else _full_logits(hidden, weight, batch.labels, head)
    if mode is not None:
        mode.end_forward()
    return loss


def _full_logits(hidden: Tensor, weight: Tensor, labels: Tensor, head: Head) -> Tensor:
    returned = nn.functional.linear(hidden.to(torch.bfloat16), weight.to(torch.bfloat16))
    logits = returned.float()
    if head == "shifted copy":
        returned = logits
    if head != "padded labels":
        logits, labels = logits[:, :-1].contiguous(), labels[:, 1:].contiguous()
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    del logits
    returned.float()  # accelerate's convert_outputs_to_fp32; nothing where they are float32
    return loss
