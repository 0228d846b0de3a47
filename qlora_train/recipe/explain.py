"""pydantic's errors in our words: the value as written, what is allowed, and what to do about it."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, Protocol, cast

from pydantic_core import ErrorDetails

from qlora_train.errors import Problem
from qlora_train.recipe.advice import nearest
from qlora_train.recipe.reader import Node, Unusable, dump_value, one_line
from qlora_train.recipe.schema import Recipe, Section

_RANGE_ERRORS = {"greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number"}


class Given(Protocol):
    """A value that somebody wrote, and how its place is shown."""

    @property
    def value(self) -> Node: ...

    def at(self, node: Node) -> str: ...


@cache
def shapes_of(section: str) -> dict[str, dict[str, Any]]:
    """JSON schema of every key of a section."""
    schema = section_model(section).model_json_schema()
    properties: dict[str, dict[str, Any]] = _inlined(schema["properties"], schema.get("$defs", {}))
    return properties


def _inlined(shape: Any, definitions: Mapping[str, Any]) -> Any:
    """The schema with what it refers to in place of each reference."""
    if isinstance(shape, list):
        return [_inlined(item, definitions) for item in shape]
    if not isinstance(shape, dict):
        return shape
    if "$ref" in shape:
        return _inlined(definitions[shape["$ref"].rpartition("/")[2]], definitions)
    return {key: _inlined(value, definitions) for key, value in shape.items()}


def section_model(section: str) -> type[Section]:
    return cast(type[Section], Recipe.model_fields[section].annotation)


def explain(
    section: str, given: Mapping[str, Given], errors: list[ErrorDetails], meant: Collection[str], where: str
) -> Iterator[Problem]:
    """pydantic's errors in our words: one for each key, or for each wrong element of a list."""
    by_key: dict[str, list[ErrorDetails]] = {}
    for error in errors:
        by_key.setdefault(str(error["loc"][0]), []).append(error)
    for key, of_key in by_key.items():
        shape, dotted = shapes_of(section)[key], f"{section}.{key}"
        if key not in given:
            if dotted not in meant:
                fix = f"add `{key}:` below `{section}:`. {shape.get('description', '')}"
                yield Problem(f"{dotted}: missing", fix, where)
            continue
        setting, seen = given[key], set[tuple[int | str, ...]]()
        for error in sorted(of_key, key=lambda error: -len(error["loc"])):
            name, inner, node, loc = _locate(dotted, shape, setting.value, error["loc"][1:])
            if any(deeper[: len(loc)] == loc for deeper in seen):
                continue  # one problem a place: a list of which nothing is right is "too short" besides
            seen.add(loc)
            if error["type"] == "extra_forbidden":
                names = list(inner["properties"])
                close = nearest(name.rpartition(".")[2], names)
                fix = f"did you mean {close[0]}?" if close else f"remove it; the keys here are: {', '.join(names)}"
                yield Problem(f"{name}: unknown key", fix, setting.at(node))
            else:
                yield _value_problem(name, inner, node, error, setting.at(node))


def _locate(
    dotted: str, shape: Mapping[str, Any], node: Node, loc: Sequence[int | str]
) -> tuple[str, Mapping[str, Any], Node, tuple[int | str, ...]]:
    """Name, schema and node of the value that an error is about, as deep as what was written goes; and its path."""
    done: list[int | str] = []
    for part in loc:
        option = next((o for o in shape.get("anyOf", [shape]) if o.get("type") in ("array", "object")), None)
        if option is None:
            break
        if option["type"] == "array" and isinstance(part, str):
            continue  # pydantic's name for one option of several
        if option["type"] == "array" and isinstance(part, int):
            if isinstance(node.value, list):
                dotted, node = f"{dotted}[{part}]", node.value[part]
            shape = option["items"]
        elif option["type"] == "object" and isinstance(node.value, dict) and part in node.value:
            key, value = node.value[str(part)]
            if part not in option.get("properties", {}) and "properties" in option:
                return f"{dotted}.{one_line(str(part))}", option, key, (*done, part)
            dotted, node = f"{dotted}.{one_line(str(part))}", value
            shape = option.get("properties", {}).get(part) or option.get("additionalProperties") or {}
        elif option["type"] == "object" and part == "path" and isinstance(node.value, str):
            shape = option["properties"]["path"]
        else:
            break
        done.append(part)
    return dotted, shape, node, tuple(done)


def _value_problem(dotted: str, shape: Mapping[str, Any], node: Node, error: ErrorDetails, where: str) -> Problem:
    value, seen = node.value, error["input"]
    if isinstance(seen, Unusable) and seen.fix:
        return Problem(f"{dotted}: {node.shown} {seen.reason}", seen.fix, where)
    fix = f"give {_words(shape, largest=math.inf if error['type'].startswith('less') else 1e6)}"
    if value is None and "default" in shape:
        fix += f", or leave the key out for its default, {dump_value(shape['default'])}"
    elif isinstance(value, str):
        allowed = [str(name) for option in shape.get("anyOf", [shape]) for name in _allowed(option)]
        close = nearest(value, allowed)
        fix = f"did you mean {close[0]}? {fix[0].upper()}{fix[1:]}" if close else fix
        fix += "" if close else _as_list(shape, value)
        number = _is_number(shape) and re.fullmatch(r"0*(\d[\d_]{0,15})", value)
        fix += f", such as {number[1].replace('_', '')} (no quotes, leading zeros or _)" if number else ""
    elif isinstance(value, float) and value.is_integer() and abs(value) < 1e15 and error["type"] not in _RANGE_ERRORS:
        fix += f"; write {int(value)}"
    if error["type"] in _RANGE_ERRORS:
        return Problem(f"{dotted}: {node.shown} is out of range", fix, where)
    if error["type"] in ("too_short", "string_too_short"):
        return Problem(f"{dotted}: {node.shown} is empty", fix, where)
    return Problem(f"{dotted}: {node.shown} is not {_words(shape, largest=-math.inf)}", fix, where)


def _as_list(shape: Mapping[str, Any], value: str) -> str:
    """How to write a string where a list of strings may stand too: `q_proj,v_proj` as `[q_proj, v_proj]`."""
    names = [one_line(name) for name in re.split(r"[,\s]+", value.strip("[]() ")) if name]
    arrays = [option for option in shape.get("anyOf", []) if option.get("type") == "array"]
    takes_names = any(option["items"].get("type") == "string" for option in arrays)
    return f": write [{', '.join(names)}]" if takes_names and names else ""


def _is_number(shape: Mapping[str, Any]) -> bool:
    return any(option.get("type") in ("integer", "number") for option in shape.get("anyOf", [shape]))


def _allowed(option: Mapping[str, Any]) -> list[object]:
    return cast(list[object], option.get("enum", [option["const"]] if "const" in option else []))


def _words(shape: Mapping[str, Any], largest: float) -> str:
    """A JSON schema in words, bounds up to `largest` included: `a whole number from 1 to 4096, or null`."""
    if "anyOf" in shape:
        return ", or ".join(_words(option, largest) for option in shape["anyOf"])
    if allowed := _allowed(shape):
        return ("one of " if len(allowed) > 1 else "") + ", ".join(map(str, allowed))
    match shape.get("type"):
        case "array":
            plural = {"path": "paths", "object": "sources (a path, or {path: ..., weight: ...})"}.get(
                shape["items"].get("format") or shape["items"].get("type"), "strings"
            )
            return f"a list of {'one or more ' if shape.get('minItems') else ''}{plural}"
        case "integer" | "number" as kind:
            return _number_words(shape, largest, whole=kind == "integer")
        case "boolean":
            return "true or false"
        case "null":
            return "null"
        case "object":
            return "a path, or {path: ..., weight: ...}" if "properties" in shape else "a mapping of strings"
    return "a path" if shape.get("format") in ("path", "source") else "a string"


def _number_words(shape: Mapping[str, Any], largest: float, *, whole: bool) -> str:
    bounds = []
    if "exclusiveMinimum" in shape:
        low = shape["exclusiveMinimum"]
        bounds.append((low, f"of at least {low + 1:.15g}" if whole else f"above {low:.15g}"))
    for key, words in (("minimum", "of at least"), ("maximum", "at most"), ("exclusiveMaximum", "below")):
        if key in shape:
            bounds.append((shape[key], f"{words} {shape[key]:.15g}"))
    shown = " and ".join(words for bound, words in bounds if bound <= largest)
    return f"a {'whole ' if whole else ''}number {shown}".rstrip()
