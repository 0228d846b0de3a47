"""Whether a run fits on a device, and what to change or to spend: the plan with its verdict."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_train.errors import RecipeError
from qlora_train.memory.advice import Change, advise, spend
from qlora_train.memory.available import host_free_bytes
from qlora_train.memory.cards import find_card, parse_memory
from qlora_train.memory.plan import DeviceKind, Plan, plan_training
from qlora_train.model.architecture import load_architecture
from qlora_train.model.load import resolve_device
from qlora_train.model.lord import planned_config
from qlora_train.model.skeleton import check_length, check_rotary
from qlora_train.recipe.advice import near_files
from qlora_train.recipe.load import load_recipe
from qlora_train.recipe.schema import Recipe


@dataclass(frozen=True)
class PlanResult:
    """What a run will hold, and whether that fits."""

    plan: Plan
    device: str  # of the plan, in words
    limit_bytes: int  # memory of the device
    changes: tuple[Change, ...]  # what makes it fit; or, where it fits, what the room is good for

    @property
    def fits(self) -> bool:
        """Whether every stage fits on the device."""
        return self.plan.fits(self.limit_bytes)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            **self.plan.as_dict(),
            "device": self.device,
            "limit_bytes": self.limit_bytes,
            "fits": self.fits,
            "changes": [change.as_dict() for change in self.changes],
        }


def answer(recipe: Recipe, *, vram: str | None, gpu: str | None) -> PlanResult:
    """The plan of a recipe for a card by name, a card of so much memory, or the device that training would find here.

    Raises RecipeError for an unknown card, ModelError where no config is found or the model cannot be trained.
    """
    target = _target(recipe, vram, gpu)
    config = planned_config(load_architecture(recipe.model), recipe)
    check_length(config, recipe.data.seq_len)
    check_rotary(config, recipe)
    found = plan_training(recipe, config, device=target.kind, limit_bytes=target.num_bytes)
    better = spend if found.fits(target.num_bytes) else advise
    return PlanResult(found, target.name, target.num_bytes, better(found, target.num_bytes))


@dataclass(frozen=True)
class _Target:
    """What is planned for."""

    kind: DeviceKind
    num_bytes: int
    name: str


def _target(recipe: Recipe, vram: str | None, gpu: str | None) -> _Target:
    if vram is not None and gpu is not None:
        raise RecipeError("--gpu and --vram both say how much memory there is", fix="give one of them")
    if (vram is not None or gpu is not None) and recipe.model.device == "cpu":
        raise RecipeError("a card is named, and model.device is cpu", fix="remove --gpu or --vram, or model.device")
    if gpu is not None:
        card = find_card(gpu)
        older = "" if card.is_recent else "; older than its attention kernel and bfloat16, which this plan assumes"
        return _Target("cuda", card.total_bytes, f"{card.name} ({card.total_gib:.2f} GiB{older})")
    if vram is not None:
        num_bytes = parse_memory(vram)
        return _Target("cuda", num_bytes, f"a card of {num_bytes / 2**30:.2f} GiB")
    device = resolve_device(recipe.model.device)
    if device.type == "cuda":
        total = int(torch.cuda.get_device_properties(device).total_memory)
        return _Target("cuda", total, torch.cuda.get_device_name(device))
    return _Target("cpu", host_free_bytes(), "the CPUs of this machine")


def planned_recipe(recipe: Path, overrides: Sequence[str], model: str | None) -> Recipe:
    """A recipe to plan for, on another `model` if one is named; files of rows may be absent. RecipeError where not."""
    if model is not None:
        path = Path(model).absolute() if Path(model).exists() else model
        if path == model and (Path(model).suffix in (".json", ".gguf") or model.count("/") != 1):
            fix = near_files(Path(model)) or "check the path, or name a hub id: OWNER/NAME"
            raise RecipeError(f"there is no file {model}", fix=fix, where="--model")
        overrides = [*overrides, f"model.path={json.dumps(str(path))}"]
    return load_recipe(recipe, overrides, with_data=False).recipe
