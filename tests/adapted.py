"""Tiny models of several layers with a LoRA adapter whose gradients are all non-zero, in memory."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from qlora_train.adapters.attach import attach_adapter
from qlora_train.adapters.layers import use_fused
from qlora_train.model.attention import ATTENTION_NAME
from qlora_train.recipe.schema import AdapterSection
from tests.packs import CONFIGS


def adapted_model(
    family: str,
    *,
    dtype: torch.dtype = torch.float32,
    num_layers: int = 4,
    dropout: float = 0.0,
    fused: bool = True,
    attention: str = ATTENTION_NAME,
) -> Any:
    """A frozen random base of a family of tests/packs.py, `num_layers` deep (even), with an adapter, training."""
    config = copy.deepcopy(CONFIGS[family])
    config.num_hidden_layers = num_layers
    if getattr(config, "layer_types", None):
        config.layer_types = [*config.layer_types[:2]] * (num_layers // 2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
        model = attach_adapter(
            base.to(dtype), AdapterSection(r=4, alpha=8.0, dropout=dropout), seed=0, base_name="tiny"
        )
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
    if fused:
        use_fused(model)
    return model.train()
