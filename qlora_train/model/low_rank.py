"""A linear layer in two factors, and models that have some: what LoRD leaves in place of a weight.

A config with `lord_ranks` (layer name to rank) stands for a model of its architecture in which those layers are two.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.auto_factory import _get_model_class

from qlora_train.adapters.module_names import is_named
from qlora_train.recipe.schema import AdapterSection

RANKS = "lord_ranks"  # in config.json of a decomposed base
FACTORS = ("reduce", "expand")


class LowRankLinear(nn.Module):
    """y = expand(reduce(x)): (in) to (rank) to (out). Both are linear layers, to be quantised and adapted as others."""

    def __init__(self, in_features: int, out_features: int, rank: int, *, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.reduce = nn.Linear(in_features, rank, bias=False)
        self.expand = nn.Linear(rank, out_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        out: Tensor = self.expand(self.reduce(x))
        return out

    @property
    def num_saved(self) -> int:
        """Weights that the dense layer has more."""
        return self.in_features * self.out_features - self.rank * (self.in_features + self.out_features)


def ranks_of(config: Any) -> dict[str, int]:
    """The rank of each layer that is in two factors, by its name; empty for an ordinary model."""
    return dict(getattr(config, RANKS, None) or {})


def with_ranks(config: Any, ranks: Mapping[str, int]) -> Any:
    """A copy of a config with these ranks, or, where there are none, that of the ordinary model."""
    config = copy.deepcopy(config)
    if ranks:
        setattr(config, RANKS, dict(ranks))
    elif hasattr(config, RANKS):
        delattr(config, RANKS)
    return config


def causal_class(config: Any) -> Any:
    """What has `from_pretrained` and `from_config` for a config: transformers' own, or its class with factors.

    The layers are replaced at the end of the constructor: transformers makes every model on the meta device first, so
    no weight of them ever exists, and it quantises and fills the factors as it does any linear layer.
    """
    if not ranks_of(config):
        return AutoModelForCausalLM
    parent: Any = _get_model_class(config, AutoModelForCausalLM._model_mapping)

    def construct(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        parent.__init__(self, config, *args, **kwargs)
        _replace_layers(self, ranks_of(config))

    def from_config(config: Any, *, trust_remote_code: bool = False, **settings: Any) -> Any:
        return made._from_config(config, **settings)

    # transformers reads the module of a class to know which attentions its source supports.
    members = {"__init__": construct, "__module__": parent.__module__, "from_config": staticmethod(from_config)}
    made: Any = type(parent.__name__, (parent,), members)
    return made


def _replace_layers(model: nn.Module, ranks: Mapping[str, int]) -> None:
    layers = dict(model.named_modules())
    for name, rank in ranks.items():
        layer = layers.get(name)
        if not isinstance(layer, nn.Linear):
            continue  # of a model cut to its first layers; a layer that lacks its tensors is found when they are read
        parent, _, own_name = name.rpartition(".")
        with torch.device(layer.weight.device):
            made = LowRankLinear(layer.in_features, layer.out_features, rank, bias=layer.bias is not None)
        setattr(model.get_submodule(parent), own_name, made.to(layer.weight.dtype))


def low_rank_layers(model: nn.Module) -> Iterator[tuple[str, LowRankLinear]]:
    """Layers in two factors by name, with or without an adapter on them."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LowRankLinear))


def dense_name(name: str, ranks: Mapping[str, int]) -> str:
    """The name that a parameter has in the ordinary model: that of the product for a factor.

    >>> dense_name("up_proj.reduce.weight", {"up_proj": 64}), dense_name("up_proj.reduce.weight", {})
    ('up_proj.weight', 'up_proj.reduce.weight')
    """
    stem, _, kind = name.rpartition(".")
    layer, _, factor = stem.rpartition(".")
    return f"{layer}.{kind}" if factor in FACTORS and layer in ranks else name


def with_factors(section: AdapterSection, model: nn.Module) -> AdapterSection:
    """The adapter section whose target names stand for both factors where a layer of that name has two."""
    targets, layers = section.target_modules, dict(low_rank_layers(model))
    if isinstance(targets, str) or not layers:
        return section
    names: list[str] = []
    for target in targets:
        split = [name for name in layers if is_named(name, [target])]
        whole = [
            name for name, module in model.named_modules() if isinstance(module, nn.Linear) and is_named(name, [target])
        ]
        if split and whole:  # a name for some layers that are two and some that are one
            names += [*whole, *(f"{name}.{factor}" for name in split for factor in FACTORS)]
        else:
            names += [f"{target}.{factor}" for factor in FACTORS] if split else [target]
    return section.model_copy(update={"target_modules": tuple(names)})
