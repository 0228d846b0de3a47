"""JSONL, JSON and CSV: every row at its line, every fault with its place, and rows found again by their offsets."""

from __future__ import annotations

import hashlib
import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_train.data.problems import RowFault, SourceFault
from qlora_train.data.sources import csv_records, decode, json_list, jsonl
from qlora_train.data.sources.base import Columns
from qlora_train.data.sources.open import open_source
from qlora_train.errors import MachineError

Put = Callable[[str, bytes], str]
Fault = tuple[int, str, str]  # number, what, text


@pytest.fixture
def put(tmp_path: Path) -> Put:
    """Writes a file; gives its path."""

    def _put(name: str, content: bytes) -> str:
        (tmp_path / name).write_bytes(content)
        return str(tmp_path / name)

    return _put


def read(path: str) -> tuple[list[tuple[int, Columns]], list[Fault]]:
    """The rows of a source and its faults; holds that `fetch` finds the same rows, in any order, on a fresh source."""
    faults: list[Fault] = []

    def on_fault(number: int, fault: RowFault, text: str, num_bytes: int) -> None:
        assert fault.fix and num_bytes
        faults.append((number, fault.what, text))

    rows = list(open_source(path).read(on_fault))
    backwards = rows[::-1] + rows[:1]
    assert open_source(path).fetch([row.locator for row in backwards]) == [row.columns for row in backwards]
    return [(row.number, row.columns) for row in rows], faults


def no_fault(number: int, fault: RowFault, text: str, num_bytes: int) -> None:
    pytest.fail(f"row {number}: {fault.what}")


def refusal(path: str) -> SourceFault:
    with pytest.raises(SourceFault) as caught:
        read(path)
    assert caught.value.fix
    return caught.value


def test_jsonl_bom_crlf_blank_lines_and_no_last_newline_are_fine(put: Put) -> None:
    path = put("a.jsonl", b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n{"text": "b"}')
    assert read(path) == ([(1, {"text": "a"}), (4, {"text": "b"})], [])
    assert open_source(path).place(4) == f"{path}:4"


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "A.JSONL"])
def test_objects_line_by_line_under_every_name(put: Put, name: str) -> None:
    assert read(put(name, b'{"a": 1}\n{"a": [null, 2.5]}\n')) == ([(1, {"a": 1}), (2, {"a": [None, 2.5]})], [])


def test_escaped_surrogate_pair_is_one_character(put: Put) -> None:
    assert read(put("a.jsonl", b'{"text": "\\ud83d\\ude00"}\n'))[0] == [(1, {"text": "\U0001f600"})]


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
        (b'{"a": {"b": 1, "b": 2}}', "'b' stands twice"),
        (b'{"text": ' + b"[" * 3000 + b"]" * 3000 + b"}", "nested too deeply"),
        (b'{"text": ' + b"7" * 5000 + b"}", "not usable JSON"),
        (b'{"text": "ab\x00"}', "not JSON: Invalid control character"),
        (b'{"text": 1} {"text": 2}', "not JSON: Extra data at column 13"),
    ],
)
def test_jsonl_fault_is_reported_at_its_line(put: Put, bad: bytes, says: str) -> None:
    path = put("a.jsonl", b'{"text": "before"}\n\n       \n' + bad + b'\n{"text": "after"}\n')
    rows, ((number, what, text),) = read(path)
    assert [number for number, _ in rows] == [1, 5]
    assert number == 4 and says in what and text == bad.decode(errors="replace")


def test_byte_offset_points_at_the_byte(put: Put) -> None:
    content = '{"text": "é"}\n{"text": "ü", oops}\n'.encode()
    ((_, what, _),) = read(put("a.jsonl", content))[1]
    offset = int(what.split("byte offset ")[1].split(" ")[0])
    assert content[offset:].startswith(b"oops")


@pytest.mark.parametrize("tail", [b'{"text": "cut o', b'{"text"', b'{"text": "a"'])
def test_truncated_last_line_is_told_apart(put: Put, tail: bytes) -> None:
    ((number, what, _),) = read(put("a.jsonl", b'{"text": "a"}\n' + tail))[1]
    assert number == 2 and "the file ends within this row" in what


def test_giant_line_is_measured_not_held(put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (jsonl, decode):
        monkeypatch.setattr(module, "MAX_ROW_BYTES", 64)
    rows, ((number, what, text),) = read(put("a.jsonl", b'{"text": "' + b"a" * 987 + b'"}\n{"text": 1}\n'))
    assert (number, what) == (1, "the row is 1,000 bytes long; the limit is 64") and len(text) < 100
    assert rows == [(2, {"text": 1})]
    assert len(read(put("fits.jsonl", b'{"text": "' + b"a" * 51 + b'"}\n'))[0]) == 1


def test_memory_is_bounded_however_long_a_line_is(put: Put) -> None:
    path = put("a.jsonl", b'{"a": ')
    os.truncate(path, 120 * 2**20)
    tracemalloc.start()
    try:
        _, ((_, what, _),) = read(path)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "125,829,120 bytes long" in what and peak_bytes < 60 * 2**20


JSON_LIST = '[\n  {"text": "é",\n   "n": 1},\n\n  {"text": "b"}, {"text": "c"}\n]\n'.encode()


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("chunk_bytes", [1, 7, 2**20])
def test_json_list_has_the_line_of_each_element(
    put: Put, monkeypatch: pytest.MonkeyPatch, name: str, bom: bytes, chunk_bytes: int
) -> None:
    monkeypatch.setattr(json_list, "_CHUNK_BYTES", chunk_bytes)
    rows, faults = read(put(name, bom + JSON_LIST))
    assert rows == [(2, {"text": "é", "n": 1}), (5, {"text": "b"}), (5, {"text": "c"})] and not faults


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ("7", "the row is a number; expected an object"),
        ('"a"', "the row is text"),
        ('{"a": NaN}', "holds NaN"),
        ('{"a": 1, "a": 2}', "'a' stands twice"),
    ],
)
@pytest.mark.parametrize("chunk_bytes", [1, 2**20])
def test_json_element_that_is_no_row(
    put: Put, monkeypatch: pytest.MonkeyPatch, bad: str, says: str, chunk_bytes: int
) -> None:
    monkeypatch.setattr(json_list, "_CHUNK_BYTES", chunk_bytes)
    rows, ((number, what, text),) = read(put("a.json", f'[{{"a": 1}},\n{bad},\n{{"a": 3}}]'.encode()))
    assert rows == [(1, {"a": 1}), (3, {"a": 3})]
    assert number == 2 and says in what and text == bad


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'[{"a": 1}\n{"a": 2}]', "line 2, byte offset 10: is not JSON: Expecting ',' or ']'"),
        (b'[{"a": 1},\n{"a" 2}]', "line 2, byte offset 16: is not JSON: Expecting ':' delimiter"),
        (b'[{"a": 1},]', "line 1, byte offset 10: is not JSON: Expecting value"),
        (b'[{"a": 1}', "the file ends within the list"),
        (b'[{"a": 1},', "the file ends within the list"),
        (b'[{"a": "cut', "the file ends within the list"),
        (b"[", "the file ends within the list"),
        (b'[{"a": 1}] []', "line 1, byte offset 11: is not JSON: there is more after the end"),
        (b'[{"a": 1},\n{"a": "\xe9"}]', "line 2: byte 0xe9 at byte offset 18 of the file is not UTF-8"),
        (b'[{"a": "\xe2\x82', "line 1: byte 0xe2 at byte offset 8 of the file is not UTF-8"),
        (b"[" + b"[" * 3000 + b"]" * 3000 + b"]", "line 1, byte offset 1: the JSON is nested too deeply"),
        (b"[]", "holds no rows"),
        (b'{\n  "data": [{"a": 1}]\n}\n', "holds one JSON object over several lines"),
    ],
)
@pytest.mark.parametrize("chunk_bytes", [1, 2**20])
def test_json_that_cannot_be_read_on(
    put: Put, monkeypatch: pytest.MonkeyPatch, content: bytes, says: str, chunk_bytes: int
) -> None:
    monkeypatch.setattr(json_list, "_CHUNK_BYTES", chunk_bytes)
    assert says in refusal(put("a.json", content)).what


def test_giant_json_element(put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (json_list, decode):
        monkeypatch.setattr(module, "MAX_ROW_BYTES", 64)
    monkeypatch.setattr(json_list, "_CHUNK_BYTES", 16)
    path = put("a.json", b'[{"a": 1},\n{"a": "' + b"a" * 1000 + b'"}]')
    assert refusal(path).what.startswith("line 2, byte offset 11: the row is ")


def test_csv_cells_are_text_and_empty_ones_null(put: Put) -> None:
    content = '\ufeffprompt,completion\r\n"a, ""b""\nc",1.0\r\n\r\n,é\r\n"",x'.encode()
    assert read(put("a.csv", content)) == (
        [
            (2, {"prompt": 'a, "b"\nc', "completion": "1.0"}),
            (5, {"prompt": None, "completion": "é"}),
            (6, {"prompt": None, "completion": "x"}),
        ],
        [],
    )


def test_tsv(put: Put) -> None:
    assert read(put("a.tsv", b"a\tb\n1,2\t3\n"))[0] == [(2, {"a": "1,2", "b": "3"})]


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (b"1,2,3", "has 3 cells, but the header names 2 columns"),
        (b"1", "has 1 cells, but the header names 2 columns"),
        (b'"a"b,c', "is not CSV: ',' expected after '\"'"),
        (b"a,\xe9", "byte 0xe9 at byte offset 10 of the file is not UTF-8"),
        (b'a,"x\n\xe9"', "byte 0xe9 at byte offset 13 of the file is not UTF-8"),
        (b"a,b\rc,d", "is not CSV: new-line character seen in unquoted field"),
    ],
)
def test_csv_fault_is_reported_at_its_line(put: Put, bad: bytes, says: str) -> None:
    rows, ((number, what, text),) = read(put("a.csv", b"a,b\n1,2\n" + bad + b"\n3,4\n"))
    assert [columns for _, columns in rows] == [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]
    assert number == 3 and says in what and text == bad.decode(errors="replace")


@pytest.mark.parametrize(
    ("bad", "line"),
    [
        (b'3,"4\n5,6\n7,8\n', 3),
        (b'3,"4', 3),
        (b'"a\nb","c\n5,6\n7,8\n', 4),  # the record begins a line before the quote
        (b'3,"4\n5,6\n7,"8"\n9,10\n', 3),  # closed by a later row's quote
        (b'"a\n""b""","say ""c""\n5,6\n', 4),
    ],
)
def test_csv_quote_that_never_ends_is_no_single_bad_row(put: Put, bad: bytes, line: int) -> None:
    fault = refusal(put("a.csv", b"a,b\n1,2\n" + bad))
    assert fault.what.startswith(f"line {line}: a quote opens here, and where its cell ends cannot be told: ")
    assert "each quote inside doubled" in fault.fix


@pytest.mark.parametrize(
    ("name", "content", "sizes"),
    [
        ("a.jsonl", b'{"a": 1}\n["\xc3\xa9"]\n[' + b"1" * 98 + b"\n", [7, 100]),
        ("a.json", b'[{"a": 1},["\xc3\xa9"], ' + b"1" * 40 + b"]", [6, 40]),
        ("a.csv", b"a,b\n1,2\n\xc3\xa9\n" + b"1" * 99 + b"\n", [3, 100]),
    ],
)
def test_faults_have_the_size_of_their_row(
    put: Put, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, sizes: list[int]
) -> None:
    for module in (jsonl, csv_records):
        monkeypatch.setattr(module, "MAX_ROW_BYTES", 64)
    found: list[int] = []
    list(open_source(put(name, content)).read(lambda number, fault, text, num_bytes: found.append(num_bytes)))
    assert found == sizes


def test_the_same_bytes_read_otherwise_are_another_kind(put: Put) -> None:
    kinds = {name: open_source(put(name, b"[{}]")).kind for name in ("a.csv", "a.tsv", "a.json")}
    assert kinds == {"a.csv": "csv:,", "a.tsv": "csv:\t", "a.json": "json"}
    assert open_source(put("b.json", b"{}")).kind == open_source(put("b.jsonl", b"{}")).kind == "jsonl"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"a,a\n1,2\n", "the header names the column 'a' twice"),
        (b",a\n0,1\n", "the header names no column 1"),
        (b'"a"b,c\n', "the header, line 1: is not CSV"),
        (b"a,b\n", "holds no rows"),
        (b"", "holds no rows"),
        (b"\n\n", "holds no rows"),
    ],
)
def test_csv_header(put: Put, content: bytes, says: str) -> None:
    assert says in refusal(put("a.csv", content)).what


def test_giant_csv_row_is_passed_over(put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (csv_records, decode):
        monkeypatch.setattr(module, "MAX_ROW_BYTES", 64)
    rows, ((number, what, _),) = read(put("a.csv", b"a,b\nx," + b"a" * 997 + b"\n3,4\n"))
    assert rows == [(3, {"a": "3", "b": "4"})]
    assert (number, what) == (2, "the row is 1,000 bytes long; the limit is 64")
    rows, faults = read(put("b.csv", b'a,b\nx,"' + b"a" * 995 + b'"\n3,4\n'))
    assert rows == [(3, {"a": "3", "b": "4"})] and len(faults) == 1


def test_giant_csv_row_in_quotes_may_be_many_rows(put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (csv_records, decode):
        monkeypatch.setattr(module, "MAX_ROW_BYTES", 64)
    for content in (b'a,b\nx,"' + b"a\n" * 40 + b'"\n', b'a,b\nx,"' + b"a" * 995 + b"\n3,4\n"):
        assert refusal(put("open.csv", content)).what.startswith("line 2: a quote opens here")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
@pytest.mark.parametrize("content", [b"", b"\n\n \r\n", b"\xef\xbb\xbf"])
def test_file_without_rows(put: Put, name: str, content: bytes) -> None:
    assert refusal(put(name, content)).what == "holds no rows"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"text": "a"}\n'.encode("utf-16"), "UTF-16"),
        ('{"text": "a"}\n'.encode("utf-16-le"), "UTF-16"),
        ('{"text": "a"}\n'.encode("utf-16-be"), "UTF-16"),
        (b"\x1f\x8b\x08\x00rest", "gzip"),
        (b"\x28\xb5\x2f\xfdrest", "zstd"),
        (b"PK\x03\x04rest", "zip"),
        (b"PAR1rest", "Parquet"),
        (b"ARROW1rest", "Arrow"),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_other_kinds_of_file_are_named(put: Put, content: bytes, says: str, name: str) -> None:
    assert says in refusal(put(name, content)).what


def test_missing_file_names_its_neighbour(put: Put) -> None:
    path = put("train.jsonl", b"{}")
    fault = refusal(str(Path(path).with_name("trian.jsonl")))
    assert fault.what == "there is no such file" and fault.fix == f"did you mean {path}?"


def test_unknown_extension(put: Put) -> None:
    assert "'.txt'" in refusal(put("rows.txt", b"{}")).what
    assert refusal(put("rows.jsonl.gz", b"")).fix == "unpack it"


def test_fifo_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows.jsonl")
    assert "regular file" in refusal(str(tmp_path / "rows.jsonl")).what


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_unreadable_file_is_the_machines_fault(put: Put, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path = put(name, b'[{"a": 1}]' if name == "a.json" else b'{"a": 1}\n')
    source = open_source(path)

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # root may read everything, so the right itself cannot be taken away
    uses = (lambda: open_source(path), lambda: next(source.read(no_fault)), lambda: source.fetch([0]), source.digest)
    for use in uses:
        with pytest.raises(MachineError, match="Permission denied") as caught:
            use()
        assert caught.value.problems[0].where == path and "right to read" in caught.value.problems[0].fix


def test_an_error_of_the_caller_is_not_taken_for_the_files(put: Put) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for path in (put("a.jsonl", b"oops\n"), put("a.json", b"[1]"), put("a.csv", b"a,b\n1\n")):
        with pytest.raises(OSError, match="No space left"):
            list(open_source(path).read(full))


@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", b'{"a": 1}\n'), ("a.json", b'[{"a": 1}]'), ("a.csv", b"a\n1\n")]
)
def test_a_file_that_changes_is_refused(put: Put, name: str, content: bytes) -> None:
    path = put(name, content)
    source = open_source(path)
    (row,) = source.read(no_fault)
    assert list(source.read(no_fault)) == [row]
    put(name, content + b" \n")
    for use in (lambda: list(source.read(no_fault)), lambda: source.fetch([row.locator]), source.digest):
        with pytest.raises(SourceFault, match="has changed since"):
            use()


@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", b'{"a": 1}\n'), ("a.json", b'[{"a": 1}]'), ("a.csv", b"a,b\n1,2\n")]
)
def test_fetch_where_no_row_stands(put: Put, name: str, content: bytes) -> None:
    for locator in (2, 10**6):
        with pytest.raises(SourceFault, match="no row stands at"):
            open_source(put(name, content)).fetch([locator])


def test_digest_is_of_the_bytes_alone(put: Put) -> None:
    content = json.dumps({"a": 1}).encode()
    first, second = open_source(put("a.jsonl", content)), open_source(put("b.jsonl", content))
    assert first.digest() == second.digest() == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("content", [b'[{"a": 1}, 7, {"a": 2}]', b'\xef\xbb\xbf [ {"a": 1}, 7, {"a": 2}]\n\n'])
def test_elements_of_a_list_on_one_line_have_their_index_as_place(put: Put, content: bytes) -> None:
    path = put("a.json", content)
    rows, faults = read(path)
    assert [number for number, _ in rows] == [0, 2] and [fault[0] for fault in faults] == [1]
    assert open_source(path).place(2) == f"{path}[2]"
    assert open_source(put("b.json", b'[\n{"a": 1}]')).place(2).endswith("b.json:2")


@pytest.mark.parametrize(
    ("header", "delimiter"), [("a;b", ";"), ("a\tb", "\t"), ("a|b", "|"), ("a", ","), ("a,b;c", ","), ('"a;b",c', ",")]
)
def test_the_header_of_a_csv_file_shows_its_delimiter(put: Put, header: str, delimiter: str) -> None:
    mark = "\n1" + delimiter + "2\n" if delimiter in header else "\n1\n"
    source = open_source(put("a.csv", (header + mark).encode()))
    assert source.kind == f"csv:{delimiter}"
    (row,) = source.read(no_fault)
    assert len(row.columns) == 1 + header.count(delimiter)
    assert source.fetch([row.locator]) == [row.columns]
