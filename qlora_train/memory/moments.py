"""What the optimiser of a recipe keeps between steps, in bytes: on the device, and in every checkpoint."""

from __future__ import annotations

import math
from collections.abc import Sequence

from qlora_train.quant.moments import optimizer_state_bytes
from qlora_train.recipe.methods import METHODS
from qlora_train.recipe.schema import Recipe

WHOLE_WEIGHTS = "lora_pro"  # beside the names of train.optimizer: AdamW whose moments are those of whole weights


def optimizer_of(recipe: Recipe) -> str:
    """The optimiser that a recipe is trained with: train.optimizer, or that of LoRA-Pro in `full` mode."""
    has_own = METHODS[recipe.adapter.method].rule == "lora_pro" and recipe.adapter.rule_mode == "full"
    return WHOLE_WEIGHTS if has_own else recipe.train.optimizer


def state_bytes(optimizer: str, shapes: Sequence[Sequence[int]]) -> int:
    """Bytes of every tensor in the optimiser's state, over trained parameters of these shapes in the model's order.

    WHOLE_WEIGHTS keeps two float32 moments (out, in) and the step for each A (r, in) and B (out, r), in turn:
    adapters/gradrules.py. On every linear layer of Llama-3.1-8B that is 55.8 GB, whatever r is. Others as
    `optimizer_state_bytes` says.

    >>> state_bytes("lora_pro", [(16, 4096), (4096, 16)]), state_bytes("adamw", [(16, 4096), (4096, 16)])
    (134217732, 1048584)
    """
    if optimizer != WHOLE_WEIGHTS:
        return optimizer_state_bytes(optimizer, shapes)
    pairs = list(zip(shapes[::2], shapes[1::2], strict=True))
    assert all(a[0] == b[1] for a, b in pairs), "A and B of each layer, in turn"
    return sum(8 * math.prod((b[0], a[1])) + 4 for a, b in pairs)
