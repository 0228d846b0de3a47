"""How a step is split into micro-batches, where `train.memory: auto` leaves it to the run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlora_train.recipe.schema import Recipe


def with_split(recipe: Recipe, micro_batch_size: int, grad_accum_steps: int) -> Recipe:
    """The recipe with each step split so."""
    split = {"micro_batch_size": micro_batch_size, "grad_accum_steps": grad_accum_steps}
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=split)})


def split_as_stored(recipe: Recipe, stored: Mapping[str, Any]) -> Recipe:
    """A recipe that leaves the split of a step open, with the one of a checkpoint's keys where it is as many packs."""
    size, count = stored.get("train.micro_batch_size"), stored.get("train.grad_accum_steps")
    if recipe.train.memory == "fixed" or not isinstance(size, int) or not isinstance(count, int):
        return recipe
    same = size * count == recipe.train.micro_batch_size * recipe.train.grad_accum_steps
    return with_split(recipe, size, count) if same else recipe
