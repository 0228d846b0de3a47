"""recipes/recipe.schema.json, which editors use, is fresh and says what the loader says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_train.errors import RecipeError
from qlora_train.recipe import reader
from qlora_train.recipe.load import load_recipe
from tests.structure.source_tree import ROOT
from tests.structure.test_collection import RECIPES
from tools import recipe_schema

SCHEMA = json.loads(recipe_schema.SCHEMA.read_text(encoding="utf-8"))
TYPES: dict[str, Callable[[Any], bool]] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "null": lambda value: value is None,
    "boolean": lambda value: isinstance(value, bool),
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
}
RULES: dict[str, Callable[[Any, Any], bool]] = {
    "type": lambda rule, value: any(TYPES[name](value) for name in ([rule] if isinstance(rule, str) else rule)),
    "enum": lambda rule, value: value in rule,
    "const": lambda rule, value: value == rule,
    "anyOf": lambda rule, value: any(valid(option, value) for option in rule),
    "pattern": lambda rule, value: not isinstance(value, str) or re.search(rule, value) is not None,
    "minLength": lambda rule, value: not isinstance(value, str) or len(value) >= rule,
    "minItems": lambda rule, value: not isinstance(value, list) or len(value) >= rule,
    "minimum": lambda rule, value: not TYPES["number"](value) or value >= rule,
    "maximum": lambda rule, value: not TYPES["number"](value) or value <= rule,
    "exclusiveMinimum": lambda rule, value: not TYPES["number"](value) or value > rule,
    "exclusiveMaximum": lambda rule, value: not TYPES["number"](value) or value < rule,
    "items": lambda rule, value: not isinstance(value, list) or all(valid(rule, item) for item in value),
    "required": lambda rule, value: not isinstance(value, dict) or all(key in value for key in rule),
    "propertyNames": lambda rule, value: not isinstance(value, dict) or all(valid(rule, key) for key in value),
}
WITHOUT_RULE = {"$schema", "title", "description", "default", "properties", "additionalProperties"}


def valid(schema: Any, value: Any) -> bool:
    """JSON Schema draft 7, as far as our schema goes; a keyword that is not known here is a KeyError."""
    if isinstance(value, dict):
        known, others = schema.get("properties", {}), schema.get("additionalProperties", True)
        for key, inner in value.items():
            rule = known.get(key, others)
            if rule is False or (rule is not True and not valid(rule, inner)):
                return False
    return all(RULES[key](rule, value) for key, rule in schema.items() if key not in WITHOUT_RULE)


def plain(node: reader.Node | None) -> Any:
    """A recipe's text as an editor reads it."""
    value = None if node is None else node.value
    if isinstance(value, dict):
        return {key: plain(inner) for key, (_, inner) in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value


def accepted(text: str) -> bool:
    return valid(SCHEMA, plain(reader.parse(text, "recipe.yaml")[0]))


def test_the_schema_is_fresh() -> None:
    assert recipe_schema.schema() == SCHEMA, "run tools/recipe_schema.py"


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_names_the_schema_and_holds_to_it(name: str) -> None:
    text = (ROOT / "recipes" / name).read_text(encoding="utf-8")
    up = "../" * name.count("/")
    assert text.splitlines()[0] == recipe_schema.MODELINE.replace("recipe.schema.json", f"{up}recipe.schema.json")
    assert accepted(text)


GOOD = {"model": {"path": "m"}, "data": {"train": ["rows.jsonl"]}, "run": {"dir": "run"}}


@pytest.mark.parametrize(
    ("section", "key", "value", "right"),
    [
        ("train", "epochs", 2, True),
        ("train", "epochs", "2", False),
        ("train", "epochs", 0, False),
        ("train", "epoch", 2, False),
        ("train", "micro_batch_size", 1.5, False),
        ("train", "schedule", "cosin", False),
        ("train", "compile", "auto", True),
        ("train", "compile", True, True),
        ("train", "compile", "yes", False),
        ("train", "max_steps", None, True),
        ("quant", "block_size", 64, True),
        ("quant", "block_size", 65, False),
        ("quant", "skip_modules", "q_proj", True),
        ("adapter", "target_modules", "all-linear", True),
        ("adapter", "target_modules", ["q_proj"], True),
        ("adapter", "target_modules", "q_proj", False),
        ("data", "train", "rows.jsonl", True),
        ("data", "train", {"path": "rows.jsonl", "weight": 2}, True),
        ("data", "train", ["rows.jsonl", {"path": "rows.jsonl", "columns": {"messages": "chat"}}], True),
        ("data", "train", [{"path": "rows.jsonl", "wieght": 2}], False),
        ("data", "train", [{"weight": 2}], False),
        ("data", "train", [], False),
        ("data", "split", "5%", True),
        ("data", "split", "5 %", True),
        ("data", "split", "105%", False),
        ("data", "split", 0.05, True),
        ("data", "split", 1, False),
        ("data", "max_lost_frac", 1, True),
        ("train", "learning_rate", "5%", False),
        ("run", "trackers", "tensorboard", True),
        ("run", "trackers", ["tensorboard", "mlflow"], False),
        ("nothing", "key", 1, False),
    ],
)
def test_editor_and_loader_agree(tmp_path: Path, section: str, key: str, value: Any, right: bool) -> None:
    """The same verdict on what can be told from a recipe's text alone."""
    recipe = {**GOOD, section: {**GOOD.get(section, {}), key: value}}
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    (tmp_path / "rows.jsonl").touch()
    assert accepted(path.read_text(encoding="utf-8")) == right
    if right:
        load_recipe(path)
    else:
        with pytest.raises(RecipeError):
            load_recipe(path)


def test_what_stands_at_the_top() -> None:
    for section in ("model", "data", "run"):
        assert not accepted(json.dumps({name: keys for name, keys in GOOD.items() if name != section}))
    assert accepted(json.dumps({**GOOD, "version": 1})) and not accepted(json.dumps({**GOOD, "version": 2}))
    assert accepted(json.dumps({**GOOD, "quant": None})) and not accepted(json.dumps({**GOOD, "quant": []}))
