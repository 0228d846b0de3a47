"""Parameter groups: which learning rate each trainable parameter gets, relative to the recipe's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from qlora_train.adapters.forms.delta import PREFIX as DIFFERENCE
from qlora_train.names import TOKEN_ROWS


@dataclass(frozen=True)
class Group:
    """Parameters that share a learning rate: the recipe's times `lr_ratio`."""

    name: str
    lr_ratio: float
    parameters: tuple[nn.Parameter, ...]
    decays: bool = True  # whether weight decay reaches it


def one_group(parameters: Mapping[str, nn.Parameter]) -> list[Group]:
    """Every parameter at the recipe's rate; none is in two groups, and no group is empty.

    `adapter` decays: at zero it changes nothing (where it does, recipe/adapter.py refuses decay). `vector` does not: a
    magnitude of DoRA's at zero would be a weight at zero, and so would a scaling vector or a temperature. Nor do the
    rows of new tokens, which are no updates.
    """
    members: dict[str, list[nn.Parameter]] = {"adapter": [], "vector": [], "new tokens": []}
    for name, parameter in parameters.items():
        is_row, is_vector = f".{TOKEN_ROWS}" in name, parameter.ndim < 2 and DIFFERENCE not in name
        members["new tokens" if is_row else "vector" if is_vector else "adapter"].append(parameter)
    return [Group(name, 1.0, tuple(found), decays=name == "adapter") for name, found in members.items() if found]


def loraplus_groups(parameters: Mapping[str, nn.Parameter], lr_ratio: float) -> list[Group]:
    """LoRA+: B learns `lr_ratio` times as fast as A. Every parameter is in exactly one group; none is empty.

    `A`: lora_A, cores between A and B, and adapters of embeddings, at the recipe's rate. `B`: lora_B, at `lr_ratio`
    times it. `vector`: everything of one dimension, of which plain LoRA has nothing, at the recipe's rate and without
    decay: PEFT puts these into the fast group, where they learn `lr_ratio` times too fast.
    Source: LoRA+, arXiv 2402.12354, section 4.

    >>> import torch
    >>> made = {name: nn.Parameter(torch.zeros(shape)) for name, shape in (("a.lora_A", (2, 4)), ("a.lora_B", (4, 2)))}
    >>> [(group.name, group.lr_ratio) for group in loraplus_groups(made, 16.0)]
    [('A', 1.0), ('B', 16.0)]
    """
    ratios = {"A": 1.0, "B": lr_ratio, "vector": 1.0}
    members: dict[str, list[nn.Parameter]] = {name: [] for name in ratios}
    for name, parameter in parameters.items():
        members[_group_of(name, parameter)].append(parameter)
    return [
        Group(name, ratio, tuple(members[name]), decays=name != "vector")
        for name, ratio in ratios.items()
        if members[name]
    ]


def _group_of(name: str, parameter: nn.Parameter) -> str:
    if parameter.ndim < 2:
        return "vector"
    return "B" if "lora_B" in name else "A"
