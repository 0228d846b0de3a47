"""Whatever bytes a file holds, reading it gives rows or our faults; whatever a writer wrote is read as it was."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from qlora_train.data.formats import FORMATS, detect, parse_row
from qlora_train.data.problems import RowFault, SourceFault
from qlora_train.data.sources import json_list
from qlora_train.data.sources.open import open_source

QUICK = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
OF_MANY_ROWS = settings(QUICK, max_examples=50)  # each example holds several
NAMES = [
    "text",
    "prompt",
    "completion",
    "messages",
    "conversations",
    "instruction",
    "output",
    "tools",
    "history",
    "role",
]
TEXT = st.text(max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES) | TEXT, inner, max_size=3),
    max_leaves=8,
)
TURN = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "assistant", "tool", "system"]) | JSON,
        "content": TEXT | JSON,
        "tool_calls": JSON,
        "weight": JSON,
        "train": JSON,
    },
)
OBJECTS = st.dictionaries(st.sampled_from(NAMES), JSON | st.lists(TURN | JSON, max_size=4), max_size=3)
BITS = st.sampled_from(
    [b"[", b"]", b"{", b"}", b",", b'"', b"\n", b"\r", b":", b"\\u", b"\xff", b"\0", b"1", b" ", b"\t"]
)
NOISE = st.lists(BITS | st.binary(max_size=4), max_size=30).map(b"".join)
LINES = st.lists(NOISE | OBJECTS.map(lambda row: json.dumps(row).encode()), max_size=5).map(b"\n".join)
LISTS = st.lists(NOISE | OBJECTS.map(lambda row: json.dumps(row).encode()), max_size=4).map(
    lambda x: b"[" + b",".join(x) + b"]"
)


def read_all(path: Path, row_format: str | None) -> tuple[list[int], list[int]]:
    """The numbers of the rows, and of those that are at fault, in the file or in the format."""
    bad: list[int] = []
    good: list[int] = []
    source = open_source(str(path))
    for raw in source.read(lambda number, fault, text, num_bytes: bad.append(number)):
        assert source.fetch([raw.locator]) == [raw.columns] or "NaN" in str(raw.columns)
        try:
            row = parse_row(source.place(raw.number), raw.columns, row_format or detect(raw.columns))
        except RowFault as fault:
            assert fault.what and fault.fix
            bad.append(raw.number)
        else:
            assert row.where == source.place(raw.number) and str(raw.number) in row.where
            good.append(raw.number)
    return good, bad


@QUICK
@given(
    content=LINES | LISTS | NOISE,
    name=st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.tsv"]),
    row_format=st.sampled_from([None, *FORMATS]),
)
@example(content=b'{"messages": [{"role": "user", "content": "q"}]}', name="a.json", row_format=None)
def test_any_bytes_give_rows_or_our_faults(tmp_path: Path, content: bytes, name: str, row_format: str | None) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    try:
        good, bad = read_all(path, row_format)
    except SourceFault as fault:
        assert fault.what and fault.fix
    else:
        assert good or bad
        first = 0 if b"[" in content else 1  # a list on one line is numbered by its elements
        assert all(first <= number <= max(content.count(b"\n"), content.count(b",")) + 1 for number in good + bad)


@QUICK
@given(row=OBJECTS, row_format=st.sampled_from(list(FORMATS)))
def test_any_columns_give_a_row_or_a_fault(row: dict[str, Any], row_format: str) -> None:
    try:
        assert parse_row("f:1", row, row_format).where == "f:1"
    except RowFault as fault:
        assert fault.what and fault.fix


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
PLAIN_ROWS = st.lists(st.dictionaries(st.text(max_size=5), PLAIN, max_size=3), min_size=1, max_size=6)
UNICODE = st.text(st.characters(codec="utf-8"), max_size=20)


def no_fault(number: int, fault: RowFault, text: str, num_bytes: int) -> None:
    pytest.fail(f"row {number}: {fault.what}")


def rows_of(path: Path) -> list[dict[str, object]]:
    source = open_source(str(path))
    rows = list(source.read(no_fault))
    assert source.fetch([row.locator for row in reversed(rows)]) == [row.columns for row in reversed(rows)]
    return [row.columns for row in rows]


@OF_MANY_ROWS
@given(rows=PLAIN_ROWS, newline=st.sampled_from(["\n", "\r\n", "\n\n"]))
def test_json_lines_are_read_as_written(tmp_path: Path, rows: list[dict[str, Any]], newline: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(newline.join(map(json.dumps, rows)).encode())
    assert rows_of(tmp_path / "a.jsonl") == rows


@OF_MANY_ROWS
@given(rows=PLAIN_ROWS, indent=st.sampled_from([None, 0, 2]), chunk_bytes=st.integers(1, 64), ascii_only=st.booleans())
def test_json_lists_are_read_as_written(
    tmp_path: Path, rows: list[dict[str, Any]], indent: int | None, chunk_bytes: int, ascii_only: bool
) -> None:
    text = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
    (tmp_path / "a.json").write_bytes(text.encode(errors="replace"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_list, "_CHUNK_BYTES", chunk_bytes)
        read = rows_of(tmp_path / "a.json")
    assert read == json.loads(text.encode(errors="replace"))


@QUICK
@given(
    rows=st.lists(st.tuples(UNICODE, UNICODE), min_size=1, max_size=5),
    quoting=st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]),
)
def test_csv_is_read_as_written(tmp_path: Path, rows: list[tuple[str, str]], quoting: Any) -> None:
    text = io.StringIO()
    csv.writer(text, quoting=quoting).writerows([("a", "b"), *rows])
    (tmp_path / "a.csv").write_bytes(text.getvalue().encode())
    assert rows_of(tmp_path / "a.csv") == [{"a": a or None, "b": b or None} for a, b in rows]


@OF_MANY_ROWS
@given(
    texts=st.lists(UNICODE | st.none(), min_size=1, max_size=30),
    lists=st.lists(st.lists(UNICODE, max_size=5), min_size=1, max_size=5),
)
def test_tables_are_read_as_written(tmp_path: Path, texts: list[str | None], lists: list[list[str]]) -> None:
    rows = [{"text": text, "words": lists[index % len(lists)]} for index, text in enumerate(texts)]
    schema = pa.schema([("text", pa.string()), ("words", pa.list_(pa.string()))])
    table = pa.Table.from_pylist(rows, schema=schema)
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    with pa.ipc.new_file(tmp_path / "a.arrow", schema) as writer:
        writer.write_table(table, max_chunksize=7)
    assert rows_of(tmp_path / "a.parquet") == rows_of(tmp_path / "a.arrow") == rows
