"""What the shell may offer: recipes, and the keys and values of overrides. Needs the recipe's schema, never torch."""

from __future__ import annotations

import json
from pathlib import Path

import typer

MAX_FILES = 200
RECIPE_OF_RUN = "recipe.resolved.yaml"


def recipes(incomplete: str) -> list[str]:
    """YAML files whose path begins so, also those in a folder whose path does. None: the shell offers any file."""
    start = Path(incomplete)
    folder, name = (start, "") if incomplete.endswith("/") or not incomplete else (start.parent, start.name)
    beside = [entry for entry in _entries(folder) if entry.name.startswith(name)]
    found = [*beside, *(inner for entry in beside if entry.is_dir() for inner in _entries(entry))]
    return [str(path) for path in found if path.suffix in (".yaml", ".yml")][:MAX_FILES]


def runs(incomplete: str) -> list[str]:
    """Run folders whose path begins so, and folders that may hold some."""
    start = Path(incomplete)
    folder, name = (start, "") if incomplete.endswith("/") or not incomplete else (start.parent, start.name)
    beside = [entry for entry in _entries(folder) if entry.is_dir() and entry.name.startswith(name)]
    inner = [each for entry in beside for each in _entries(entry)]
    return [str(path) for path in [*beside, *inner] if (path / RECIPE_OF_RUN).is_file()][:MAX_FILES]


def cards(incomplete: str) -> list[str]:
    """Names of cards that begin so, whatever their case."""
    from qlora_train.memory.cards import CARDS

    return [card.name for card in CARDS if card.name.lower().startswith(incomplete.lower())]


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError:
        return []


def overrides(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """`section.key=` with what the key means; once only one key fits, its values.

    bash takes `=` for the end of a word: the key and `=` are then earlier words, and the value alone is wanted.
    """
    before = ctx.params.get("overrides") or []
    if len(before) > 1 and before[-1] == "=":
        return [(value, "") for value in _values(before[-2])]
    keys = _keys()
    section_key, equals, _ = incomplete.partition("=")
    fitting = [section_key] if equals else [key for key in keys if key.startswith(incomplete)]
    if len(fitting) != 1 or fitting[0] not in keys:
        return [(f"{key}=", keys[key]) for key in fitting if key in keys]
    # Two offers at least, with the key in common: the shell then sets no space after the `=`.
    values = _values(fitting[0])
    return [(f"{fitting[0]}={value}", keys[fitting[0]]) for value in (values if len(values) > 1 else ["", *values])]


def _keys() -> dict[str, str]:
    """Every key, dotted, with its description."""
    from qlora_train.recipe.advice import KEYS
    from qlora_train.recipe.explain import shapes_of

    return {f"{name}.{key}": str(shapes_of(name)[key].get("description", "")) for name in KEYS for key in KEYS[name]}


def _values(dotted: str) -> list[str]:
    """The values that a key may have where these are few, else its default."""
    from qlora_train.recipe.advice import KEYS
    from qlora_train.recipe.explain import shapes_of

    section, _, key = dotted.partition(".")
    if key not in KEYS.get(section, ()):
        return []
    shape = shapes_of(section)[key]
    found: list[object] = []
    for option in shape.get("anyOf", [shape]):
        found += option.get("enum", [option["const"]] if "const" in option else [])
        found += [True, False] if option.get("type") == "boolean" else []
        found += option.get("items", {}).get("enum", [])
    found = found or ([shape["default"]] if "default" in shape else [])
    return [value if isinstance(value, str) else json.dumps(value) for value in found]
