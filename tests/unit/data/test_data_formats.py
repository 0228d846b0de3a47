"""Every fault of a file or a row is reported at its line, with a fix; what is harmless is read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_train.data import jsonl
from qlora_train.data.formats import FORMATS, MessagesRow, PromptCompletionRow, TextRow, read_rows
from qlora_train.errors import DataError, MachineError

Write = Callable[..., Path]
PC = {"prompt": "a", "completion": " b"}
USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def refusal(path: Path | Sequence[Path], row_format: str = "auto") -> DataError:
    with pytest.raises(DataError) as caught:
        read_rows([path] if isinstance(path, Path) else path, row_format)
    assert all(problem.fix for problem in caught.value.problems)
    return caught.value


def only(error: DataError) -> tuple[str | None, str, str]:
    (problem,) = error.problems
    return problem.where, problem.what, problem.fix


def test_auto_tells_each_format_by_its_columns(write: Write) -> None:
    chat = write([{"messages": [USER, ANSWER], "id": 7}])
    assert read_rows([chat], "auto") == [MessagesRow(f"{chat}:1", (USER, ANSWER))]
    pairs = write([PC], "b.jsonl")
    assert read_rows([pairs], "auto") == [PromptCompletionRow(f"{pairs}:1", "a", " b")]
    text = write([{"text": "x", "meta": {"score": 1.5}}], "c.jsonl")
    assert read_rows([text], "auto") == [TextRow(f"{text}:1", "x")]


def test_files_are_read_in_order_and_share_one_format(write: Write) -> None:
    first, second = write([{"text": "1"}], "b.jsonl"), write([{"text": "2"}], "a.jsonl")
    assert [row.where for row in read_rows([first, second], "auto")] == [f"{first}:1", f"{second}:1"]
    where, what, fix = only(refusal([first, write([PC], "c.jsonl")]))
    assert where is not None and where.endswith("c.jsonl:1")
    assert "lacks 'text'" in what and "'prompt_completion'" in what and "one format" in fix


def test_bom_crlf_blank_lines_and_no_last_newline_are_fine(write: Write) -> None:
    path = write(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n{"text": "b"}')
    assert [(row.where, row.text) for row in read_rows([path], "text") if isinstance(row, TextRow)] == [
        (f"{path}:1", "a"),
        (f"{path}:4", "b"),
    ]


def test_escaped_surrogate_pair_is_one_character(write: Write) -> None:
    (row,) = read_rows([write(b'{"text": "\\ud83d\\ude00"}\n')], "auto")
    assert isinstance(row, TextRow) and row.text == "\U0001f600"


def test_missing_file_names_its_neighbour(write: Write) -> None:
    path = write([PC])
    where, what, fix = only(refusal(path.with_name("trian.jsonl")))
    assert where == str(path.with_name("trian.jsonl")) and "no such file" in what and str(path) in fix


def test_directory_names_a_file_in_it(write: Write) -> None:
    path = write([PC])
    _, what, fix = only(refusal(path.parent))
    assert what == "is a directory" and str(path) in fix


def test_unknown_extension(write: Write) -> None:
    _, what, _ = only(refusal(write(b"prompt,completion\n", "rows.csv")))
    assert "'.csv'" in what


def test_fifo_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows.jsonl")
    assert "regular file" in only(refusal(tmp_path / "rows.jsonl"))[1]


@pytest.mark.parametrize("content", [b"", b"\n\n \r\n", b"\xef\xbb\xbf"])
def test_file_without_rows(write: Write, content: bytes) -> None:
    assert only(refusal(write(content)))[1] == "holds no rows"


def test_unreadable_file_is_the_machines_fault(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write([PC])

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # root may read everything, so the right itself cannot be taken away
    with pytest.raises(MachineError, match="Permission denied") as caught:
        read_rows([path], "auto")
    assert caught.value.problems[0].where == str(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"text": "a"}\n'.encode("utf-16"), "UTF-16"),
        ('{"text": "a"}\n'.encode("utf-16-le"), "UTF-16"),
        ('{"text": "a"}\n'.encode("utf-16-be"), "UTF-16"),
        (b"\x1f\x8b\x08\x00rest", "gzip"),
        (b"PAR1rest", "Parquet"),
        (b'[\n{"text": "a"}\n]\n', "JSON list"),
    ],
)
def test_other_kinds_of_file_are_named_once(write: Write, content: bytes, says: str) -> None:
    assert says in only(refusal(write(content)))[1]


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (b'{"text": "a" "b"}', "not JSON: Expecting ',' delimiter at column 14, byte offset 41"),
        (b'{"text": "caf\xe9"}', "byte 0xe9 at byte offset 41 of the file is not UTF-8"),
        (b"[1]", "the row is a list; expected an object"),
        (b"null", "the row is null"),
        (b'{"text": NaN}', "holds NaN"),
        (b'{"text": "a", "loss": -Infinity}', "holds -Infinity"),
        (b'{"text": "a", "text": "b"}', "'text' stands twice"),
        (b'{"text": ' + b"[" * 3000 + b"]" * 3000 + b"}", "nested too deeply"),
        (b'{"text": ' + b"7" * 5000 + b"}", "not usable JSON"),
        (b'{"text": 7}', "text is a number; expected text"),
        (b'{"text": true}', "text is a boolean"),
        (b'{"text": null}', "text is null"),
        (b'{"text": {"a": 1}}', "text is an object"),
        (b'{"text": " \\n"}', "text is empty"),
        (b'{"text": "ab\\ud800"}', "half of a surrogate pair, \\ud800, at character 2"),
        (b'{"text": "ab\\u0000"}', "NUL character at 2"),
        (b'{"text": "ab\x00"}', "not JSON: Invalid control character"),
        (b'{"body": "a", "id": 1}', "lacks 'text' of the format 'text'; columns found: 'body', 'id'"),
    ],
)
def test_fault_of_a_row_is_reported_at_its_line(write: Write, bad: bytes, says: str) -> None:
    path = write(b'{"text": "before"}\n\n       \n' + bad + b'\n{"text": "after"}\n')
    where, what, _ = only(refusal(path))
    assert where == f"{path}:4" and says in what


def test_byte_offset_points_at_the_byte(write: Write) -> None:
    content = '{"text": "é"}\n{"text": "ü", oops}\n'.encode()
    what = only(refusal(write(content)))[1]
    offset = int(what.split("byte offset ")[1].split(" ")[0])
    assert content[offset:].startswith(b"oops")


@pytest.mark.parametrize("tail", [b'{"text": "cut o', b'{"text"', b'{"text": "a"'])
def test_truncated_last_line_is_told_apart(write: Write, tail: bytes) -> None:
    where, what, fix = only(refusal(write(b'{"text": "a"}\n' + tail)))
    assert where is not None and where.endswith(":2") and "ends within this row" in what and "cut off" in fix


def test_giant_line_is_measured_not_held(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 64)
    path = write(b'{"text": "' + b"a" * 987 + b'"}\n{"text": 1}\n')
    first, second, total = refusal(path).problems
    assert first.where == f"{path}:1" and "1,000 bytes long; the limit is 64" in first.what
    assert second.where == f"{path}:2" and "2 problems" in total.what
    fits = write(b'{"text": "' + b"a" * 51 + b'"}\n', "fits.jsonl")
    assert fits.stat().st_size == 64 and len(read_rows([fits], "auto")) == 1


@pytest.mark.parametrize(
    ("columns", "row_format", "says", "fix"),
    [
        ({"promt": "a", "completion": "b"}, "auto", "lacks 'prompt'", "rename 'promt' to 'prompt'"),
        ({"Messages": []}, "auto", "lacks 'messages'", "rename 'Messages' to 'messages'"),
        ({"prompt": "a"}, "prompt_completion", "lacks 'completion'", "add the column"),
        ({"text": "a"}, "messages", "which is the format 'text'", "one format"),
        ({"a": 1, "b": 2}, "auto", "no format fits; columns found: 'a', 'b'", "rename the columns"),
        ({}, "auto", "columns found: none", "rename the columns"),
    ],
)
def test_missing_columns(write: Write, columns: dict[str, Any], row_format: str, says: str, fix: str) -> None:
    where, what, remedy = only(refusal(write([columns]), row_format))
    assert where is not None and where.endswith(":1") and says in what and fix in remedy


def test_wrong_type_in_a_later_row(write: Write) -> None:
    error = refusal(write([PC, {"prompt": "a", "completion": ["b"]}, {"prompt": 3, "completion": "b"}, PC]))
    assert [str(problem.where).rsplit(":", 1)[-1] for problem in error.problems] == ["2", "3", "None"]
    assert "completion is a list" in error.problems[0].what and "prompt is a number" in error.problems[1].what


def test_the_first_twenty_and_the_total(write: Write) -> None:
    first, second = write([{"text": 1}] * 15, "a.jsonl"), write([{"text": 1}] * 15, "b.jsonl")
    problems = refusal([first, second], "text").problems
    assert [problem.where for problem in problems[:-1]] == [
        *(f"{first}:{line}" for line in range(1, 16)),
        *(f"{second}:{line}" for line in range(1, 6)),
    ]
    assert "30 problems" in problems[-1].what and "first 20" in problems[-1].what


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ("hello", "messages is text; expected a list"),
        ([], "messages is empty"),
        (["hello"], "messages[0] is text; expected an object"),
        ([{"content": "q"}, ANSWER], "messages[0] has no 'role'; fields found: 'content'"),
        ([USER, {"role": "assistant"}], "messages[1] has no 'content'"),
        ([USER, {"role": "assistant", "content": None}], "messages[1].content is null"),
        ([{"role": "human", "content": "q"}, ANSWER], "messages[0].role is 'human'; known: system, user, assistant"),
        ([USER, {"role": "assistant", "content": " \n"}], "messages[1] is an empty answer"),
        ([ANSWER, USER, ANSWER], "messages[0] is an answer before any question"),
        ([USER, ANSWER, ANSWER], "messages[2] is a second answer in a row"),
        ([USER, ANSWER, USER], "messages ends with a user message: there is no answer to train"),
        ([USER, {**ANSWER, "tool_calls": [{"id": 1}]}], "messages[1] calls a tool"),
        ([USER, {**ANSWER, "weight": 0}], "messages[1].weight is a number"),
        ([USER, {"role": "assistant", "content": "\ud800"}], "messages[1].content holds half of a surrogate pair"),
    ],
)
def test_conversation_faults(write: Write, messages: object, says: str) -> None:
    where, what, _ = only(refusal(write([{"messages": [USER, ANSWER]}, {"messages": messages}])))
    assert where is not None and where.endswith(":2") and says in what


def test_null_tool_calls_and_further_text_fields_are_fine(write: Write) -> None:
    answer = {**ANSWER, "tool_calls": None, "name": "bot", "refusal": None}
    (row,) = read_rows([write([{"messages": [USER, answer]}])], "auto")
    assert isinstance(row, MessagesRow) and row.messages[1] == {**ANSWER, "name": "bot"}


def test_empty_completion(write: Write) -> None:
    assert only(refusal(write([{"prompt": "a", "completion": " "}])))[1] == "completion is empty"


JSON = st.recursive(st.none() | st.booleans() | st.floats() | st.text(), lambda inner: st.lists(inner, max_size=3))
LINES = st.lists(
    st.binary(max_size=40)
    | st.dictionaries(st.sampled_from(["text", "prompt", "completion", "messages"]), JSON, max_size=3).map(
        lambda row: json.dumps(row).encode()
    ),
    max_size=5,
).map(b"\n".join)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=LINES | st.binary(max_size=200), row_format=st.sampled_from(["auto", *FORMATS]))
def test_any_bytes_give_rows_or_a_data_error(tmp_path: Path, content: bytes, row_format: str) -> None:
    path = tmp_path / "any.jsonl"
    path.write_bytes(content)
    try:
        rows = read_rows([path], row_format)
    except DataError as error:
        assert error.problems and len(error.problems) <= 21
    else:
        assert rows and len({row.where for row in rows}) == len(rows)
