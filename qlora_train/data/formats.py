"""The shapes a row may have, and the parsing of one row's columns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache

from qlora_train.data.conversation import SHAREGPT_ROLES, json_list, parse_messages, parse_tools
from qlora_train.data.problems import RowFault
from qlora_train.data.rows import MessagesRow, PromptCompletionRow, Row, TextRow
from qlora_train.data.sources.decode import decode_text
from qlora_train.data.values import json_name, text_value

Columns = Mapping[str, object]
ColumnMap = Mapping[str, str]  # our name -> the name in the file
_NO_MAP: ColumnMap = {}


def _messages_row(where: str, columns: Columns, names: ColumnMap) -> Row:
    turns = parse_messages(columns["messages"], "messages", _keys(names, "role", "content"))
    return MessagesRow(where, turns.messages, parse_tools(columns.get("tools")), turns.weights, turns.notes)


def _sharegpt_row(where: str, columns: Columns, names: ColumnMap) -> Row:
    """`conversations` of from/value, or of role/content; `system` and `tools` beside them, as LLaMA-Factory writes."""
    entries = json_list(columns["conversations"], "conversations", "messages", _SHAREGPT_SHAPE)
    keys = _keys(names, "from", "value")
    if entries and isinstance(entries[0], dict) and keys[0] not in entries[0] and "role" in entries[0]:
        keys = _keys(names, "role", "content")
    if (system := _optional_text(columns, "system")) and entries:
        if isinstance(entries[0], dict) and entries[0].get(keys[0]) == "system":
            raise RowFault("system is given twice: as a column and as conversations[0]", "keep one of them")
        turns, weights, notes = parse_messages(entries, "conversations", keys, SHAREGPT_ROLES)
        turns = ({"role": "system", "content": system}, *turns)
        weights = None if weights is None else (0.0, *weights)
    else:
        turns, weights, notes = parse_messages(entries, "conversations", keys, SHAREGPT_ROLES)
    return MessagesRow(where, turns, parse_tools(columns.get("tools")), weights, notes)


def _alpaca_row(where: str, columns: Columns, names: ColumnMap) -> Row:
    """A user message of the instruction and, after a blank line, the input where there is one; then the output.

    No "### Instruction:" is put around them: the model's own chat template says where a question and an answer begin.
    """
    question = text_value(columns["instruction"], "instruction")
    if given := _optional_text(columns, "input"):
        question = f"{question}\n\n{given}" if question.strip() else given
    if not question.strip():
        raise RowFault("instruction is empty", "fill it in, or leave the row out")
    output = text_value(columns["output"], "output")
    if not output.strip():
        raise RowFault("output is empty", "fill it in, or leave the row out: there is nothing to train")
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": output}]
    if (history := columns.get("history")) is not None and history != "":
        messages = [*_earlier_turns(history), *messages]
    if system := _optional_text(columns, "system"):
        messages = [{"role": "system", "content": system}, *messages]
    return MessagesRow(where, tuple(messages))


def _earlier_turns(history: object) -> list[dict[str, str]]:
    """The messages of alpaca's `history`, a list of pairs."""
    fix = 'write [["question", "answer"], ...]'
    messages = []
    for index, pair in enumerate(json_list(history, "history", "[question, answer] pairs", fix)):
        if not isinstance(pair, list) or len(pair) != 2:
            seen = f"a list of {len(pair)}" if isinstance(pair, list) else json_name(pair)
            raise RowFault(f"history[{index}] is {seen}; expected a question and its answer", fix)
        for role, text in zip(("user", "assistant"), pair, strict=True):
            content = text_value(text, f"history[{index}]'s {role} message")
            if role == "assistant" and not content.strip():
                raise RowFault(f"history[{index}] has an empty answer", "fill it in, or leave the pair out")
            messages.append({"role": role, "content": content})
    return messages


def _prompt_completion_row(where: str, columns: Columns, names: ColumnMap) -> Row:
    """Both verbatim; or, where both are lists of messages, one conversation that is trained on in the completion.

    Lists may stand as JSON text, as in the cells of a CSV file. Where only one of the two reads as such, both are text.
    """
    keys = _keys(names, "role", "content")
    prompt, completion = columns["prompt"], columns["completion"]
    if (turns := _turns_of_text(prompt, keys[0])) and (answers := _turns_of_text(completion, keys[0])):
        prompt, completion = turns, answers
    if isinstance(prompt, list) and isinstance(completion, list):
        for name, entries in (("prompt", prompt), ("completion", completion)):
            if not entries:
                raise RowFault(f"{name} is empty", "leave the row out")
        messages, weights, notes = parse_messages([*prompt, *completion], "prompt + completion", keys)
        weights = weights or tuple(float(message["role"] == "assistant") for message in messages)
        weights = (*([0.0] * len(prompt)), *weights[len(prompt) :])
        if not any(weights):
            raise RowFault("completion holds no answer to train", "end it with an assistant message")
        return MessagesRow(where, messages, parse_tools(columns.get("tools")), weights, notes)
    answer = text_value(completion, "completion")
    if not answer.strip():
        raise RowFault("completion is empty", "fill it in, or leave the row out: there is nothing to train")
    return PromptCompletionRow(where, text_value(prompt, "prompt"), answer)


def _turns_of_text(value: object, role: str) -> list[object] | None:
    """The messages that JSON text holds, or None where it holds anything but a list of objects with a role."""
    if not isinstance(value, str) or value.lstrip()[:1] != "[":
        return None
    try:
        entries = decode_text(value)
    except RowFault:
        return None
    if isinstance(entries, list) and all(isinstance(entry, dict) and role in entry for entry in entries):
        return entries
    return None


def _text_row(where: str, columns: Columns, names: ColumnMap) -> Row:
    text = text_value(columns["text"], "text")
    if not text.strip():
        raise RowFault("text is empty", "leave the row out: there is nothing to train")
    return TextRow(where, text)


def _optional_text(columns: Columns, name: str) -> str:
    """The text of a column that may be absent, null or blank: then it is empty."""
    value = columns.get(name)
    text = "" if value is None else text_value(value, name)
    return text if text.strip() else ""


def _keys(names: ColumnMap, role: str, content: str) -> tuple[str, str]:
    """What a message's role and content are called in the file."""
    return names.get(role, role), names.get(content, content)


@dataclass(frozen=True)
class _Format:
    columns: tuple[str, ...]
    parse: Callable[[str, Columns, ColumnMap], Row]
    optional: tuple[str, ...] = ()
    inner: tuple[str, ...] = ()  # names inside the messages, which a column map may also give

    @property
    def names(self) -> frozenset[str]:
        return frozenset((*self.columns, *self.optional, *self.inner))


# In the order in which they are told: a set that has `messages` beside `prompt` keeps the whole conversation.
# Together their names are the recipe's COLUMN_NAMES.
FORMATS: dict[str, _Format] = {
    "messages": _Format(("messages",), _messages_row, ("tools",), ("role", "content")),
    "sharegpt": _Format(("conversations",), _sharegpt_row, ("system", "tools"), ("from", "value", "role", "content")),
    "prompt_completion": _Format(("prompt", "completion"), _prompt_completion_row, ("tools",), ("role", "content")),
    "alpaca": _Format(("instruction", "output"), _alpaca_row, ("input", "system", "history")),
    "text": _Format(("text",), _text_row),
}
_SHAREGPT_SHAPE = 'write [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]'


def detect(columns: Columns, column_map: ColumnMap = _NO_MAP) -> str | None:
    """The format whose columns are there, else the one whose columns are there but for spelling, else None.

    A column map narrows the choice to formats that have the columns it names.
    """
    return _detect(tuple(columns), tuple(column_map.items()))


@lru_cache(maxsize=64)  # rows are asked about until one fits, and nearly all have the same columns
def _detect(columns: tuple[str, ...], map_items: tuple[tuple[str, str], ...]) -> str | None:
    column_map = dict(map_items)
    mapped = [name for name, entry in FORMATS.items() if column_map.keys() <= entry.names]
    for names in (mapped, list(FORMATS)):
        for name in names:
            if all(column_map.get(column, column) in columns for column in FORMATS[name].columns):
                return name
        for name in names:
            if any(_nearest(column_map.get(column, column), columns) for column in FORMATS[name].columns):
                return name
    return mapped[0] if column_map and mapped else None


def parse_row(where: str, columns: Columns, row_format: str | None, column_map: ColumnMap = _NO_MAP) -> Row:
    """One row in a format of `FORMATS`; RowFault where columns are missing or wrong, or the format is None."""
    if row_format is None:
        what = f"no format fits; columns found: {_listed(columns)}"
        if likely := _likely_map(columns):
            raise RowFault(what, f"if that is what they hold, write data.columns: {likely}")
        shapes = "; ".join(f"{name}: {' + '.join(entry.columns)}" for name, entry in FORMATS.items())
        raise RowFault(what, f"rename the columns, or map them with `columns`, to one of {shapes}")
    entry = FORMATS[row_format]
    if column_map:
        columns = _renamed(columns, entry, column_map)
    for name in entry.columns:
        if name not in columns:
            raise RowFault(*_missing_columns(columns, row_format))
    return entry.parse(where, columns, column_map)


def _renamed(columns: Columns, entry: _Format, column_map: ColumnMap) -> Columns:
    """The columns under our names. Names of other formats are passed over: one map may serve several sources."""
    wanted = (*entry.columns, *entry.optional)
    theirs = {ours: name for ours, name in column_map.items() if ours in wanted}
    for ours, name in theirs.items():
        if name not in columns and ours in entry.columns:
            near = _nearest(name, columns)
            what = f"lacks {name!r}, which is to be read as {ours!r}; columns found: {_listed(columns)}"
            raise RowFault(what, f"map {ours!r} to {near!r}" if near else "correct the column map, or add the column")
    kept = {name: value for name, value in columns.items() if name not in theirs}
    return kept | {ours: columns[name] for ours, name in theirs.items() if name in columns}


def _missing_columns(columns: Columns, row_format: str) -> tuple[str, str]:
    """What to say, and the fix, where a row lacks columns of the format that the recipe or the first row chose."""
    missing = [name for name in FORMATS[row_format].columns if name not in columns]
    names = ", ".join(map(repr, missing))
    what = f"lacks {names} of the format {row_format!r}; columns found: {_listed(columns)}"
    if near := _nearest(missing[0], columns):
        return what, f"rename {near!r} to {missing[0]!r}"
    other = next((name for name, entry in FORMATS.items() if columns.keys() >= set(entry.columns)), None)
    if other:
        return f"{what}, which is the format {other!r}", "keep rows of one format in a source"
    return what, "add the column, or set the source's format to what its rows are"


# Names under which other sets have our columns; the first that is there is offered.
_CONVERSATIONS = ("dialogue", "dialog", "conversation", "chat", "turns")
_QUESTIONS = ("question", "instruction", "query", "prompt", "problem", "user", "input")
_ANSWERS = ("answer", "output", "response", "completion", "reply", "assistant", "solution", "target")
_TEXTS = ("content", "document", "body", "article", "story")


def _likely_map(columns: Columns) -> str:
    """A column map by which a format fits, as it is written in a recipe; empty where none is likely."""
    written = {name.strip().lower(): name for name in columns}

    def first(names: Sequence[str]) -> str | None:
        return next((written[name] for name in names if name in written), None)

    question, answer = first(_QUESTIONS), first(_ANSWERS)
    if question and answer:
        return f"{{instruction: {question}, output: {answer}}}"
    turns, text = first(_CONVERSATIONS), first(_TEXTS)
    return f"{{messages: {turns}}}" if turns else f"{{text: {text}}}" if text else ""


def _nearest(wanted: str, columns: Iterable[str]) -> str | None:
    """The column that `wanted` was probably written as, if any."""
    lowered = {column.lower(): column for column in columns}
    near = get_close_matches(wanted.lower(), lowered, n=1, cutoff=0.75)
    return lowered[near[0]] if near else None


def _listed(columns: Columns) -> str:
    names = list(columns)
    return ", ".join(map(repr, names[:12])) + (f" and {len(names) - 12} more" if len(names) > 12 else "") or "none"
