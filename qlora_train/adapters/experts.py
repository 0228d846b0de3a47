"""Finished adapters as the experts of a mixture: read, and laid side by side in the layers of the router."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor

from qlora_train.adapters.config import AdapterConfig, build_config, section_options
from qlora_train.adapters.fold import read_deltas
from qlora_train.adapters.inits.residual import takes_from_base
from qlora_train.adapters.layers import Lora4bit, LoraFloat, lora_layers
from qlora_train.adapters.state import WEIGHTS, load_adapter_config
from qlora_train.adapters.updates import Delta
from qlora_train.artifacts.files import sha256_file
from qlora_train.errors import ModelError
from qlora_train.names import PEFT_PREFIX
from qlora_train.recipe.methods import METHODS
from qlora_train.recipe.schema import AdapterSection


def mixture_config(section: AdapterSection) -> AdapterConfig:
    """The router's config: rank N times the experts' largest, on every module that one of them adapts, scaling one.

    The router's folder holds the experts too and needs none of their folders again; it keeps their names and digests.
    """
    for folder in section.experts:
        if takes_from_base(folder):
            title = load_adapter_config(folder).method.title
            raise ModelError(
                f"adapter.experts: {folder} belongs to a base that its start changed ({title})",
                fix="train the experts by methods that leave the base as it is, such as lora",
            )
    experts = [read_deltas(folder) for folder in section.experts]
    width = max(delta.lora_A.shape[0] for deltas in experts for delta in deltas.values())
    modules = sorted({name.removesuffix(".weight") for deltas in experts for name in deltas})
    asked = [load_adapter_config(folder).target_modules for folder in section.experts]
    targets = "all-linear" if asked == ["all-linear"] * len(asked) else modules
    rank = width * len(experts)
    return build_config(
        METHODS[section.method],
        {**section_options(section), "experts": [label_of(folder) for folder in section.experts]},
        r=rank,
        lora_alpha=rank,
        lora_dropout=section.dropout,
        target_modules=targets,
    )


def name_of(folder: Path) -> str:
    """What to call an expert: its run, or its own folder.

    >>> name_of(Path("/runs/shell/adapter"))
    'shell'
    """
    return folder.parent.name if folder.name == "adapter" else folder.name


def label_of(folder: Path) -> str:
    """Its name, and what tells its weights from those of another run of that name: "shell@1a2b3c4d5e6f"."""
    return f"{name_of(folder)}@{sha256_file(folder / WEIGHTS)[:12]}"


@torch.no_grad()
def fill_experts(model: PeftModel, folders: Sequence[Path]) -> None:
    """Put the experts' factors into a router that `mixture_config` described; a module that one lacks gets zeros.

    A plan has no values, and the first layers only: there is nothing to put, and no telling what fits.
    ModelError where an expert's update fits no layer of the model.
    """
    layers = {name.removeprefix(PEFT_PREFIX): layer for name, layer in lora_layers(model).items()}
    if all(layer.lora_A[layer.active_adapters[0]].weight.is_meta for layer in layers.values()):
        return
    for index, folder in enumerate(folders):
        for name, delta in read_deltas(folder).items():
            layer = layers.get(name.removesuffix(".weight"))
            if layer is None or delta.shape != (layer.out_features, layer.in_features):
                raise ModelError(
                    f"adapter.experts: {folder}: its update of {name} fits no adapted layer of this model",
                    fix="use adapters of this base",
                )
            _place(layer, index, len(folders), delta)


def _place(layer: Lora4bit | LoraFloat, index: int, count: int, delta: Delta) -> None:
    (adapter,) = layer.active_adapters
    weight_A: Tensor = layer.lora_A[adapter].weight
    weight_B: Tensor = layer.lora_B[adapter].weight
    if index == 0:
        weight_A.zero_()
        weight_B.zero_()
    first, r = index * (weight_A.shape[0] // count), delta.lora_A.shape[0]
    weight_A[first : first + r] = delta.lora_A
    weight_B[:, first : first + r] = delta.lora_B * delta.scaling
