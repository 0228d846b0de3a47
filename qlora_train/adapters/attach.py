"""Put an adapter on the base: PEFT builds it, and what it built is checked against what was asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from qlora_train.adapters.layers import lora_layers, register_layers, use_fused
from qlora_train.adapters.state import load_adapter_config, restore_adapter
from qlora_train.errors import ModelError
from qlora_train.recipe.methods import METHODS
from qlora_train.recipe.schema import AdapterSection
from qlora_train.seeds import derive_seed

ADAPTER_NAME = "default"


@dataclass(frozen=True)
class AdapterFacts:
    """What was attached: trainable and frozen parameters of the model (4-bit weights counted as weights, not bytes)."""

    num_trainable: int
    num_frozen: int
    modules: tuple[str, ...]

    @property
    def trainable_frac(self) -> float:
        """Trainable share of all parameters."""
        return self.num_trainable / (self.num_trainable + self.num_frozen)


def attach_adapter(
    model: nn.Module, section: AdapterSection, seed: int, *, base_name: str, fused: bool = True
) -> PeftModel:
    """A PeftModel over `model` with float32 A and B; the start is a pure function of `seed`.

    `fused` chooses the adapted layers' forward: the fused function or its plain twin.

    Raises ModelError when PEFT builds a layer of another kind, and when `init_from` does not fit.
    """
    if section.init_from is not None:
        peft_model = _continue_from(model, section, fused=fused)
    else:
        config = LoraConfig(
            r=section.r,
            lora_alpha=section.alpha,  # PEFT computes with it and stores it as it is
            lora_dropout=section.dropout,
            target_modules=section.target_modules
            if isinstance(section.target_modules, str)
            else list(section.target_modules),
            use_rslora=METHODS[section.method].use_rslora,
            bias="none",
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "adapter"))
            peft_model = get_peft_model(model, register_layers(config))
        peft_model.peft_config[ADAPTER_NAME].base_model_name_or_path = base_name
        if fused:
            use_fused(peft_model)
    check_attached(peft_model)
    return peft_model


def load_adapter(
    model: nn.Module, folder: Path, *, trainable: bool = False, dropout: float | None = None, fused: bool = True
) -> PeftModel:
    """A PeftModel over `model` with the adapter of a folder in PEFT's format. Strict: ModelError names what is off."""
    config = load_adapter_config(folder)
    if dropout is not None:
        config.lora_dropout = dropout
    config.inference_mode = not trainable
    with torch.random.fork_rng(devices=[]):
        peft_model = get_peft_model(model, register_layers(config))
    restore_adapter(peft_model, folder)
    if fused:
        use_fused(peft_model)
    check_attached(peft_model)
    return peft_model


def _continue_from(model: nn.Module, section: AdapterSection, *, fused: bool) -> PeftModel:
    assert section.init_from is not None
    config = load_adapter_config(section.init_from)
    asked: dict[str, object] = {"r": section.r, "alpha": section.alpha, "rslora": METHODS[section.method].use_rslora}
    there: dict[str, object] = {"r": config.r, "alpha": config.lora_alpha, "rslora": config.use_rslora}
    if not isinstance(section.target_modules, str):  # the default asks for nothing in particular
        asked["target_modules"] = sorted(section.target_modules)
        there["target_modules"] = sorted(config.target_modules or ())
    if differing := [key for key in asked if asked[key] != there[key]]:
        what = ", ".join(f"{key} is {there[key]} there and {asked[key]} here" for key in differing)
        raise ModelError(
            f"adapter.init_from: {section.init_from}: {what}", fix="write the adapter's own values in the recipe"
        )
    return load_adapter(model, section.init_from, trainable=True, dropout=section.dropout, fused=fused)


def check_attached(model: PeftModel) -> None:
    """Every adapter module must be one of ours, of the declared shape, in float32, and nothing else may train."""
    layers = lora_layers(model)
    adapted = {name.partition(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}
    if foreign := sorted(adapted - set(layers)):
        kind = type(model.get_submodule(foreign[0]).get_base_layer()).__name__
        raise ModelError(
            f"{len(foreign)} adapted layers are of a kind we do not train ({kind}), first {foreign[0]}",
            fix="name other adapter.target_modules",
        )
    if not layers:
        raise ModelError("the adapter matches no layer", fix="correct adapter.target_modules")
    for name, parameter in model.named_parameters():
        if ".lora_" not in name and parameter.requires_grad:
            raise AssertionError(f"{name} belongs to the base and would train")
        if ".lora_" in name and parameter.dtype != torch.float32:
            raise AssertionError(f"{name} is {parameter.dtype}, not float32")


def adapter_facts(model: PeftModel) -> AdapterFacts:
    """Count; the parts add up to the whole by construction, and the frozen part counts 4-bit weights as weights."""
    trainable = frozen = 0
    for _, parameter in model.named_parameters():
        shape: Any = parameter.quant_state.shape if getattr(parameter, "quant_state", None) else parameter.shape
        if parameter.requires_grad:
            trainable += math.prod(shape)
        else:
            frozen += math.prod(shape)
    return AdapterFacts(trainable, frozen, tuple(lora_layers(model)))
