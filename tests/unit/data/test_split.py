"""From sources to a split: the cache and its key, streaming, mixtures, and the account of every row."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from qlora_train.data import build as build_module
from qlora_train.data import cache as cache_module
from qlora_train.data import split as split_module
from qlora_train.data.account import account_for, build_loader, steps_notice
from qlora_train.data.duplicates import find_exact
from qlora_train.data.fates import CODE
from qlora_train.data.loader import Loader
from qlora_train.data.rows import MessagesRow, TextRow
from qlora_train.data.split import Split, load_split, load_splits
from qlora_train.errors import DataError, MachineError
from qlora_train.recipe.schema import DataSection, Recipe, SourceSection, TrainSection

pytestmark = pytest.mark.usefixtures("shared_workers")

Tokenizer = PreTrainedTokenizerFast


@pytest.fixture(autouse=True)
def empty_cache(own_cache: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QLORA_TRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "data"


def texts(path: Path, *lines: str) -> Path:
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), encoding="utf-8")
    return path


def section(*paths: Path, **changes: Any) -> DataSection:
    return DataSection(train=tuple(SourceSection(path=str(path)) for path in paths), **changes)


def load(tokenizer: Tokenizer, *paths: Path, **changes: Any) -> Split:
    return load_split(section(*paths, **changes), "train", tokenizer, 0)


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the sources that were tokenised, in order."""
    made: list[str] = []
    original = cache_module.build

    def counted(source: Any, *rest: Any) -> Any:
        made.append(Path(source.name).name)
        return original(source, *rest)

    monkeypatch.setattr(cache_module, "build", counted)
    return made


def test_a_second_look_finds_the_tokens_in_the_cache(tokenizer: Tokenizer, tmp_path: Path, builds: list[str]) -> None:
    path = texts(tmp_path / "a.jsonl", "list files", "ls")
    first, second = load(tokenizer, path), load(tokenizer, path)
    assert builds == ["a.jsonl"] and first.table.fingerprint() == second.table.fingerprint()
    assert [row.ids.tolist() for row in second.table.rows([0, 1])] == [
        row.ids.tolist() for row in first.table.rows([0, 1])
    ]
    moved = path.rename(tmp_path / "b.jsonl")
    found = load(tokenizer, moved)
    assert builds == ["a.jsonl"] and found.table.where(1) == f"{moved}:2", "the content counts, not its place"


@pytest.mark.parametrize("streaming", [False, True])
def test_what_both_sides_share_is_read_once(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    called: list[str] = []
    for module, name in ((split_module, "open_source"), (split_module, "Encoder"), (split_module, "Reencoder")):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, _f=original, _n=name, **k: (called.append(_n), _f(*a, **k))[1])
    paths = [texts(tmp_path / f"{name}.jsonl", *(f"list {name} {i}" for i in range(9))) for name in "ab"]
    settings: Any = {"data": section(*paths, split=0.2, streaming=streaming), "run": {"dir": tmp_path / "run"}}
    recipe = Recipe(model={"path": "tiny"}, **settings)  # type: ignore[arg-type]
    train, held_out = load_splits(recipe, tokenizer)
    assert held_out is not None and held_out.sources is train.sources
    assert called == ["Encoder", "open_source", "open_source"] + ["Reencoder"] * streaming
    apart = load_split(recipe.data, "eval", tokenizer, 0)
    assert held_out.table.fingerprint() == apart.table.fingerprint() and held_out.audit == apart.audit
    assert train.table.num_rows + held_out.table.num_rows == 18


def test_what_decides_the_tokens_decides_the_key(
    build_tokenizer: Callable[..., Tokenizer], tmp_path: Path, builds: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = texts(tmp_path / "a.jsonl", "list files", "ls")
    tokenizer = build_tokenizer()
    load(tokenizer, path)
    for changes in ({"loss_on": "all"}, {"format": "text"}, {"columns": {"text": "text"}}, {"streaming": True}):
        load(tokenizer, path, **changes)
    assert len(builds) == 5
    load(tokenizer, path, seq_len=64, max_train_rows=1, bad_rows="skip", overlong="cut")
    assert len(builds) == 5, "what is chosen afterwards does not tokenise anew"
    other = build_tokenizer()
    other.chat_template += " "
    load(other, path)
    path.write_text(path.read_text() + '{"text": "the"}\n')
    load(tokenizer, path)
    monkeypatch.setattr(cache_module, "code_sha256", lambda part: "other code")
    load(tokenizer, path)
    assert len(builds) == 8


def test_a_damaged_cache_is_made_again(
    tokenizer: Tokenizer, tmp_path: Path, builds: list[str], empty_cache: Path
) -> None:
    path = texts(tmp_path / "a.jsonl", "list files", "ls")
    before = load(tokenizer, path).table.row(0).ids.tolist()
    (tokens,) = empty_cache.glob("*/tokens.arrow")
    content = bytearray(tokens.read_bytes())
    content[len(content) // 2] ^= 1
    tokens.unlink()
    tokens.write_bytes(content)
    assert load(tokenizer, path).table.row(0).ids.tolist() == before and len(builds) == 2


def test_the_cache_forgets_what_was_not_used_for_longest(
    tokenizer: Tokenizer, tmp_path: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [texts(tmp_path / f"{name}.jsonl", name, "ls") for name in "abc"]
    for age, path in zip((300, 100, 200), paths, strict=True):
        folder = load(tokenizer, path).sources[0].folder
        os.utime(folder, (1_000_000 - age, 1_000_000 - age))
    oldest = load(tokenizer, paths[0]).sources[0].folder  # used again: the third is the oldest now
    size = sum(file.stat().st_size for file in oldest.iterdir()) / 2**30
    monkeypatch.setenv("QLORA_TRAIN_CACHE_GIB", str(2.5 * size))
    kept = load(tokenizer, texts(tmp_path / "d.jsonl", "d", "ls")).sources[0].folder
    assert {folder for folder in empty_cache.iterdir() if folder.is_dir()} == {oldest, kept}


def test_streaming_keeps_no_tokens_and_gives_the_same(tokenizer: Tokenizer, tmp_path: Path, empty_cache: Path) -> None:
    paths = [texts(tmp_path / "a.jsonl", "list files", "ls", "the files"), texts(tmp_path / "b.jsonl", "files files")]
    stored, streamed = load(tokenizer, *paths), load(tokenizer, *paths, streaming=True)
    assert stored.table.fingerprint() == streamed.table.fingerprint()
    for left, right in zip(stored.table.rows([3, 0, 2]), streamed.table.rows([3, 0, 2]), strict=True):
        assert left.ids.tolist() == right.ids.tolist() and left.span_stops.tolist() == right.span_stops.tolist()
    sizes = [
        sum(f.stat().st_size for f in s.folder.glob("tokens.arrow")) for s in (stored.sources[0], streamed.sources[0])
    ]
    assert sizes[1] < sizes[0]


def test_a_file_that_changes_while_it_is_streamed_is_noticed(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = texts(tmp_path / "a.jsonl", "list files", "ls")
    split = load(tokenizer, path, streaming=True)
    texts(path, "the files are others", "ls")
    with pytest.raises(DataError) as caught:
        split.table.rows([0])
    assert "a.jsonl" in str(caught.value)


def test_sources_of_several_formats_become_one_table(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = texts(tmp_path / "a.jsonl", "list files")
    table = tmp_path / "b.csv"
    table.write_text("question,answer\nlist,ls\nthe,files\n", encoding="utf-8")
    chosen = DataSection(
        train=(
            SourceSection(path=str(text)),
            SourceSection(path=str(table), columns={"instruction": "question", "output": "answer"}, weight=2.0),
        ),
    )
    split = load_split(chosen, "train", tokenizer, 0)
    accounts = [(entry.format, entry.weight, entry.num_rows, entry.num_trained) for entry in split.audit.sources]
    assert accounts == [("text", 1.0, 1, 1), ("alpaca", 2.0, 2, 2)]
    assert split.table.column("source").tolist() == [0, 1, 1]
    last, first = split.read([2, 0])
    assert first == TextRow(f"{text}:1", "list files")
    assert isinstance(last, MessagesRow) and [m["content"] for m in last.messages] == ["the", "files"]
    assert last.where == f"{table}:3"


def test_many_rows_keep_their_order_and_place(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over the borders of batches of the tokenizer and of chunks of the file."""
    monkeypatch.setattr(build_module, "_BATCH_ROWS", 7)
    monkeypatch.setattr(build_module, "_CHUNK_ROWS", 10)
    lines = ["list " * (1 + index % 5) + "ls" for index in range(45)]
    split = load(tokenizer, texts(tmp_path / "a.jsonl", *lines))
    assert split.table.num_rows == 45 and split.table.where(44).endswith("a.jsonl:45")
    decoded = [tokenizer.decode(row.ids, skip_special_tokens=True) for row in split.table.rows(range(45))]
    assert decoded == lines
    assert split.table.lengths.tolist() == [len(row.ids) for row in split.table.rows(range(45))]


def test_the_account_counts_every_row_and_every_token(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = texts(tmp_path / "a.jsonl", "ls", "ls", "list files " * 30, "files")
    path.write_text(path.read_text() + '{"text": 3}\n')
    split = load(tokenizer, path, bad_rows="skip", duplicates="drop", seq_len=16, max_lost_frac=1.0, max_train_rows=1)
    counts = {fate: count for fate, count in split.audit.counts.items() if count}
    assert counts == {"kept": 1, "dropped": 1, "rejected": 1, "duplicate": 1, "not_selected": 1}
    listed = {(where.rpartition(":")[2], fate) for where, fate, _ in split.listed()}
    assert {("2", "duplicate"), ("3", "dropped"), ("5", "rejected")} < listed and len(listed) == 4
    assert split.audit.num_rows == 5 and split.audit.num_trained == 1
    long = 62  # thirty times two words, the last space, and the end token
    others = 2 + 2 + 2
    rejected = 2  # its eleven characters, at the 68 tokens that the other 365 became
    assert (split.audit.num_lost_tokens, split.audit.num_read_tokens) == (long + rejected, long + others + rejected)


def test_an_enormous_row_is_dropped_before_it_is_tokenised(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlora_train.data.split.LEAST_CHARS_LIMIT", 100)
    path = texts(tmp_path / "a.jsonl", "ls", "x" * 2000)
    split = load(tokenizer, path, seq_len=8, max_lost_frac=1.0)
    assert split.audit.counts["dropped"] == 1 and split.table.num_rows == 1
    assert "2,010 characters" in split.audit.reasons[0].examples[0], "with its end token of ten"
    with pytest.raises(DataError, match="characters"):
        load(tokenizer, path, seq_len=8, overlong="fail")


def test_a_split_of_which_nothing_is_left_says_why(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = texts(tmp_path / "a.jsonl", *["list files " * 10] * 3)
    with pytest.raises(DataError, match=r"0 trainable rows of 3 in train\. Likely cause \(3 rows\)"):
        load(tokenizer, path, seq_len=8)


def test_rows_of_the_same_content_have_the_same_fingerprint_wherever_they_lie(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    as_lines = texts(tmp_path / "a.jsonl", "list files", "ls")
    as_list = tmp_path / "b.json"
    as_list.write_text(json.dumps([{"text": "list files"}, {"text": "ls"}]))
    assert load(tokenizer, as_lines).table.fingerprint() == load(tokenizer, as_list).table.fingerprint()
    assert np.array_equal(
        load(tokenizer, as_lines).table.column("content_hash"), load(tokenizer, as_list).table.column("content_hash")
    )


def test_a_table_in_use_is_never_removed(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_TRAIN_CACHE_GIB", "0")
    paths = [texts(tmp_path / f"{name}.jsonl", name, "ls") for name in "ab"]
    split = load(tokenizer, *paths, bad_rows="skip")
    assert split.table.num_rows == 4 and list(split.listed()) == [], "both folders are there while they are used"


def test_what_a_killed_build_left_goes_when_it_is_a_day_old(
    tokenizer: Tokenizer, tmp_path: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = empty_cache / ".tmp-old", empty_cache / ".tmp-new"
    for folder in (old, new):
        folder.mkdir(parents=True)
    os.utime(old, (1_000_000, 1_000_000))
    load(tokenizer, texts(tmp_path / "a.jsonl", "ls"))
    assert not old.exists() and new.exists()


def test_a_limit_that_is_no_number_is_named(
    tokenizer: Tokenizer, tmp_path: Path, builds: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QLORA_TRAIN_CACHE_GIB", "50GB")
    with pytest.raises(MachineError, match="'50GB'"):
        load(tokenizer, texts(tmp_path / "a.jsonl", "ls"))
    assert builds == [], "said before any work"


def test_the_end_token_is_a_special_one_whatever_is_trained(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    messages = [{"role": "user", "content": "list"}, {"role": "assistant", "content": "ls"}]
    path.write_text(json.dumps({"messages": messages}) + "\n")
    for loss_on in ("all", "assistant"):
        assert load(tokenizer, path, loss_on=loss_on).end_token_ids == [tokenizer.eos_token_id]


def test_a_rejected_row_costs_what_it_holds(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """One row of nearly all the text is nearly all that is lost, not one row in three."""
    path = texts(tmp_path / "a.jsonl", "list files", "ls")
    path.write_text(path.read_text() + json.dumps({"text": ["list files " * 1000]}) + "\n")
    with pytest.raises(DataError, match=r"data\.max_lost_frac"):
        load(tokenizer, path, bad_rows="skip", max_lost_frac=0.5)


def test_all_rows_equal_leave_nothing_to_train_beside_the_held_out(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.split holds out all 3 rows"):
        load(tokenizer, texts(tmp_path / "a.jsonl", "ls", "ls", "ls"), split=0.5)


def test_any_source_of_conversations_makes_a_chat_model(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = texts(tmp_path / "a.jsonl", "list files")
    chat = tmp_path / "b.csv"
    chat.write_text("instruction,output\nlist,ls\n", encoding="utf-8")
    assert [load(tokenizer, *paths).holds_conversations() for paths in ((text,), (text, chat), (chat, text))] == [
        False,
        True,
        True,
    ]


@pytest.mark.parametrize("streaming", [False, True])
def test_long_text_is_split_and_nothing_of_it_lost(tokenizer: Tokenizer, tmp_path: Path, streaming: bool) -> None:
    long = " ".join(f"list {index} files" for index in range(12))
    talk = {"messages": [{"role": "user", "content": "list " * 40}, {"role": "assistant", "content": "ls"}]}
    chats = tmp_path / "chats.jsonl"
    chats.write_text(json.dumps(talk) + "\n")
    paths = texts(tmp_path / "a.jsonl", "ls", long, long, "the files"), chats
    settings: dict[str, Any] = {"seq_len": 16, "streaming": streaming, "duplicates": "drop", "max_lost_frac": 1}
    split = load(tokenizer, *paths, overlong="split", **settings)
    whole = load(tokenizer, paths[0], overlong="drop", **settings | {"seq_len": 64})
    audit, table = split.audit, split.table
    assert [split.fates.tolist().count(CODE[fate]) for fate in ("kept", "dropped", "duplicate")] == [3, 1, 1]
    assert audit.num_trained == 3 and audit.num_pieces == table.num_rows > 4
    assert f"in {table.num_rows} pieces" in audit.summary() and audit.sources[0].num_trained == 3
    assert audit.num_supervised_tokens == whole.audit.num_supervised_tokens
    assert audit.num_tokens == whole.audit.num_tokens + audit.num_pieces - 3, "a piece repeats one token for context"
    (dropped,) = [reason for reason in audit.reasons if reason.fate == "dropped"]
    assert dropped.reason == "longer than 16 tokens: only plain text is split"
    pieces = [index for index in range(table.num_rows) if table.where(index) == f"{paths[0]}:2"]
    rows = table.rows(pieces)
    ids = np.concatenate([rows[0].ids, *(row.ids[1:] for row in rows[1:])])
    assert tokenizer.decode(ids) == long + "<|im_end|>" and max(table.lengths) == 16
    loader = Loader(table, "packed", 2, 1, 0, 0, seq_len=16)
    batches = [batch for step in range(loader.num_steps(1)) for batch in loader.step(step)]
    assert sorted(row for batch in batches for row in batch.row_ids) == list(range(table.num_rows))
    assert sum(batch.num_supervised_tokens for batch in batches) == audit.num_supervised_tokens


def test_pieces_are_chosen_by_their_document(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = texts(tmp_path / "a.jsonl", *(" ".join([f"list {index}"] * 30) for index in range(6)))
    chosen = load(tokenizer, path, overlong="split", seq_len=16, max_train_rows=2)
    everything = load(tokenizer, path, overlong="split", seq_len=16)
    assert chosen.audit.counts["kept"] == 2 and len({*chosen.table.places(range(chosen.table.num_rows))}) == 2
    assert chosen.table.fingerprint() != everything.table.fingerprint()
    assert find_exact(chosen.undivided.column("content_hash"), chosen.undivided.where).num_duplicates == 0


def test_pieces_of_one_row_are_read_from_their_source_once(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = texts(tmp_path / "a.jsonl", "show the files " * 30, "ls")
    split = load(tokenizer, path, overlong="split", seq_len=16)
    source = type(split.sources[0].source)
    fetched: list[int] = []
    fetch = source.fetch

    def counted(self: Any, locators: Any) -> Any:
        fetched.extend(locators)
        return fetch(self, locators)

    monkeypatch.setattr(source, "fetch", counted)
    rows = split.read(range(split.table.num_rows))
    assert len(fetched) == 2 < len(rows) and rows[0] is rows[1] != rows[-1]


def test_an_account_counts_documents_not_pieces(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = texts(tmp_path / "a.jsonl", *(" ".join([f"list {index}"] * 30) for index in range(6)))
    run: Any = {"dir": tmp_path / "run"}
    recipe = Recipe(model={"path": "tiny"}, data=section(path, overlong="split", seq_len=16, split=0.5), run=run)  # type: ignore[arg-type]
    train, held_out = load_splits(recipe, tokenizer)
    account = account_for(recipe, train, held_out, tokenizer, build_loader(recipe, train, 0))
    assert [(split.duplicates.num_rows, split.duplicates.num_duplicates) for split in account.splits] == [(3, 0)] * 2
    assert account.overlap is not None and account.overlap.num_eval_rows == 3
    assert account.batching.num_unreached_rows == 0


def test_faults_of_the_same_words_are_one_problem(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "q", "answer": "a"}\n' * 300)
    with pytest.raises(DataError) as caught:
        load(tokenizer, path)
    (problem,) = caught.value.problems
    assert problem.where == f"{path}:1" and f"(and so in 299 more: {path}:2, {path}:3, {path}:4, ...)" in problem.what
    assert "data.columns: {instruction: question, output: answer}" in problem.fix
    assert problem.fix.endswith("; or set data.bad_rows: skip to leave such rows out and list them")


def test_what_was_not_taken_as_written_is_in_the_summary(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    turns = [{"role": role, "content": "ls"} for role in ("Human", "assistant", "user")]
    cell = json.dumps(turns).replace('"', '""')
    path.write_text(f'id;messages\n1;"{cell}"\n2;"{cell}"\n')
    summary = load(tokenizer, path).audit.summary()
    for note in ("2 rows the role 'Human' is read as 'user'", "2 rows the turns after the last", "parted by ';'"):
        assert note in summary


def test_both_sides_tell_their_faults_at_once(tokenizer: Tokenizer, tmp_path: Path) -> None:
    data = {"train": [{"path": str(tmp_path / "no.jsonl")}], "eval": [{"path": str(tmp_path / "none.jsonl")}]}
    recipe = Recipe.model_validate(
        {"model": {"path": "org/base"}, "data": data, "run": {"dir": tmp_path / "run"}}, strict=False
    )
    with pytest.raises(DataError) as caught:
        load_splits(recipe, tokenizer)
    assert [Path(problem.where or "").name for problem in caught.value.problems] == ["no.jsonl", "none.jsonl"]


def test_more_steps_than_the_data_gives_are_said(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = texts(tmp_path / "a.jsonl", *(f"list files {index}" for index in range(6)))
    loader = Loader(load(tokenizer, path).table, "shuffled", 1, 2, 0, 0, seq_len=64)
    notices = [steps_notice(TrainSection(max_steps=steps), loader) for steps in (None, 2, 3, 100)]
    assert notices[:3] == [None, None, None]
    assert notices[3] and "max_steps is 100, but the data gives 3 steps in 1 epoch:" in notices[3]
