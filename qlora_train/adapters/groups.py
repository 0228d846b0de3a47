"""Parameter groups: which learning rate each trainable parameter gets, relative to the recipe's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from qlora_train.names import TOKEN_ROWS


@dataclass(frozen=True)
class Group:
    """Parameters that share a learning rate: the recipe's times `lr_ratio`."""

    name: str
    lr_ratio: float
    parameters: tuple[nn.Parameter, ...]
    decays: bool = True  # whether weight decay reaches it


def one_group(parameters: Mapping[str, nn.Parameter]) -> list[Group]:
    """Every parameter at the recipe's rate. Rows of new tokens do not decay: they are whole rows, and not updates."""
    rows = {name: parameter for name, parameter in parameters.items() if f".{TOKEN_ROWS}" in name}
    adapter = tuple(parameter for name, parameter in parameters.items() if name not in rows)
    tokens = [Group("new tokens", 1.0, tuple(rows.values()), decays=False)] if rows else []
    return [Group("adapter", 1.0, adapter), *tokens]


def loraplus_groups(parameters: Mapping[str, nn.Parameter], lr_ratio: float) -> list[Group]:
    """LoRA+: B learns `lr_ratio` times as fast as A. Every parameter is in exactly one group; none is empty.

    `A`: lora_A, cores between A and B, and adapters of embeddings, at the recipe's rate. `B`: lora_B, at `lr_ratio`
    times it. `vector`: everything of one dimension (DoRA's magnitudes, gates, scaling vectors, biases), at the
    recipe's rate and without decay: PEFT puts these into the fast group, where they learn `lr_ratio` times too fast.
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
