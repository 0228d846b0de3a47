"""Recipes and configs of plans, without files."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from qlora_train.recipe.schema import Recipe
from tests.packs import CONFIGS

FIXTURES = Path(__file__).parents[2] / "fixtures" / "configs"
NAMES = ("smollm2-135m", "llama-3.1-8b", "qwen3-32b", "llama-3.3-70b")


def recipe_of(**sections: dict[str, Any]) -> Recipe:
    """The defaults, with held-out rows, and with these values."""
    given: dict[str, dict[str, Any]] = {
        "model": {"path": "some/model"},
        "data": {"train": ({"path": "rows"},), "eval": ({"path": "others"},)},
        "run": {"dir": Path("/run")},
    }
    for name, values in sections.items():
        given[name] = {**given.get(name, {}), **values}
    return Recipe(**given)  # type: ignore[arg-type]


def tiny_config(family: str, num_layers: int) -> Any:
    """The config of a family of tests/packs.py, so many layers deep."""
    config = copy.deepcopy(CONFIGS[family])
    config.num_hidden_layers = num_layers
    if getattr(config, "layer_types", None):
        config.layer_types = (list(config.layer_types) * num_layers)[:num_layers]
    return config


def published_config(name: str) -> Any:
    """One of tests/fixtures/configs."""
    return AutoConfig.for_model(**json.loads((FIXTURES / f"{name}.json").read_text(encoding="utf-8")))
