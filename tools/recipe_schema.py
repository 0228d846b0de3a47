"""Write recipes/recipe.schema.json, by which editors complete and check recipes; `--check` only compares."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from qlora_train.recipe.explain import section_model, shapes_of
from qlora_train.recipe.load import SCHEMA_VERSION, VERSION_KEY
from qlora_train.recipe.schema import Recipe

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = ROOT / "recipes" / "recipe.schema.json"
MODELINE = "# yaml-language-server: $schema=recipe.schema.json"

VERSION = "Of what the keys mean; may be left out."
PERCENTAGE = {"type": "string", "pattern": r"^\d{1,2}(\.\d+)? ?%$"}
# Of a key rather than of one form of its value.
ABOUT = ("description", "default")
# Our own formats tell the loader what a text is a path to; no editor knows them.
DROPPED = ("title", "format")


def schema() -> dict[str, Any]:
    """A JSON schema of what may stand in a recipe file: the models', and the short forms that the loader takes."""
    sections = {}
    for name, field in Recipe.model_fields.items():
        required = [key for key, inner in section_model(name).model_fields.items() if inner.is_required()]
        sections[name] = {
            "type": "object" if field.is_required() else ["object", "null"],
            "properties": {key: as_written(shape) for key, shape in shapes_of(name).items()},
            "required": required,
            "additionalProperties": False,
        }
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "A recipe of qlora_train",
        "type": "object",
        "properties": {VERSION_KEY: {"const": SCHEMA_VERSION, "description": VERSION}, **sections},
        "required": [name for name, field in Recipe.model_fields.items() if field.is_required()],
        "additionalProperties": False,
    }


def as_written(shape: dict[str, Any]) -> dict[str, Any]:
    """The schema of one value, with what stands for it in a file (recipe/reader.py): one item for a list of one, a path
    for a source, a percentage for a share."""
    about = {key: shape[key] for key in ABOUT if key in shape}
    options = [_inner(option) for option in shape.get("anyOf", [shape])]
    forms = list(options)
    texts = any(option.get("type") == "string" for option in options)
    for option in options:
        if option.get("type") == "array" and not texts:
            forms += option["items"].get("anyOf", [option["items"]])
        if "path" in option.get("properties", {}):
            forms.append(option["properties"]["path"])
        if option.get("maximum", option.get("exclusiveMaximum")) == 1:
            forms.append(PERCENTAGE)
    return {**about, **(forms[0] if len(forms) == 1 else {"anyOf": forms})}


def _inner(option: dict[str, Any]) -> dict[str, Any]:
    """One form of a value, and what is in it."""
    plain = {key: value for key, value in option.items() if key not in (*ABOUT, *DROPPED)}
    if "items" in plain:
        plain["items"] = as_written(plain["items"])
    if "properties" in plain:
        plain["properties"] = {key: as_written(inner) for key, inner in plain["properties"].items()}
    return plain


def main() -> int:
    """Write the file, or say that it is stale."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; 1 when the file is stale")
    text = json.dumps(schema(), indent=1, ensure_ascii=False) + "\n"
    if parser.parse_args().check:
        stale = not SCHEMA.exists() or SCHEMA.read_text(encoding="utf-8") != text
        if stale:
            print(f"{SCHEMA.relative_to(ROOT)} is stale: run tools/recipe_schema.py")
        return int(stale)
    SCHEMA.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
