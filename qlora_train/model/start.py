"""Giving an attached adapter its start: weights streamed one at a time from the base's files, gradients, inputs.

A start that takes something from the base (`residual`) leaves another base behind. It is described by the base as
loaded, the two buffers of each layer and the quantiser; `rebuild` makes it again, and its fingerprint proves it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from qlora_train.adapters.forms.base import base_weight, layer_tensors
from qlora_train.adapters.forms.offset import START
from qlora_train.adapters.inits.informed import eva, lora_ga, redistribute
from qlora_train.adapters.inits.residual import taken_by
from qlora_train.adapters.inits.spectral import Started, loftq, milora, olora, pissa
from qlora_train.adapters.layers import layer_update, lora_layers
from qlora_train.adapters.state import load_adapter_config, restore_adapter
from qlora_train.data.loader import Loader, MicroBatch
from qlora_train.errors import ModelError
from qlora_train.model.causal import CausalModel
from qlora_train.model.files import StoredTensor, stored_tensors
from qlora_train.model.load import Base
from qlora_train.model.probe import probe_gradients, probe_inputs
from qlora_train.model.skeleton import build_skeleton, load_config
from qlora_train.names import PEFT_PREFIX
from qlora_train.quant.bnb import Linear4bit, Params4bit, dequantize, quantize, settings_of
from qlora_train.quant.fingerprint import TensorPrint, print_tensor
from qlora_train.recipe.methods import METHODS
from qlora_train.recipe.schema import AdapterSection, Recipe

FROM_WEIGHTS = frozenset({"pissa", "loftq", "milora", "olora"})
FROM_INPUTS = frozenset({"eva"})
FROM_GRADIENTS = frozenset({"lora_ga"})


def probe_batches(recipe: Recipe, loader: Loader) -> list[MicroBatch]:
    """The first micro-batches of training, for starts that look at data; none for the others."""
    if METHODS[recipe.adapter.method].start not in FROM_INPUTS | FROM_GRADIENTS:
        return []
    return first_batches(recipe, loader, recipe.adapter.probe_batches)


def first_batches(recipe: Recipe, loader: Loader, most: int) -> list[MicroBatch]:
    """The first micro-batches of training, at most so many."""
    found: list[MicroBatch] = []
    for step in range(loader.num_steps(recipe.train.epochs, recipe.train.max_steps)):
        found += loader.step(step)
        if len(found) >= most:
            break
    return found[:most]


class Weights:
    """The full-precision weights of the base under adapted layers, read from its files one at a time."""

    def __init__(self, base: Base) -> None:
        skeleton = build_skeleton(load_config(base.source))
        self._stored: dict[str, StoredTensor] = stored_tensors(base.source, skeleton)

    def read(self, parameter: str, device: torch.device) -> Tensor:
        """The float32 weight (O, I) of a parameter of the base."""
        stored = self._stored[parameter]
        with safe_open(stored.path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(stored.name)
        return tensor.to(device).float()


def parameter_of(layer_name: str) -> str:
    """The base's own name of the weight under an adapted layer.

    >>> parameter_of("base_model.model.model.layers.0.mlp.up_proj")
    'model.layers.0.mlp.up_proj.weight'
    """
    return f"{layer_name.removeprefix(PEFT_PREFIX)}.weight"


@dataclass
class _Nearness:
    """How far the model's weights are from the original ones, with a start and without it; sums of squares."""

    original: float = 0.0
    as_loaded: float = 0.0
    started: float = 0.0

    def words(self) -> str:
        """For people; empty where nothing was quantised."""
        if not self.as_loaded:
            return ""
        without, found = ((square / self.original) ** 0.5 for square in (self.as_loaded, self.started))
        return f"; relative distance from the original weights {found:.4f}, and {without:.4f} without it"


def _quiet(line: str) -> None:
    """Say nothing."""


@torch.no_grad()
def start_from_weights(
    base: Base, model: nn.Module, section: AdapterSection, say: Callable[[str], None] = _quiet
) -> Base:
    """Start every layer from its own full-precision weight; the base that training will compute with comes back.

    Other starts do nothing here. One weight is in memory at a time, in float32, with what its decomposition needs.
    """
    row = METHODS[section.method]
    if row.start not in FROM_WEIGHTS:
        return base
    weights, layers, began = Weights(base), lora_layers(model), time.perf_counter()
    refuse_narrow(layers, 1, row.title)
    changed: dict[str, TensorPrint] = {}
    nearness = _Nearness()
    for name, layer in layers.items():
        parameter = parameter_of(name)
        weight_OI, loaded_OI = weights.read(parameter, base.device), base_weight(layer)
        settle(layer, _started(row.start, section, layer, weight_OI))
        changed |= _take(layer, parameter, weight_OI)
        if row.base == "residual" and isinstance(layer.get_base_layer(), Linear4bit):
            update = layer_update(layer, layer.active_adapters[0])
            nearness.original += float(weight_OI.square().sum())
            nearness.as_loaded += float((weight_OI - loaded_OI).square().sum())
            nearness.started += float((weight_OI - update.applied(base_weight(layer))).square().sum())
    say(f"start: {row.title} of {len(layers)} weights in {time.perf_counter() - began:.0f} s{nearness.words()}")
    return _with_prints(base, changed)


def _started(start: str, section: AdapterSection, layer: Any, weight_OI: Tensor) -> Started:
    adapter = layer.active_adapters[0]
    r, scaling = layer.r[adapter], layer.scaling[adapter]
    if start == "milora":
        return milora(weight_OI, r, scaling)
    if start == "olora":
        return olora(weight_OI, r, scaling)
    round_trip, iters = _round_trip(layer.get_base_layer()), section.start_iters
    if start == "pissa":
        return pissa(weight_OI, r, scaling, round_trip, iters)
    return loftq(weight_OI, base_weight(layer), r, scaling, round_trip, iters)


def _round_trip(base_layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """What the layer would compute with in place of a weight: the quantiser of the layer there and back."""
    weight = base_layer.weight
    if isinstance(weight, Params4bit):
        settings = settings_of(weight)
        return lambda weight_OI: dequantize(quantize(weight_OI, settings))
    assert isinstance(weight, Tensor)
    dtype = weight.dtype
    return lambda weight_OI: weight_OI.to(dtype).float()


def start_from_inputs(
    causal: CausalModel,
    section: AdapterSection,
    batches: Sequence[MicroBatch],
    say: Callable[[str], None] = _quiet,
) -> None:
    """EVA: A spans the leading directions of each layer's inputs over the batches.

    With `rho` above 1, layers get ranks by the variance that their directions explain, up to rho r; the sum stays.
    """
    if METHODS[section.method].start not in FROM_INPUTS:
        return
    began = time.perf_counter()
    spectra = probe_inputs(causal, batches, int(section.r * section.rho))
    set_ranks(causal.model, redistribute(spectra, section.r, section.rho))
    layers = lora_layers(causal.model)
    for name, spectrum in spectra.items():
        settle(layers[name], eva(spectrum, layers[name].r[layers[name].active_adapters[0]], layers[name].out_features))
    ranks = [layer.lora_A[layer.active_adapters[0]].weight.shape[0] for layer in layers.values()]
    held = sum(float(one.variance_frac[:r].sum()) for one, r in zip(spectra.values(), ranks, strict=True)) / len(ranks)
    say(
        f"start: EVA of {len(ranks)} layers from {len(batches)} micro-batches in {time.perf_counter() - began:.0f} s; "
        f"A spans {held:.1%} of the variance of a layer's inputs on average, with ranks {min(ranks)} to {max(ranks)}"
    )


def start_again(base: Base, model: Any, checkpoint: Path) -> Base:
    """The start that a checkpoint's run had, from its adapter: nothing is decomposed or probed a second time."""
    config = load_adapter_config(checkpoint)
    set_ranks(model, {name: config.rank_of(name) for name in lora_layers(model)})
    restore_adapter(model, checkpoint)
    return rebuild(base, model)


def set_ranks(model: Any, ranks: Mapping[str, int]) -> None:
    """Give layers other ranks, with zeros in A and B and the scaling as it was, and note them in PEFT's config."""
    for name, layer in lora_layers(model).items():
        adapter, r = layer.active_adapters[0], ranks[name]
        if r == layer.r[adapter]:
            continue
        config, pattern = model.peft_config[adapter], re.escape(name.removeprefix(PEFT_PREFIX))
        config.rank_pattern[pattern] = r
        layer.lora_alpha[adapter] = config.alpha_pattern[pattern] = layer.lora_alpha[adapter] * r / layer.r[adapter]
        layer.r[adapter] = r
        for holder, num_in, num_out in ((layer.lora_A, layer.in_features, r), (layer.lora_B, r, layer.out_features)):
            like = holder[adapter].weight
            holder[adapter] = nn.Linear(num_in, num_out, bias=False, device=like.device, dtype=like.dtype)
            nn.init.zeros_(holder[adapter].weight)


def refuse_narrow(layers: Mapping[str, Any], times: int, title: str) -> None:
    """ModelError where a layer has fewer than `times` r directions."""
    for name, layer in layers.items():
        r, most = layer.r[layer.active_adapters[0]], min(layer.in_features, layer.out_features) // times
        if r > most:
            raise ModelError(
                f"adapter.r: {title} takes at most {most} directions of {name}, and r is {r}",
                fix=f"lower adapter.r to {most}, or leave the layer out of adapter.target_modules",
            )


def start_from_gradients(
    causal: CausalModel,
    section: AdapterSection,
    batches: Sequence[MicroBatch],
    say: Callable[[str], None] = _quiet,
    *,
    seed: int,
) -> None:
    """LoRA-GA: A and B from the leading directions of each weight's gradient over the batches."""
    if METHODS[section.method].start not in FROM_GRADIENTS:
        return
    began, layers = time.perf_counter(), lora_layers(causal.model)
    refuse_narrow(layers, 2, METHODS[section.method].title)
    for name, gradient in probe_gradients(causal, batches, 2 * section.r, seed=seed).items():
        layer = layers[name]
        settle(layer, lora_ga(gradient, layer.r[layer.active_adapters[0]], section.stable_gamma))
    say(
        f"start: LoRA-GA of {len(layers)} layers from the gradient of {len(batches)} micro-batches in "
        f"{time.perf_counter() - began:.0f} s"
    )


@torch.no_grad()
def settle(layer: Any, started: Started) -> None:
    """Put a start into a layer: A, B, and what was taken into the buffers of the layer's form."""
    tensors = layer_tensors(layer, layer.active_adapters[0])
    values = {"lora_A": started.factors.lora_A, "lora_B": started.factors.lora_B}
    if started.taken is not None:
        values |= {START[0]: started.taken.lora_A, START[1]: started.taken.lora_B}
    for name, value in values.items():
        tensors[name].data.copy_(value)


@torch.no_grad()
def rebuild(base: Base, model: nn.Module) -> Base:
    """The base without what the adapter's start took from it, made from the files and the adapter's buffers.

    Nothing is done where nothing was taken. Fused layers see the new weights at their next call; dense copies of
    weights (`keep_dense`) must not exist yet.
    """
    taking = {name: layer for name, layer in lora_layers(model).items() if taken_by(layer) is not None}
    if not taking:
        return base
    weights = Weights(base)
    changed: dict[str, TensorPrint] = {}
    for name, layer in taking.items():
        parameter = parameter_of(name)
        changed |= _take(layer, parameter, weights.read(parameter, base.device))
    return _with_prints(base, changed)


def _take(layer: Any, parameter: str, weight_OI: Tensor) -> dict[str, TensorPrint]:
    """Put the residual of a weight into its layer; its new fingerprint by name, where something was taken."""
    taken, base_layer = taken_by(layer), layer.get_base_layer()
    if taken is None or not bool(taken.factors.lora_B.any()):
        return {}
    _replace_weight(base_layer, taken.rest_of(weight_OI))
    return {parameter: print_tensor(base_layer.weight)}


def _with_prints(base: Base, changed: Mapping[str, TensorPrint]) -> Base:
    return replace(base, print=replace(base.print, tensors={**base.print.tensors, **changed})) if changed else base


def _replace_weight(base_layer: Any, weight_OI: Tensor) -> None:
    """Another weight in a frozen layer, quantised as the old one was."""
    old = base_layer.weight
    if isinstance(base_layer, Linear4bit):
        made = quantize(weight_OI, settings_of(old))
        made.quant_state.dtype = old.quant_state.dtype
        made.module, base_layer.quant_state = base_layer, made.quant_state
        base_layer.weight = made
    else:
        base_layer.weight = nn.Parameter(weight_OI.to(old.dtype), requires_grad=False)
