"""A recipe file and overrides -> a checked Recipe with the origin of every value; the resolved recipe, both ways."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from qlora_train.errors import Problem, RecipeError
from qlora_train.recipe import reader
from qlora_train.recipe.advice import KEYS, advise_key, advise_section, list_keys, near_files
from qlora_train.recipe.explain import explain, section_model, shapes_of
from qlora_train.recipe.methods import METHODS
from qlora_train.recipe.partial import partial_section
from qlora_train.recipe.reader import Node, one_line
from qlora_train.recipe.schema import Recipe, Section
from qlora_train.recipe.validate import cross_check

COMMAND_LINE = "command line"
VERSION_KEY, SCHEMA_VERSION = "version", 1  # of what the keys of a recipe mean
MAX_ADVICE = 100  # problems; finding near names takes a millisecond or more for each


@dataclass(frozen=True)
class LoadedRecipe:
    """A checked recipe, its file, and for every dotted key `file:line`, `command line` or `default`."""

    recipe: Recipe
    path: Path
    origins: dict[str, str]


@dataclass(frozen=True)
class _Setting:
    """One `section.key: value` as given; `source` is a file as shown to the user, or the command line."""

    value: Node
    source: str
    line: int
    folder: Path | None

    def at(self, node: Node) -> str:
        return self.source if self.source == COMMAND_LINE else f"{self.source}:{node.line}:{node.column}"

    @property
    def origin(self) -> str:
        return self.source if self.source == COMMAND_LINE else f"{self.source}:{self.line}"


@dataclass
class _Draft:
    """What was read so far: settings by dotted key, keys that a misspelt name stood for, and all problems."""

    settings: dict[str, _Setting]
    meant: set[str]
    sections: dict[str, str]  # where each section of the file starts
    problems: list[Problem]
    listed: set[str] = field(default_factory=set)  # sections of which a problem has told all keys

    def add(self, what: str, fix: str, where: str) -> None:
        self.problems.append(Problem(what, fix, where))


def load_recipe(path: Path, overrides: Sequence[str] = (), *, with_data: bool = True) -> LoadedRecipe:
    """The recipe of a file with `section.key=value` overrides; one RecipeError lists everything that is wrong.

    `with_data=False` lets the files of rows be absent.
    """
    file = Path(os.path.normpath(path.absolute()))
    source = _display(path, file)
    draft = _read(file, source, file.parent)
    _apply_overrides(draft, overrides)
    sections = _build(draft, source)
    origins = {
        f"{name}.{key}": draft.settings[f"{name}.{key}"].origin if f"{name}.{key}" in draft.settings else "default"
        for name, keys in KEYS.items()
        for key in keys
    }
    partial = Recipe.model_construct(**cast(dict[str, Any], sections))
    draft.problems += cross_check(partial, origins, with_data=with_data)
    _raise_if_any(draft.problems)
    return LoadedRecipe(Recipe(**cast(dict[str, Any], sections)), file, origins)


def load_resolved(path: Path) -> Recipe:
    """The recipe of a file that `resolved_yaml` wrote: its paths are taken as they are, files may be gone."""
    file = Path(os.path.normpath(path.absolute()))
    source = _display(path, file)
    draft = _read(file, source, None)
    sections = _build(draft, source)
    _raise_if_any(draft.problems)
    return Recipe(**cast(dict[str, Any], sections))


def with_overrides(recipe: Recipe, overrides: Sequence[str], sections: Sequence[str]) -> Recipe:
    """A loaded recipe with `section.key=value` overrides, of the named sections or keys only."""
    draft = _Draft({}, set(), {}, [])
    _apply_overrides(draft, overrides)
    for dotted in list(draft.settings):
        if dotted not in sections and dotted.partition(".")[0] not in sections:
            draft.add(f"{dotted}: cannot be changed here", f"only these can: {', '.join(sections)}", COMMAND_LINE)
            del draft.settings[dotted]
    built = _build(draft, COMMAND_LINE, recipe)
    changed = Recipe.model_construct(**cast(dict[str, Any], built))
    found = cross_check(changed, dict.fromkeys(draft.settings, COMMAND_LINE))
    # What the overrides did not touch is no concern here: the files that the run was trained on may be gone.
    _raise_if_any(draft.problems + [problem for problem in found if problem.where == COMMAND_LINE])
    return Recipe(**cast(dict[str, Any], built))


def recipe_as_dict(recipe: Recipe) -> dict[str, object]:
    """Plain data for JSON: paths as strings, tuples as lists."""
    plain: dict[str, object] = recipe.model_dump(mode="json")
    return plain


def resolved_yaml(loaded: LoadedRecipe) -> str:
    """Every key with its value, and behind it where the value came from; `load_resolved` reads it back."""
    lines = ["# Every key of the recipe, with its value and where the value came from. Paths are absolute."]
    lines.append(f"{VERSION_KEY}: {SCHEMA_VERSION}")
    for section, values in cast(dict[str, dict[str, object]], recipe_as_dict(loaded.recipe)).items():
        lines.append(f"{section}:")
        for key, value in values.items():
            origin = one_line(loaded.origins[f"{section}.{key}"], limit=1000)
            lines.append(f"  {key}: {reader.dump_value(value)}  # {origin}")
    return "\n".join(lines) + "\n"


def _raise_if_any(problems: list[Problem]) -> None:
    def order(problem: Problem) -> tuple[int, int, int]:
        """The file from top to bottom, then the command line."""
        match = re.search(r":(\d+)(?::(\d+))?\Z", problem.where or "")
        return (0, int(match[1]), int(match[2] or 0)) if match else (1, 0, 0)

    if problems:
        raise RecipeError(sorted(problems, key=order))


def _display(given: Path, file: Path) -> str:
    """The path relative to the current folder when below it, else as given; nothing a terminal would act on."""
    shown = os.path.relpath(file) if file.is_relative_to(Path.cwd()) else str(given)
    return one_line(shown, limit=1000)


def _read(file: Path, source: str, folder: Path | None) -> _Draft:
    """The settings of a file, with all unknown names as problems."""
    raw = _read_bytes(file, source)
    root, problems = reader.parse(reader.decode(raw, source), source)
    draft = _Draft({}, set(), {}, problems)
    if root is not None and isinstance(root.value, dict):
        _check_version(root.value.pop(VERSION_KEY, None), source)
    if root is None or not isinstance(root.value, dict):
        what = "the file is empty" if root is None else f"a recipe is a mapping of sections, not {_kind(root)}"
        place = f"{source}:1:1" if root is None else f"{source}:{root.line}:{root.column}"
        raise RecipeError(what, fix="write sections (model:, data:, run:) with keys indented below them", where=place)
    for name, (key, value) in root.value.items():
        _read_section(draft, name, key, value, _Setting(value, source, key.line, folder), set(root.value))
    return draft


def _check_version(given: tuple[Node, Node] | None, source: str) -> None:
    """A recipe may say which schema it is written in; one that is newer than this build means things unknown to it."""
    if given is None:
        return
    _, version = given
    known = version.value if type(version.value) is int else 0
    if known == SCHEMA_VERSION:
        return
    rewrite = f"write {VERSION_KEY}: {SCHEMA_VERSION}, or remove it"
    raise RecipeError(
        f"{VERSION_KEY}: the recipe is of schema {version.shown}, this build knows {SCHEMA_VERSION}",
        fix="install a newer qlora-train" if known > SCHEMA_VERSION else rewrite,
        where=f"{source}:{version.line}:{version.column}",
    )


def _read_bytes(file: Path, source: str) -> bytes:
    try:
        if file.is_dir():
            raise RecipeError("this is a folder, not a recipe", fix=_recipes_in(file), where=source)
        if not stat.S_ISREG(file.stat().st_mode):
            raise RecipeError("this is a device or a pipe, not a file", fix="save it as a file", where=source)
        with file.open("rb") as stream:
            return stream.read(reader.MAX_BYTES + 1)
    except FileNotFoundError:
        fix = near_files(file) or "check the path; `recipes/` holds recipes that run as they are"
        raise RecipeError("there is no such recipe", fix=fix, where=source) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or "the path is not valid"
        raise RecipeError(f"cannot be read: {reason}", fix="check the path and its permissions", where=source) from None


def _recipes_in(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir() if entry.suffix in (".yaml", ".yml"))[:5]
    return f"name a file in it: {', '.join(names)}" if names else "name a .yaml file"


def _kind(node: Node) -> str:
    return "a list" if isinstance(node.value, list) else "a mapping" if isinstance(node.value, dict) else node.shown


def _read_section(draft: _Draft, name: str, key: Node, value: Node, at: _Setting, present: set[str]) -> None:
    section: str | None = name
    if name not in KEYS:
        fix, section = advise_section(name) if len(draft.problems) < MAX_ADVICE else ("remove it", None)
        fix = "merge keys are not supported: write the keys out" if name == "<<" else fix
        draft.add(f"{one_line(name)}: unknown section", fix, at.at(key))
        section = None if section in present else section  # a misspelt section is read as the one it was meant to be
    if section is None or section in draft.sections:
        return
    draft.sections[section] = at.at(key)
    if isinstance(value.value, dict):
        for inner, (inner_key, inner_value) in value.value.items():
            _read_key(draft, section, inner, at.at(inner_key), replace(at, value=inner_value, line=inner_key.line))
    elif value.value is not None:
        draft.meant |= {f"{section}.{inner}" for inner in KEYS[section]}
        fix = _first_key(section, value)
        draft.add(f"{name}: {_kind(value)} stands where keys are wanted", fix, at.at(value))


def _first_key(section: str, value: Node) -> str:
    """How to write a section where somebody wrote one value."""
    if not isinstance(value.value, str):
        return f"indent keys below {section}:"
    key, written = next(iter(KEYS[section])), value.shown
    if section == "adapter" and written not in METHODS:
        written = "lora"
    return f"{section} is a section here; for its first key write {section}: {{{key}: {written}}}"


def _read_key(draft: _Draft, section: str, key: str, where: str, setting: _Setting) -> None:
    if key in KEYS[section]:
        draft.settings[f"{section}.{key}"] = setting
        return
    fix, meant = advise_key(section, key) if len(draft.problems) < MAX_ADVICE else ("remove it", [])
    fix = "merge keys are not supported: write the keys out" if key == "<<" else fix
    if fix == list_keys(section):
        fix = "remove it" if section in draft.listed else fix
        draft.listed.add(section)
    draft.meant.update(meant)
    draft.add(f"{section}.{one_line(key)}: unknown key", fix, where)


def _apply_overrides(draft: _Draft, overrides: Sequence[str]) -> None:
    seen: set[str] = set()
    for override in overrides:
        dotted, equals, text = override.partition("=")
        section, dot, key = (part.strip() for part in dotted.partition("."))
        name = one_line(dotted.strip())
        if not equals:
            draft.add(f"{one_line(override)}: an override without a value", "write section.key=value", COMMAND_LINE)
        elif section not in KEYS:
            draft.add(f"{name}: unknown section", advise_section(section)[0], COMMAND_LINE)
        elif not dot:
            draft.add(f"{name}: a whole section cannot be overridden", f"write {section}.key=value", COMMAND_LINE)
        elif (section_key := f"{section}.{key}") in seen:
            draft.add(f"{name}: given twice", "keep one of them", COMMAND_LINE)
        else:
            seen.add(section_key)
            options = shapes_of(section).get(key, {}).get("anyOf", [])
            node = _override_value(draft, name, text, nullable={"type": "null"} in options)
            if node is not None:
                setting = _Setting(node, COMMAND_LINE, 0, Path.cwd())
                _read_key(draft, section, key, COMMAND_LINE, setting)


def _override_value(draft: _Draft, name: str, text: str, *, nullable: bool) -> Node | None:
    try:
        node, problems = reader.parse(text, COMMAND_LINE)
    except RecipeError as error:
        fix = "write the value as in YAML: 1e-4, [a, b], or 'text in quotes'"
        node, problems = None, [Problem(problem.what, fix) for problem in error.problems]
    for problem in problems:
        draft.add(f"{name}: {problem.what}", problem.fix, COMMAND_LINE)
    if node is None and not problems:
        if not nullable:
            return Node(None, "", 0, 0)
        draft.add(f"{name}: no value", "write null for no value", COMMAND_LINE)
    return node


def _build(draft: _Draft, source: str, base: Recipe | None = None) -> dict[str, Section]:
    """The sections, over those of `base`. The problems go to the draft, and keys that are wrong cannot be read."""
    sections: dict[str, Section] = {}
    for section, keys in KEYS.items():
        given = {key: draft.settings[f"{section}.{key}"] for key in keys if f"{section}.{key}" in draft.settings}
        values: dict[str, Any] = dict(getattr(base, section)) if base else {}
        values |= {key: _convert(section, key, setting) for key, setting in given.items()}
        try:
            sections[section] = section_model(section)(**values)
        except ValidationError as error:
            where, errors = draft.sections.get(section, source), error.errors(include_url=False)
            draft.problems += explain(section, given, errors, draft.meant, where)
            wrong = {str(entry["loc"][0]) for entry in errors}
            sections[section] = partial_section(section_model(section), values, wrong)
    return sections


def _convert(section: str, key: str, setting: _Setting) -> object:
    return reader.to_field(shapes_of(section)[key], setting.value, setting.folder)
