"""Put an adapter on the base: PEFT builds it, and what it built is checked against what was asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from qlora_train.adapters.config import AdapterConfig, build_config, section_config, section_options
from qlora_train.adapters.experts import fill_experts, mixture_config
from qlora_train.adapters.forms.base import Form
from qlora_train.adapters.forms.convolution import CONVOLUTIONS
from qlora_train.adapters.forms.delta import select_modules
from qlora_train.adapters.forms.mole import MixtureForm
from qlora_train.adapters.layer_gates import share_gates
from qlora_train.adapters.layers import LoraEmbedding, adapted_layers, use_fused
from qlora_train.adapters.module_names import is_named
from qlora_train.adapters.state import has_embeddings, load_adapter_config, restore_adapter, split_name
from qlora_train.adapters.tokens import NewTokens, build_peft_model, indices_for, start_rows, token_layers
from qlora_train.artifacts.folders import read_manifest
from qlora_train.errors import ModelError
from qlora_train.quant.fingerprint import base_parameter_name
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
    token_rows: tuple[str, ...] = ()  # tables of which single rows are trained

    @property
    def trainable_frac(self) -> float:
        """Trainable share of all parameters."""
        return self.num_trainable / (self.num_trainable + self.num_frozen)


def attach_adapter(
    model: nn.Module,
    section: AdapterSection,
    seed: int,
    *,
    base_name: str,
    fused: bool = True,
    tokens: NewTokens | None = None,
) -> PeftModel:
    """A PeftModel over `model` with a float32 adapter of the recipe's method; the start is a pure function of `seed`.

    `fused` chooses the adapted layers' forward: the fused function or its plain twin. `tokens`: those of
    `adapter.new_tokens`, as the tokenizer numbers them.

    Raises ModelError when PEFT builds a layer of another kind, and when `init_from` does not fit.
    """
    if section.init_from is not None:
        peft_model = _continue_from(model, section, tokens, fused=fused)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "adapter"))
            peft_model = _built(model, _new_config(model, section, tokens))
        if tokens is not None:
            start_rows(peft_model, tokens, ADAPTER_NAME)
        if METHODS[section.method].start == "experts":
            fill_experts(peft_model, section.experts)
        peft_model.peft_config[ADAPTER_NAME].base_model_name_or_path = base_name
        if fused:
            use_fused(peft_model)
    check_attached(peft_model)
    return peft_model


def _built(model: nn.Module, config: AdapterConfig) -> PeftModel:
    """PEFT's model, with what a form has besides the tensors of single layers."""
    peft_model = build_peft_model(model, config)
    if isinstance(config.form, MixtureForm) and config.form.granularity == "layer":
        share_gates(peft_model, config.form, ADAPTER_NAME, trainable=not config.inference_mode)
    return peft_model


def _new_config(model: nn.Module, section: AdapterSection, tokens: NewTokens | None) -> AdapterConfig:
    """What PEFT is to build; a few methods look at the model, or at other adapters, to know where."""
    method = METHODS[section.method]
    if section.new_tokens:
        assert tokens is not None and tokens.texts == section.new_tokens
        config = section_config(section)
        config.trainable_token_indices = indices_for(model, tokens)
        return config
    if method.start == "experts":
        return mixture_config(section)
    if section.embeddings or method.convolutions:
        return section_config(section.model_copy(update={"target_modules": _targets(model, section)}))
    if method.form == "delta":
        modules = select_modules(model, section.parameters)
        return build_config(method, section_options(section), r=1, lora_alpha=1, target_modules=modules)
    return section_config(section)


def _targets(model: nn.Module, section: AdapterSection) -> str | tuple[str, ...]:
    """The recipe's targets as PEFT is to find them."""
    if section.embeddings:
        return _with_embedding(model, section)
    if METHODS[section.method].convolutions and not isinstance(section.target_modules, str):
        return _with_convolutions(model, section.target_modules)
    return section.target_modules


def _with_convolutions(model: nn.Module, names: tuple[str, ...]) -> tuple[str, ...]:
    """A name that a convolution shares with the block around it, as in LFM2, becomes its whole name: PEFT would take
    the block."""
    found: dict[str, None] = {}
    for name in names:
        meant = [
            (full, isinstance(m, (nn.Linear, *CONVOLUTIONS)))
            for full, m in model.named_modules()
            if is_named(full, [name])
        ]
        found |= dict.fromkeys([name] if all(fits for _, fits in meant) else [full for full, fits in meant if fits])
    return tuple(found)


def _with_embedding(model: Any, section: AdapterSection) -> tuple[str, ...]:
    """The targets with the token embedding among them, by name."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    modules = dict(model.named_modules())
    name = next(name for name, module in modules.items() if module is embedding)
    if not isinstance(section.target_modules, str):
        return (*section.target_modules, name)
    linear = {n.rpartition(".")[2] for n, m in modules.items() if isinstance(m, nn.Linear) and m is not head}
    return (*sorted(linear), name)


def load_adapter(
    model: nn.Module, folder: Path, *, trainable: bool = False, dropout: float | None = None, fused: bool = True
) -> PeftModel:
    """A PeftModel over `model` with the adapter of a folder in PEFT's format. Strict: ModelError names what is off."""
    config = load_adapter_config(folder)
    if dropout is not None:
        config.lora_dropout = dropout
    config.inference_mode = not trainable
    with torch.random.fork_rng(devices=[]):
        peft_model = _built(model, config)
    restore_adapter(peft_model, folder)
    if fused:
        use_fused(peft_model)
    check_attached(peft_model)
    return peft_model


def _continue_from(model: nn.Module, section: AdapterSection, tokens: NewTokens | None, *, fused: bool) -> PeftModel:
    assert section.init_from is not None
    config = load_adapter_config(section.init_from)
    wanted = section_config(section)
    asked, there = _described(wanted), _described(config)
    if "embeddings" in wanted.options:
        asked["embeddings"], there["embeddings"] = section.embeddings, has_embeddings(section.init_from)
        asked["new_tokens"], there["new_tokens"] = _tokens_asked_and_there(section, tokens, config)
    if not isinstance(section.target_modules, str):  # the default asks for nothing in particular
        asked["target_modules"] = sorted(_targets(model, section))
        found = config.target_modules or ()
        there["target_modules"] = [found] if isinstance(found, str) else sorted(found)
    if differing := [key for key in asked if asked[key] != there.get(key)]:
        what = ", ".join(f"{key} is {there.get(key)} there and {asked[key]} here" for key in differing)
        raise ModelError(
            f"adapter.init_from: {section.init_from}: {what}", fix="write the adapter's own values in the recipe"
        )
    return load_adapter(model, section.init_from, trainable=True, dropout=section.dropout, fused=fused)


def _tokens_asked_and_there(
    section: AdapterSection, tokens: NewTokens | None, config: AdapterConfig
) -> tuple[object, object]:
    """By their texts where the folder's manifest has them, for ids follow their order; else, and if equal, by ids."""
    assert section.init_from is not None
    try:
        texts = read_manifest(section.init_from)["recipe"]["adapter.new_tokens"]
    except (OSError, ValueError, KeyError):
        texts = None  # not of a run of ours, or of one before there was this key
    if texts is not None and texts != list(section.new_tokens):
        return list(section.new_tokens) or "none", texts or "none"
    there = f"the ids {sorted(config.token_ids)}" if config.token_ids else "none"
    return f"the ids {tokens.sorted_ids}" if tokens else "none", there


def _described(config: AdapterConfig) -> dict[str, object]:
    """What two adapters must have in common for one to go on from the other, in the recipe's words.

    A folder that plain PEFT can load does not say by which start or rule it was trained, and need not.
    """
    method = config.method.name
    if config.method.is_peft:
        method = "dora" if config.use_dora else "rslora" if config.use_rslora else "lora"
    asked: dict[str, object] = {"method": method}
    if "r" in config.method.reads:
        asked |= {"r": config.r, "alpha": config.lora_alpha}
    return asked | {key: value for key, value in config.options.items() if key in vars(config.form)}


def check_attached(model: PeftModel) -> None:
    """Every adapter module must be one of ours, of the method's form, in float32, and nothing else may train.

    PEFT builds plain LoRA without a word where a layer class does not know what a config asks for.
    """
    layers = adapted_layers(model)
    adapted = {split_parameter_name(name)[0] for name, _ in model.named_parameters() if ".lora_" in name}
    if foreign := sorted(adapted - set(layers)):
        kind = type(model.get_submodule(foreign[0]).get_base_layer()).__name__
        raise ModelError(
            f"{len(foreign)} adapted layers are of a kind we do not train ({kind}), first {foreign[0]}",
            fix="name other adapter.target_modules",
        )
    if not layers:
        raise ModelError("the adapter matches no layer", fix="correct adapter.target_modules")
    _refuse_tied_embedding(model)
    form = getattr(model.peft_config[ADAPTER_NAME], "form", None)
    for name, layer in layers.items():
        variant: Any = layer.lora_variant
        if form is not None and variant.get(ADAPTER_NAME) is not (None if type(form) is Form else form):
            raise AssertionError(f"{name} computes {variant}, not {type(form).__name__}")
    for name, parameter in model.named_parameters():
        of_base = base_parameter_name(name) is not None
        if of_base and parameter.requires_grad:
            raise AssertionError(f"{name} belongs to the base and would train")
        if not of_base and parameter.dtype != torch.float32:
            raise AssertionError(f"{name} is {parameter.dtype}, not float32")


def _refuse_tied_embedding(model: PeftModel) -> None:
    """An update of a table that is the output head too would have to be taken apart from it."""
    base: Any = model.get_base_model()
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    for name, layer in adapted_layers(model).items():
        embedding: Any = layer
        if isinstance(layer, LoraEmbedding) and head and head.weight is embedding.get_base_layer().weight:
            raise ModelError(
                f"{name} is the output head too (tied embeddings): an adapter on it alone would untie them",
                fix="leave adapter.embeddings out for this model",
            )


def split_parameter_name(name: str) -> tuple[str, str]:
    """Module and attribute of an attached adapter's parameter, as `split_name` has them of a tensor in a file.

    >>> split_parameter_name("base_model.model.layers.0.q_proj.lora_A.default.weight")
    ('base_model.model.layers.0.q_proj', 'lora_A')
    """
    return split_name(name.replace(f".{ADAPTER_NAME}", ""))


def adapter_facts(model: PeftModel) -> AdapterFacts:
    """Count; the parts add up to the whole by construction, and the frozen part counts 4-bit weights as weights."""
    trainable = frozen = 0
    for _, parameter in model.named_parameters():
        shape: Any = parameter.quant_state.shape if getattr(parameter, "quant_state", None) else parameter.shape
        if parameter.requires_grad:
            trainable += math.prod(shape)
        else:
            frozen += math.prod(shape)
    return AdapterFacts(trainable, frozen, tuple(adapted_layers(model)), tuple(token_layers(model)))
