"""Parquet, Arrow, folders and hub names: rows as plain JSON values, by number, found again in any order."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qlora_train.data.problems import RowFault, SourceFault
from qlora_train.data.sources.base import Columns
from qlora_train.data.sources.open import open_source
from qlora_train.data.values import NotJson

ROWS: list[Columns] = [{"text": f"row {index}", "n": index} for index in range(25)]
Table = dict[str, Any]


def write_parquet(path: Path, table: pa.Table) -> None:
    pq.write_table(table, path, row_group_size=10)


def write_file(path: Path, table: pa.Table) -> None:
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=10)


def write_stream(path: Path, table: pa.Table) -> None:
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=10)


WRITERS = [("a.parquet", write_parquet), ("a.arrow", write_file), ("a.arrow", write_stream)]
Writer = Callable[[Path, pa.Table], None]


def no_fault(number: int, fault: RowFault, text: str, num_bytes: int) -> None:
    pytest.fail(f"row {number}: {fault.what}")


def read(path: Path | str, split: str = "train") -> list[Columns]:
    """The rows; holds their numbers, and that `fetch` finds the same rows in any order on a fresh source."""
    rows = list(open_source(str(path), split=split).read(no_fault))
    assert [row.number for row in rows] == list(range(1, len(rows) + 1))
    backwards = rows[::-3] + rows[:2]
    fetched = open_source(str(path), split=split).fetch([row.locator for row in backwards])
    assert fetched == [row.columns for row in backwards]
    return [row.columns for row in rows]


def refusal(path: Path | str, split: str = "train") -> SourceFault:
    with pytest.raises(SourceFault) as caught:
        read(path, split)
    assert caught.value.fix
    return caught.value


@pytest.mark.parametrize(("name", "write"), WRITERS)
def test_rows_come_batch_by_batch(tmp_path: Path, name: str, write: Writer) -> None:
    write(tmp_path / name, pa.Table.from_pylist(ROWS))
    assert read(tmp_path / name) == ROWS
    assert open_source(str(tmp_path / name)).place(17) == f"{tmp_path / name}: row 17"


@pytest.mark.parametrize(("name", "write"), WRITERS)
def test_values_become_plain_json(tmp_path: Path, name: str, write: Writer) -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "name": "bot"}]
    row: Columns = {"messages": messages, "score": 0.5, "ok": True, "none": None, "ids": [1, 2]}
    write(tmp_path / name, pa.Table.from_pylist([row]))
    # Arrow gives the first message a `name` of null; it is gone again.
    assert read(tmp_path / name) == [row]


def test_texts_in_every_encoding_of_arrow(tmp_path: Path) -> None:
    texts = pa.array(["a", None, "a"])
    kinds = [texts, texts.dictionary_encode(), texts.cast(pa.large_string()), texts.cast(pa.string_view())]
    write_file(tmp_path / "a.arrow", pa.table({str(index): kind for index, kind in enumerate(kinds)}))
    assert read(tmp_path / "a.arrow") == [dict.fromkeys("0123", text) for text in ("a", None, "a")]


def test_values_that_json_lacks_are_marked_not_refused(tmp_path: Path) -> None:
    day = datetime.datetime(2024, 1, 1)
    table = pa.table(
        {"text": ["a", "b"], "at": [day, None], "raw": [b"1", b"2"], "far": pa.array([2**62, 1], "timestamp[s]")}
    )
    write_file(tmp_path / "a.arrow", table)
    first, second = read(tmp_path / "a.arrow")
    assert first["text"] == "a" and first["at"] == NotJson("timestamp[us]") and first["raw"] == NotJson("binary")
    assert first["far"] == NotJson("timestamp[s]") and second["at"] is None


def test_json_cells_are_read(tmp_path: Path) -> None:
    cells = pa.ExtensionArray.from_storage(pa.json_(), pa.array(['{"a": null}', None, "{", "[1]"]))
    nested = pa.ListArray.from_arrays(pa.array([0, 1, 2, 3, 4]), cells)
    write_file(tmp_path / "a.arrow", pa.table({"x": cells, "y": nested}))
    rows = read(tmp_path / "a.arrow")
    assert [row["x"] for row in rows[:2]] == [{"a": None}, None] and rows[3] == {"x": [1], "y": [[1]]}
    assert isinstance(rows[2]["x"], NotJson) and rows[0]["y"] == [{"a": None}]


@pytest.mark.parametrize(("name", "write"), WRITERS)
def test_damaged_files(tmp_path: Path, name: str, write: Writer) -> None:
    path = tmp_path / name
    write(path, pa.Table.from_pylist(ROWS))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert f"{name} is damaged" in refusal(path).what
    path.write_bytes(b'{"text": "a"}\n')
    assert f"{name} is damaged, or no such file as its name says" in refusal(path).what


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    table = pa.table({"text": pa.array([b"caf\xe9", b"tea"]).view(pa.string())})
    write_file(tmp_path / "a.arrow", table)
    assert "UTF8" in refusal(tmp_path / "a.arrow").what
    write_parquet(tmp_path / "a.parquet", table)
    assert read(tmp_path / "a.parquet") == [{"text": NotJson("string that is not UTF-8")}, {"text": "tea"}]


@pytest.mark.parametrize(("name", "write"), WRITERS)
def test_flipped_bytes_give_rows_or_a_fault(tmp_path: Path, name: str, write: Writer) -> None:
    write(tmp_path / name, pa.Table.from_pylist(ROWS))
    whole = (tmp_path / name).read_bytes()
    random = Random(0)
    faults = 0
    for _ in range(100):
        broken = bytearray(whole)
        broken[random.randrange(len(broken))] ^= random.randrange(1, 256)
        (tmp_path / name).write_bytes(broken)
        try:
            rows = list(open_source(str(tmp_path / name)).read(no_fault))
        except SourceFault as fault:
            faults += 1
            assert fault.fix
        else:
            assert rows
    assert faults > 10


@pytest.mark.parametrize(("name", "write"), WRITERS)
def test_tables_without_rows_or_with_a_name_twice(tmp_path: Path, name: str, write: Writer) -> None:
    write(tmp_path / name, pa.table({"text": pa.array([], pa.string())}))
    assert refusal(tmp_path / name).what == "holds no rows"
    write(tmp_path / name, pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]))
    assert refusal(tmp_path / name).what == "has two columns named 'text'"


@pytest.mark.parametrize(("name", "write"), WRITERS)
def test_a_file_that_changes_and_rows_that_are_not_there(tmp_path: Path, name: str, write: Writer) -> None:
    write(tmp_path / name, pa.Table.from_pylist(ROWS))
    source = open_source(str(tmp_path / name))
    digest = source.digest()
    with pytest.raises(SourceFault, match="no row stands at 25"):
        source.fetch([3, 25])
    write(tmp_path / name, pa.Table.from_pylist(ROWS * 2))
    with pytest.raises(SourceFault, match="has changed"):
        source.fetch([3])
    assert open_source(str(tmp_path / name)).digest() != digest


def test_folder_of_parquet_files_is_read_in_order_of_names(tmp_path: Path) -> None:
    write_parquet(tmp_path / "b.parquet", pa.Table.from_pylist(ROWS[12:]))
    write_parquet(tmp_path / "a.parquet", pa.Table.from_pylist(ROWS[:12]))
    (tmp_path / "README.md").write_text("x")
    assert read(tmp_path) == ROWS
    digest = open_source(str(tmp_path)).digest()
    (tmp_path / "a.parquet").rename(tmp_path / "c.parquet")
    assert open_source(str(tmp_path)).digest() != digest  # other order, other rows


def test_of_files_of_several_splits_one_is_read(tmp_path: Path) -> None:
    write_parquet(tmp_path / "test-00000-of-00001.parquet", pa.Table.from_pylist(ROWS[:5]))
    write_parquet(tmp_path / "train-00000-of-00002.parquet", pa.Table.from_pylist(ROWS[5:12]))
    write_parquet(tmp_path / "train-00001-of-00002.parquet", pa.Table.from_pylist(ROWS[12:]))
    assert read(tmp_path) == ROWS[5:]
    assert read(tmp_path, "test") == ROWS[:5]
    assert refusal(tmp_path, "dev").what == "has no split 'dev'; splits: test, train"


@pytest.mark.parametrize(
    ("names", "split", "expected"),
    [
        (["test", "train"], "train", ["train"]),
        (["test", "train"], "test", ["test"]),
        (["test"], "train", "has no split 'train'; splits: test"),
        (["test-00000-of-00001"], "train", "has no split 'train'; splits: test"),
        (["test-00000-of-00001"], "test", ["test-00000-of-00001"]),
        (["train_0", "train_1", "validation-a"], "train", ["train_0", "train_1"]),
        (["train_0", "train_1", "validation-a"], "dev", "has no split 'dev'; splits: train, validation"),
        (["test_sft-00000-of-00001", "train_sft-00000-of-00001"], "test_sft", ["test_sft-00000-of-00001"]),
        (["odd", "train"], "odd", ["odd"]),
        (["data", "part-0"], "train", ["data", "part-0"]),
        (["data", "part-0"], "test", "has no split 'test'; splits: train"),
        (["part-00000-of-00002", "part-00001-of-00002"], "train", ["part-00000-of-00002", "part-00001-of-00002"]),
        (["more", "train"], "train", "holds more.parquet, whose name tells no split, beside files of splits"),
        (["testimonies"], "train", ["testimonies"]),
    ],
)
def test_names_tell_splits(tmp_path: Path, names: list[str], split: str, expected: list[str] | str) -> None:
    for name in names:
        write_parquet(tmp_path / f"{name}.parquet", pa.table({"text": [name]}))
    if isinstance(expected, str):
        assert refusal(tmp_path, split).what == expected
    else:
        assert read(tmp_path, split) == [{"text": name} for name in expected]


def test_folder_of_save_to_disk(tmp_path: Path) -> None:
    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(str(tmp_path / "one"), num_shards=3)
    write_stream(tmp_path / "one" / "cache-123.arrow", pa.table({"x": [1]}))  # what .map() leaves behind
    assert read(tmp_path / "one") == ROWS
    fault = refusal(tmp_path / "one", "test")
    assert fault.what == "holds one unnamed split, so none is called 'test'" and fault.fix == "remove `split`"
    splits = datasets.DatasetDict({"train": saved.select(range(20)), "test": saved.select(range(20, 25))})
    splits.save_to_disk(str(tmp_path / "both"))
    assert read(tmp_path / "both") == ROWS[:20]
    assert read(tmp_path / "both", "test") == ROWS[20:]
    assert refusal(tmp_path / "both", "dev").what == "has no split 'dev'; splits: train, test"


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ('{"_data_files": [{"filename": "../x.arrow"}]}', "lacks '../x.arrow'"),
        ('{"_data_files": [{"filename": "gone.arrow"}]}', "lacks 'gone.arrow'"),
        ('{"_data_files": []}', "holds no rows"),
        ("[]", "state.json is damaged"),
        ("{", "state.json is damaged"),
    ],
)
def test_state_that_names_what_is_not_there(tmp_path: Path, state: str, says: str) -> None:
    (tmp_path / "set").mkdir()
    write_stream(tmp_path / "x.arrow", pa.Table.from_pylist(ROWS))
    (tmp_path / "set" / "state.json").write_text(state)
    assert says in refusal(tmp_path / "set").what


def test_other_folders_say_what_they_hold(tmp_path: Path) -> None:
    assert refusal(tmp_path).what == "is a folder without data files"
    (tmp_path / "data").mkdir()
    assert str(tmp_path / "data") in refusal(tmp_path).fix
    (tmp_path / "a.jsonl").write_text("{}\n")
    write_parquet(tmp_path / "b.parquet", pa.Table.from_pylist(ROWS))
    fault = refusal(tmp_path)
    assert "is a folder of a.jsonl, b.parquet" in fault.what and str(tmp_path / "a.jsonl") in fault.fix


def test_hub_name_goes_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_stream(tmp_path / "cached.arrow", pa.Table.from_pylist(ROWS))
    asked: list[object] = []

    def load_dataset(path: str, **kwargs: object) -> datasets.Dataset:
        asked.append((path, kwargs))
        return datasets.Dataset.from_file(str(tmp_path / "cached.arrow"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read("owner/name") == ROWS
    source = open_source("owner/name", revision="abc", subset="en", split="test")
    assert asked[-1] == ("owner/name", {"name": "en", "split": "test", "revision": "abc"})
    assert source.place(3) == "owner/name: row 3"
    assert len({source.digest(), open_source("owner/name", split="train[:9]").digest()}) == 2


def test_hub_set_held_in_memory_has_no_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(ROWS))
    with pytest.raises(SourceFault, match="held in memory") as caught:
        open_source("owner/name").digest()
    assert "HF_DATASETS_IN_MEMORY_MAX_SIZE" in caught.value.fix


def test_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "a.parquet", pa.Table.from_pylist(ROWS))
    write_file(tmp_path / "a.arrow", pa.Table.from_pylist(ROWS))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(ROWS))
    names = (str(tmp_path / "a.parquet"), str(tmp_path / "a.arrow"), "owner/name")
    assert [open_source(name).kind for name in names] == ["parquet", "arrow", "hub"]


def test_hub_name_with_a_dot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(ROWS))
    assert read("teknium/OpenHermes-2.5") == ROWS
    assert refusal("data/rows.jsonl.gz").what == refusal("./owner/name").what == "there is no such file"


def test_hub_name_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub (OfflineModeIsEnabled)\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    fault = refusal("owner/name")
    assert fault.what.endswith("cannot be loaded: Couldn't reach 'owner/name' on the Hub (OfflineModeIsEnabled)")
    assert "HF_HUB_OFFLINE" in fault.fix


def test_a_relative_path_with_the_extension_of_a_file_is_no_hub_name() -> None:
    assert refusal("data/nowhere.jsonl").what == "there is no such file"
