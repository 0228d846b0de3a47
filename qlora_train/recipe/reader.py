"""YAML as a recipe means it: values that know their place in the text, no surprises of YAML 1.1, nothing executed."""

from __future__ import annotations

import os
import re
import stat
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qlora_train.errors import Problem, RecipeError
from qlora_train.printable import find_secret, printable
from qlora_train.recipe.sources import is_hub_id

MAX_BYTES = 2**20
MAX_DEPTH = 16
MAX_NODES = 10_000  # PyYAML is slow: with MAX_BYTES this keeps the worst file to seconds

Scalar = None | bool | int | float | str

# YAML 1.2's core schema, less octal and hexadecimal. 300 digits: more than any key takes, fewer than float() can hold.
_INT = r"[-+]?(?:0|[1-9][0-9]{0,299})"
_FLOAT = (
    r"[-+]?(?:(?:0|[1-9][0-9]*)\.[0-9]*(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?|(?:0|[1-9][0-9]*)[eE][-+]?[0-9]+"
    r"|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)"
)
_RESOLVERS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", _INT, list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
)


@dataclass(frozen=True)
class Node:
    """One value of the text: line and column count from 1, `written` is the text it was read from."""

    value: Scalar | list[Node] | dict[str, tuple[Node, Node]]
    written: str
    line: int
    column: int

    @property
    def shown(self) -> str:
        """`written` on one line of bounded length, with nothing that a terminal would act on."""
        if isinstance(self.value, list):
            return one_line("[" + ", ".join(item.written for item in self.value[:20]) + "]")
        if isinstance(self.value, dict):
            return one_line("{" + ", ".join(f"{key}: ..." for key in list(self.value)[:20]) + "}")
        return one_line(self.written) or "an empty value"


class _Loader(yaml.SafeLoader):
    """Composes nodes and refuses what a recipe has no use for: anchors, aliases, tags, depth, size."""

    depth = count = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        self.depth += 1
        self.count += 1
        tag = getattr(event, "tag", None)
        reason = None
        if getattr(event, "anchor", None):
            reason = "anchors, aliases and merge keys (&, *, <<) are not supported"
        elif tag:
            tag = one_line(tag.replace("tag:yaml.org,2002:", "!!"))
            reason = f"the tag {tag} is not allowed: a recipe is plain data"
        elif self.depth > MAX_DEPTH:
            reason = f"more than {MAX_DEPTH} levels of nesting"
        elif self.count > MAX_NODES:
            reason = f"more than {MAX_NODES} values"
        if reason:
            raise yaml.composer.ComposerError(None, None, reason, event.start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


_Loader.yaml_implicit_resolvers = {}  # none of YAML 1.1's: no yes/no, dates, 12:30 or 010
for _name, _pattern, _starts in _RESOLVERS:
    _Loader.add_implicit_resolver(f":{_name}", re.compile(f"(?:{_pattern})\\Z"), _starts)


class _Dumper(yaml.SafeDumper):
    """Quotes every string that our loader or a loader of YAML 1.1 would take for something else."""


for _start, _rules in _Loader.yaml_implicit_resolvers.items():
    for _tag, _regexp in _rules:
        _Dumper.add_implicit_resolver(_tag, _regexp, [_start])


def _represent_str(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _represent_str)


def one_line(text: str, limit: int = 80) -> str:
    """The text on one line, cut to `limit`, as `printable`."""
    line = " ".join(text.split())
    return printable(line if len(line) <= limit else line[: limit - 3] + "...")


def forbidden_character(text: str) -> str | None:
    """The first control character, line separator or lone surrogate, escaped; None if there is none."""
    found = (char for char in text if unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp"))
    return next((ascii(char)[1:-1] for char in found), None)


def dump_value(value: object) -> str:
    """The value as YAML on one line, in a form that `parse` reads back to an equal value."""
    dumped: str = yaml.dump([value], Dumper=_Dumper, default_flow_style=True, width=2**31, allow_unicode=True)
    return dumped.rstrip("\n")[1:-1]


def decode(raw: bytes, source: str) -> str:
    """Text of a recipe file; a RecipeError for what is too large or not UTF-8 text."""
    if len(raw) > MAX_BYTES:
        raise RecipeError("the file is larger than 1 MiB: no recipe is", fix="give a recipe, not data", where=source)
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise RecipeError("the file is UTF-16 text", fix="save it as UTF-8", where=f"{source}:1:1")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = _place(source, raw[: error.start].decode("utf-8-sig", "replace"))
        what = f"byte 0x{raw[error.start]:02x} is not UTF-8 text"
        raise RecipeError(what, fix="save the file as UTF-8", where=where) from None
    return text


def parse(text: str, source: str) -> tuple[Node | None, list[Problem]]:
    """The tree of one YAML document (None if it is empty) and its duplicate keys; a RecipeError for broken YAML."""
    bad = yaml.reader.Reader.NON_PRINTABLE.search(text)
    if bad:
        what = f"the character {ascii(bad.group())[1:-1]} is not allowed in YAML"
        raise RecipeError(what, fix="remove it (is this a text file?)", where=_place(source, text[: bad.start()]))
    if secret := find_secret(text):
        what = "this looks like an access token or a password: recipes are copied into run folders and read by others"
        fix = "remove it; `hf auth login` or the variable HF_TOKEN give access to the hub"
        raise RecipeError(what, fix=fix, where=_place(source, text[: secret.start()]))
    loader = _Loader(text)
    problems: list[Problem] = []
    try:
        root = loader.get_single_node()
        return (None if root is None else _convert(root, text, source, problems, ())), problems
    except yaml.MarkedYAMLError as error:
        raise RecipeError([_syntax_problem(error, text, source)]) from None
    except (ValueError, OverflowError):  # PyYAML lets chr() fail on "\UFFFFFFFF", int() on `%YAML 1.<5000 digits>`
        mark = loader.get_mark()
        where = f"{source}:{mark.line + 1}:{mark.column + 1}"
        raise RecipeError("an escape or a directive that is no valid YAML", fix="remove it", where=where) from None
    finally:
        loader.dispose()


def _place(source: str, before: str) -> str:
    """`source:line:column` of the character that follows the text `before`."""
    lines = re.split(r"\r\n|\r|\n", before)
    return f"{source}:{len(lines)}:{len(lines[-1]) + 1}"


def _syntax_problem(error: yaml.MarkedYAMLError, text: str, source: str) -> Problem:
    mark: Any = error.problem_mark or error.context_mark
    what = str(error.problem or error.context)
    if error.context and error.context_mark and error.problem:
        what += f" ({error.context} that starts at line {error.context_mark.line + 1})"
    lines = text.splitlines()
    if mark.line < len(lines) and lines[mark.line].strip():
        what += f"; the line reads: {one_line(lines[mark.line])}"
    fix = "write one document of `section:` lines, with `key: value` lines indented below them"
    if "'\\t'" in what:
        fix = "indent with spaces: YAML allows no tabs"
    elif "single document" in what:
        fix = "keep one document: remove the `---` line or what follows it"
    elif isinstance(error, yaml.composer.ComposerError) and error.context is None:
        fix = "write the value out plainly"
    return Problem(what.replace("\n", " "), fix, f"{source}:{mark.line + 1}:{mark.column + 1}")


def _convert(node: yaml.Node, text: str, source: str, problems: list[Problem], path: tuple[str, ...]) -> Node:
    start, end = node.start_mark, node.end_mark
    value: Any
    if isinstance(node, yaml.SequenceNode):
        value = [_convert(item, text, source, problems, path) for item in node.value]
    elif isinstance(node, yaml.MappingNode):
        value = _convert_mapping(node, text, source, problems, path)
    else:
        value = _scalar(node.tag, node.value)
        bad = forbidden_character(node.value)
        if bad:
            what = f"{one_line('.'.join(path))}: the text contains the character {bad}"
            place = f"{source}:{start.line + 1}:{start.column + 1}"
            raise RecipeError(what, fix="write it on one line, as plain text", where=place)
    return Node(value, text[start.index : end.index].strip(), start.line + 1, start.column + 1)


def _convert_mapping(
    node: yaml.MappingNode, text: str, source: str, problems: list[Problem], path: tuple[str, ...]
) -> dict[str, tuple[Node, Node]]:
    pairs: dict[str, tuple[Node, Node]] = {}
    for key_node, value_node in node.value:
        here = (*path, str(key_node.value))
        key, value = (_convert(part, text, source, problems, here) for part in (key_node, value_node))
        place = f"{source}:{key.line}:{key.column}"
        if not isinstance(key_node, yaml.ScalarNode):
            problems.append(Problem("a key is a list or a mapping", "write keys as plain names", place))
        elif key_node.value in pairs:
            first = pairs[key_node.value][0].line
            what = f"{one_line('.'.join(here))}: given twice, at line {first} and at line {key.line}"
            problems.append(Problem(what, "keep one of them", place))
        else:
            pairs[key_node.value] = (key, value)
    return pairs


def _scalar(tag: str, text: str) -> Scalar:
    match tag:
        case ":null":
            return None
        case ":bool":
            return text.lower() == "true"
        case ":int":
            return int(text)
        case ":float":
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text


@dataclass(frozen=True)
class Unusable:
    """Stands in for a value that no type accepts, so that validation refuses it; carries the reason and what to do."""

    reason: str
    fix: str


def to_field(shape: Mapping[str, Any], node: Node, folder: Path | None) -> object:
    """The node's value as the type that a JSON schema asks for, where that loses nothing; else as it is."""
    options = shape.get("anyOf", [shape])
    array = next((option for option in options if option.get("type") == "array"), None)
    mapping = next((option for option in options if option.get("type") == "object"), None)
    value = node.value
    if isinstance(value, list):
        items = array["items"] if array else {}
        return tuple(to_field(items, item, folder) for item in value)
    types = {option.get("type") for option in options}
    if array and "string" not in types and value is not None:
        return (to_field(array["items"], node, folder),)  # one stands for a list of one
    if isinstance(value, dict):
        known = mapping.get("properties", {}) if mapping else {}
        return {key: to_field(known.get(key, {}), item, folder) for key, (_, item) in value.items()}
    if type(value) is int and "number" in types:
        return float(value)
    if type(value) is float and "integer" in types:
        return Unusable("", "")  # pydantic takes 64.0 for a Literal[64]
    return _from_text(value, options, mapping, folder) if isinstance(value, str) else value


def _from_text(
    text: str, options: Sequence[Mapping[str, Any]], mapping: Mapping[str, Any] | None, folder: Path | None
) -> object:
    """What a plain string stands for: a path against `folder`, a source by its path alone, a percentage, itself."""
    formats = {option.get("format") for option in options}
    if "path" in formats:
        return _path(text, folder)
    if "model" in formats:
        return _model_path(text, folder)
    if "source" in formats:
        return _source_path(text, folder)
    if mapping and "path" in mapping.get("properties", {}):
        return {"path": to_field(mapping["properties"]["path"], Node(text, text, 0, 0), folder)}
    percent = re.fullmatch(r"(\d{1,2}(?:\.\d+)?) ?%", text)
    if percent and any(option.get("exclusiveMaximum", option.get("maximum")) == 1 for option in options):
        return float(percent[1]) / 100
    return text


def _model_path(text: str, folder: Path | None) -> str | Unusable:
    """A local model as an absolute path; a hub id and `package:NAME/FILE` as they are."""
    if not text or text.startswith("package:"):
        return text
    return _local_or_hub(text, folder, local=text.endswith(".gguf"))


def _source_path(text: str, folder: Path | None) -> str | Unusable:
    """A local file or folder of rows as an absolute path; a hub id as it is."""
    return _local_or_hub(text, folder, local=not is_hub_id(text)) if text else text


def _local_or_hub(text: str, folder: Path | None, *, local: bool) -> str | Unusable:
    path = _path(text, folder)
    if isinstance(path, Unusable):
        return path
    local = local or text.startswith(("./", "../", "/", "~")) or kind_of(path) is not None
    return str(path) if local and folder else text


def kind_of(path: Path) -> str | None:
    """What stands at the path: `file`, `folder`, or None for nothing that can be reached."""
    try:
        return "folder" if stat.S_ISDIR(path.stat().st_mode) else "file"
    except (OSError, ValueError):  # also a name that is too long, which Path.exists lets through as an exception
        return None


def _path(text: str, folder: Path | None) -> Path | Unusable:
    """The path, absolute against `folder`; untouched without one."""
    if not text.strip():
        return Unusable("is empty", "")
    if folder is None:
        return Path(text)
    if "${" in text or text.startswith("$"):
        return Unusable("has a variable in it", "write the path out: variables are not replaced; only a leading ~ is")
    try:
        full = os.path.normpath(folder / Path(text).expanduser())
    except RuntimeError:
        return Unusable("names the home folder of an unknown user", "write the path out")
    bad = forbidden_character(full)
    return Unusable(f"leads to a path with the character {bad}", "rename the folder") if bad else Path(full)
