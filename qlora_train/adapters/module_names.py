"""What a module's dotted name says: the layer it lies in, and what it is called there."""

from __future__ import annotations

from collections.abc import Iterable


def layer_of(module: str) -> int | None:
    """The first number in a module's name; None outside of the layers.

    >>> layer_of("model.layers.12.mlp.experts.3.up_proj"), layer_of("lm_head")
    (12, None)
    """
    return next((int(part) for part in module.split(".") if part.isdecimal()), None)


def name_of(module: str) -> str:
    """The last part of a module's name.

    >>> name_of("model.layers.12.self_attn.q_proj")
    'q_proj'
    """
    return module.rpartition(".")[2]


def is_named(module: str, names: Iterable[str]) -> bool:
    """Whether one of the names is a module's own, or ends it after a dot: so recipes and PEFT mean names.

    >>> is_named("model.layers.1.mlp.up_proj", ["mlp.up_proj"]), is_named("model.layers.1.mlp.up_proj", ["proj"])
    (True, False)
    """
    return any(module == name or module.endswith(f".{name}") for name in names)
