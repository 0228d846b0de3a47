"""What a module's dotted name says: the layer it lies in, and what it is called there."""

from __future__ import annotations


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
