"""A model with its adapter on the meta device: every tensor of a training run, with its size and without its values."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import masking_utils

from qlora_train.adapters.attach import attach_adapter
from qlora_train.adapters.module_names import is_named
from qlora_train.adapters.tokens import NewTokens
from qlora_train.data.loader import MicroBatch
from qlora_train.errors import ModelError, first_line
from qlora_train.loss import chunk_tokens
from qlora_train.model.attention import ATTENTION_NAME, check_packable, run_packed
from qlora_train.model.causal import CausalModel
from qlora_train.model.low_rank import with_factors
from qlora_train.model.skeleton import build_skeleton, check_targets, linear_layers
from qlora_train.quant.bnb import QuantSettings, linear4bit_modules, meta_linear4bit, packed_tensors
from qlora_train.quant.fingerprint import base_parameter_name
from qlora_train.recipe.methods import METHODS
from qlora_train.recipe.schema import AdapterSection, QuantSection

DeviceKind = Literal["cpu", "cuda"]


def device_kind(device: torch.device) -> DeviceKind:
    """What plans call a device."""
    return "cuda" if device.type == "cuda" else "cpu"


@dataclass(frozen=True)
class ModelStyle:
    """How the model of a step is made. The defaults are ours; other trainers are described by other values."""

    adapter: AdapterSection = field(default_factory=AdapterSection)
    quant: QuantSection = field(default_factory=QuantSection)
    compute_dtype: torch.dtype = torch.bfloat16
    attention: str | None = ATTENTION_NAME  # the implementation that transformers is given; None: its own choice
    linear: Literal["fused", "plain", "peft"] = "fused"  # the adapted layers' forward: ours, its twin, PEFT's own
    adapter_dtype: torch.dtype = torch.float32  # of A and B; other than float32 with linear="peft" only
    upcast: Literal["none", "norms", "all"] = "none"  # unquantised parameters held in float32: vectors; all of them


class MetaModel(CausalModel):
    """The model as it is run for its loss on a device of this kind, with tensors that have no values."""

    def __init__(self, model: Any, style: ModelStyle, device: DeviceKind) -> None:
        super().__init__(model)
        self.style, self.device = style, device
        self.loss_sizes = chunk_tokens(self.head.weight_VH.shape[0], style.compute_dtype, torch.device(device))

    def hidden(self, batch: MicroBatch) -> Tensor:
        """As CausalModel's, with the attention kernel of the device that is planned for."""
        if batch.row_starts is not None:
            return run_packed(self.decoder, batch, kernel=self.device == "cuda")
        return super().hidden(batch)

    def _supervised(self, batch: MicroBatch) -> Any:
        """As many positions as are supervised; a mask without values does not tell."""
        index = torch.empty(batch.num_supervised_tokens, dtype=torch.int64, device="meta")
        return index, index


def build_meta_model(config: Any, style: ModelStyle, device: DeviceKind, num_layers: int | None = None) -> MetaModel:
    """The base as it is loaded, with a new adapter on it; the first `num_layers` layers only, where given.

    Raises ModelError as `check_targets`, `check_packable` and `attach_adapter` do. Some seconds for 70 billion weights.
    """
    config = copy.deepcopy(config)
    if num_layers is not None:
        _cut(config.get_text_config(), num_layers)
    model: Any = build_skeleton(config, dtype=style.compute_dtype, attn_implementation=style.attention)
    method = METHODS[style.adapter.method]
    check_targets(model, style.adapter.target_modules, with_convolutions=method.convolutions)
    if style.attention == ATTENTION_NAME:
        check_packable(model)
    model.requires_grad_(False)
    model.config.use_cache = False
    if style.quant.quant_type != "none":
        _quantise(model, style.quant)
    with torch.device("meta"):
        adapted = _attach(model, style)
    for name, parameter in adapted.named_parameters():
        if base_parameter_name(name) is None:
            parameter.data = parameter.data.to(style.adapter_dtype)
        elif not hasattr(parameter, "quant_state") and _is_upcast(style.upcast, parameter):
            parameter.data = parameter.data.float()
    return MetaModel(adapted, style, device)


def _is_upcast(upcast: str, parameter: nn.Parameter) -> bool:
    return upcast == "all" or (upcast == "norms" and parameter.ndim == 1)


def _cut(config: Any, num_layers: int) -> None:
    config.num_hidden_layers = num_layers
    if getattr(config, "layer_types", None):
        config.layer_types = list(config.layer_types)[:num_layers]


def _quantise(model: nn.Module, quant: QuantSection) -> None:
    settings = QuantSettings.of(quant.quant_type, quant.double_quant, quant.block_size, quant.storage_dtype)
    for name, layer in linear_layers(model).items():
        if not is_named(name, quant.skip_modules):
            parent, _, own_name = name.rpartition(".")
            setattr(model.get_submodule(parent), own_name, meta_linear4bit(layer, settings))


def _attach(model: Any, style: ModelStyle) -> Any:
    section = with_factors(style.adapter.model_copy(update={"init_from": None}), model)
    if style.linear != "peft":
        num_rows = model.get_input_embeddings().weight.shape[0]
        tokens = NewTokens.placeholders(section.new_tokens, num_rows) if section.new_tokens else None
        return attach_adapter(model, section, 0, base_name="", fused=style.linear == "fused", tokens=tokens)
    model.is_loaded_in_4bit = style.quant.quant_type != "none"  # else PEFT builds no 4-bit layers
    targets = section.target_modules
    config = LoraConfig(
        r=section.r,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def base_tensors(model: nn.Module) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """What lies on the device for good: the 4-bit weights with their statistics, other frozen tensors, the adapter."""
    quantised = [tensor for _, layer in linear4bit_modules(model) for tensor in packed_tensors(layer.weight)]
    codes = {id(layer.weight) for _, layer in linear4bit_modules(model)}
    frozen = [p for p in model.parameters() if not p.requires_grad and id(p) not in codes]
    trainable: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    return quantised, [*frozen, *model.buffers()], trainable


def _sdpa_on_cpu(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    dropout, is_causal = kwargs.get("dropout_p", 0.0), kwargs.get("is_causal", False)
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out: Tensor = attend(query, key, value, dropout, is_causal, attn_mask=attn_mask, scale=kwargs.get("scale"))[0]
    return out


def _sdpa_on_cuda(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    """Flash attention; with a mask another kernel runs, which holds as much."""
    dropout, is_causal = kwargs.get("dropout_p", 0.0), kwargs.get("is_causal", False)
    attend = torch.ops.aten._scaled_dot_product_flash_attention
    out: Tensor = attend(query, key, value, dropout, is_causal, scale=kwargs.get("scale"))[0]
    return out


@contextmanager
def as_on(device: DeviceKind) -> Iterator[None]:
    """Let the model take the way on meta tensors that it would take on a device of this kind.

    torch's attention on the meta device holds all scores, which no device does. transformers looks into `position_ids`
    for packed rows, and they have no values here; padded batches hold none, and packed ones bring their boundaries.
    Raises ModelError where a model decides by values what it computes.
    """
    functional: Any = nn.functional
    masks: Any = masking_utils
    attend, find = functional.scaled_dot_product_attention, masks.find_packed_sequence_indices
    functional.scaled_dot_product_attention = _sdpa_on_cpu if device == "cpu" else _sdpa_on_cuda
    masks.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    except (NotImplementedError, RuntimeError) as error:
        if "meta" not in str(error).lower():
            raise
        raise ModelError(
            f"this model cannot be traced without its weights: {first_line(error)[:200]}",
            fix="train without a plan: the rehearsal before step 1 measures what it takes",
        ) from error
    finally:
        functional.scaled_dot_product_attention = attend
        masks.find_packed_sequence_indices = find
