"""The shapes a row may have, and the reading of files into rows of one shape."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from qlora_train.data.conversation import Message, parse_messages
from qlora_train.data.jsonl import read_objects, text_value
from qlora_train.data.problems import ProblemList, RowFault

Columns = Mapping[str, object]


@dataclass(frozen=True)
class MessagesRow:
    """A conversation that ends with an answer."""

    where: str  # path:line
    messages: tuple[Message, ...]


@dataclass(frozen=True)
class PromptCompletionRow:
    """A prompt and what is to follow it, both verbatim: no template, no space between them but their own."""

    where: str
    prompt: str
    completion: str


@dataclass(frozen=True)
class TextRow:
    """Plain text, trained on from end to end."""

    where: str
    text: str


Row = MessagesRow | PromptCompletionRow | TextRow


def _messages_row(where: str, columns: Columns) -> Row:
    return MessagesRow(where, parse_messages(columns["messages"]))


def _prompt_completion_row(where: str, columns: Columns) -> Row:
    completion = text_value(columns["completion"], "completion")
    if not completion.strip():
        raise RowFault("completion is empty", "fill it in, or leave the row out: there is nothing to train")
    return PromptCompletionRow(where, text_value(columns["prompt"], "prompt"), completion)


def _text_row(where: str, columns: Columns) -> Row:
    text = text_value(columns["text"], "text")
    if not text.strip():
        raise RowFault("text is empty", "leave the row out: there is nothing to train")
    return TextRow(where, text)


@dataclass(frozen=True)
class _Format:
    columns: tuple[str, ...]
    parse: Callable[[str, Columns], Row]


# In the order in which `auto` tries them: a set that has `messages` beside `prompt` keeps the whole conversation.
FORMATS: dict[str, _Format] = {
    "messages": _Format(("messages",), _messages_row),
    "prompt_completion": _Format(("prompt", "completion"), _prompt_completion_row),
    "text": _Format(("text",), _text_row),
}


def read_rows(paths: Sequence[Path], row_format: str) -> list[Row]:
    """Every row of the files, in order, or DataError with everything that is wrong in them (first 20 and the total).

    `row_format` is a name in `FORMATS`, or "auto": told by the columns of the first row, for all files.
    """
    problems = ProblemList()
    rows: list[Row] = []
    chosen = None if row_format == "auto" else row_format
    for path in paths:
        num_problems, num_objects = problems.total, 0
        for where, columns in read_objects(path, problems):
            num_objects += 1
            chosen = chosen or _closest_format(columns)
            try:
                rows.append(_parse(where, columns, chosen))
            except RowFault as fault:
                problems.add(fault.what, fault.fix, where)
        if not num_objects and problems.total == num_problems:
            problems.add("holds no rows", "fill the file, or take it out of the recipe", str(path))
    problems.raise_if_any()
    return rows


def _parse(where: str, columns: Columns, row_format: str | None) -> Row:
    """One row in the chosen format; RowFault where columns are missing or wrong."""
    if row_format is None:
        shapes = "; ".join(f"{name}: {' + '.join(entry.columns)}" for name, entry in FORMATS.items())
        raise RowFault(f"no format fits; columns found: {_listed(columns)}", f"rename the columns to one of {shapes}")
    entry = FORMATS[row_format]
    if missing := [name for name in entry.columns if name not in columns]:
        raise RowFault(*_missing_columns(missing, columns, row_format))
    return entry.parse(where, columns)


def _missing_columns(missing: list[str], columns: Columns, row_format: str) -> tuple[str, str]:
    """What to say, and the fix, where a row lacks columns of the format that the recipe or the first row chose."""
    names = ", ".join(map(repr, missing))
    what = f"lacks {names} of the format {row_format!r}; columns found: {_listed(columns)}"
    if near := _nearest(missing[0], columns):
        return what, f"rename {near!r} to {missing[0]!r}"
    other = next((name for name, entry in FORMATS.items() if columns.keys() >= set(entry.columns)), None)
    if other:
        return f"{what}, which is the format {other!r}", "keep rows of one format in a data set"
    return what, "add the column, or set data.format to what the rows are"


def _closest_format(columns: Columns) -> str | None:
    """The format whose columns are there, else the one whose columns are there but for spelling, else None."""
    for name, entry in FORMATS.items():
        if columns.keys() >= set(entry.columns):
            return name
    for name, entry in FORMATS.items():
        if any(_nearest(column, columns) for column in entry.columns):
            return name
    return None


def _nearest(wanted: str, columns: Iterable[str]) -> str | None:
    """The column that `wanted` was probably written as, if any."""
    lowered = {column.lower(): column for column in columns}
    near = get_close_matches(wanted, lowered, n=1, cutoff=0.75)
    return lowered[near[0]] if near else None


def _listed(columns: Columns) -> str:
    names = list(columns)
    return ", ".join(map(repr, names[:12])) + (f" and {len(names) - 12} more" if len(names) > 12 else "") or "none"
