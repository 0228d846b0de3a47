"""Every fault that a data set can have, through the real command line: message, place, exit code, nothing left."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.commandline import Outcome, chat_rows, run_cli, write_recipe, write_rows

GOOD = [json.dumps(row) for row in chat_rows(4)]
USER, ANSWER = {"role": "user", "content": "list files"}, {"role": "assistant", "content": "ls"}


def lines(*extra: str | bytes) -> bytes:
    """Four good rows and then these."""
    return b"".join(line if isinstance(line, bytes) else line.encode() + b"\n" for line in (*GOOD, *extra))


def chat(*messages: dict[str, Any]) -> str:
    return json.dumps({"messages": list(messages)})


# name -> the file's bytes, exit code, words of the message; rows 1 to 4 are good, so the place is line 5
CASES: dict[str, tuple[bytes, int, tuple[str, ...]]] = {
    "bad JSON": (lines('{"messages": oops}'), 3, ("train.jsonl:5", "is not JSON", "byte offset")),
    "truncated last line": (lines('{"messages": [{"role": "us').rstrip(b"\n"), 3, ("train.jsonl:5", "cut off")),
    "a list, not an object": (lines("[1, 2]"), 3, ("train.jsonl:5", "a list", "expected an object")),
    "missing column": (lines('{"mesages": []}'), 3, ("train.jsonl:5", "mesages", "messages")),
    "wrong type": (lines('{"messages": "hello"}'), 3, ("train.jsonl:5", "messages")),
    "mixed formats": (lines('{"prompt": "a", "completion": "b"}'), 3, ("train.jsonl:5", "prompt_completion")),
    "content is a number": (lines(chat(USER, {"role": "assistant", "content": 3})), 3, ("train.jsonl:5", "a number")),
    "null content": (lines(chat(USER, {"role": "assistant", "content": None})), 3, ("train.jsonl:5", "content")),
    "not UTF-8": (lines(b'{"messages": [{"role": "user", "content": "caf\xe9"}]}\n'), 3, ("train.jsonl:5", "0xe9")),
    "UTF-16": ("\ufeff".encode("utf-16-le") + GOOD[0].encode("utf-16-le"), 3, ("train.jsonl", "UTF-16", "iconv")),
    "gzip": (b"\x1f\x8b\x08\x00aaaa", 3, ("train.jsonl", "gzip", "gunzip")),
    "lone surrogate": (
        lines('{"messages": [{"role": "user", "content": "\\ud800"}]}'),
        3,
        ("train.jsonl:5", "\\ud800"),
    ),
    "NUL": (lines(chat({"role": "user", "content": "a\0b"}, ANSWER)), 3, ("train.jsonl:5", "NUL")),
    "deep nesting": (lines("[" * 5000 + "]" * 5000), 3, ("train.jsonl:5", "nested too deeply")),
    "giant line": (lines('{"messages": "' + "x" * (16 * 2**20) + '"}'), 3, ("train.jsonl:5", "bytes long", "limit")),
    "NaN": (lines('{"messages": NaN}'), 3, ("train.jsonl:5", "NaN")),
    "a name twice": (lines('{"messages": [], "messages": []}'), 3, ("train.jsonl:5", "twice")),
    "empty file": (b"", 3, ("train.jsonl", "holds no rows")),
    "only newlines": (b"\n\n\r\n", 3, ("train.jsonl", "holds no rows")),
    "unknown role": (lines(chat({"role": "zebra", "content": "x"}, ANSWER)), 3, ("train.jsonl:5", "'zebra'", "user")),
    "two answers": (lines(chat(USER, ANSWER, ANSWER)), 3, ("train.jsonl:5", "second answer")),
    "no answer": (lines(chat(USER)), 3, ("train.jsonl:5", "no answer to train")),
    "empty answer": (lines(chat(USER, {"role": "assistant", "content": " "})), 3, ("train.jsonl:5", "empty answer")),
    "nothing to train": (lines(chat(USER, ANSWER | {"train": False})), 3, ("train.jsonl:5", "nothing to train")),
    "empty list": (lines('{"messages": []}'), 3, ("train.jsonl:5", "empty")),
}


def refused(outcome: Outcome, code: int, *words: str) -> None:
    assert outcome.code == code, (outcome.code, outcome.err)
    assert "Traceback" not in outcome.err and "Fix:" in outcome.err, outcome.err
    for word in words:
        assert word in outcome.err, (word, outcome.err)


@pytest.mark.parametrize("case", CASES)
def test_a_bad_row_is_refused_with_its_place(case: str, tmp_path: Path, tiny_llama_dir: Path) -> None:
    content, code, words = CASES[case]
    (tmp_path / "train.jsonl").write_bytes(content)
    outcome = run_cli("data", write_recipe(tmp_path, tiny_llama_dir))
    refused(outcome, code, *words)
    assert not (tmp_path / "run").exists() and not list(tmp_path.rglob(".tmp-*"))


SKIPPED = [name for name, (content, _, words) in CASES.items() if content.startswith(GOOD[0].encode()) and words]


@pytest.mark.parametrize("case", SKIPPED)
def test_the_same_row_is_skipped_and_listed_where_the_recipe_says_so(
    case: str, tmp_path: Path, tiny_llama_dir: Path
) -> None:
    (tmp_path / "train.jsonl").write_bytes(CASES[case][0])
    recipe = write_recipe(tmp_path, tiny_llama_dir, data__bad_rows="skip", data__max_lost_frac=1.0)
    outcome = run_cli("data", recipe)
    assert outcome.code == 0, outcome.err
    assert "4 of 5 rows (1 rejected)" in outcome.out
    (entry,) = [json.loads(line) for line in (tmp_path / "run" / "rejected.jsonl").read_text().splitlines()]
    assert entry["where"].endswith("train.jsonl:5") and entry["reason"] and entry["fix"]
    (fate,) = [json.loads(line) for line in (tmp_path / "run" / "fates.jsonl").read_text().splitlines()]
    assert (fate["split"], fate["fate"]) == ("train", "rejected") and fate["where"] == entry["where"]


def test_twenty_bad_rows_are_listed_and_all_are_counted(tmp_path: Path, tiny_llama_dir: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(lines(*["{"] * 30))
    outcome = run_cli("check", write_recipe(tmp_path, tiny_llama_dir))
    refused(outcome, 3, "train.jsonl:5", "train.jsonl:24", "30 problems in all", "bad_rows: skip")
    assert "train.jsonl:25" not in outcome.err


def test_accepted_oddities(tmp_path: Path, tiny_llama_dir: Path) -> None:
    """A byte-order mark, CRLF, blank lines, and a surrogate pair that spells one character."""
    emoji = '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "\\ud83d\\ude00"}]}'
    text = "\r\n\r\n".join([*GOOD, emoji]) + "\r\n"
    (tmp_path / "train.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    outcome = run_cli("data", write_recipe(tmp_path, tiny_llama_dir))
    assert outcome.code == 0 and "train: 5 of 5 rows" in outcome.out, outcome.err


def test_one_row_trains(tmp_path: Path, tiny_llama_dir: Path) -> None:
    write_rows(tmp_path / "train.jsonl", chat_rows(1))
    outcome = run_cli("train", write_recipe(tmp_path, tiny_llama_dir, train__max_steps=1, eval__generate_rows=0))
    assert outcome.code == 0, outcome.err


def _directory(folder: Path) -> dict[str, Any]:
    (folder / "rows").mkdir()
    write_rows(folder / "rows" / "part.jsonl", chat_rows(2))
    return {"data__train": ["rows"]}


def _extension(folder: Path) -> dict[str, Any]:
    shutil.copy(folder / "train.jsonl", folder / "train.docx")
    return {"data__train": ["train.docx"]}


SOURCES: dict[str, tuple[Callable[[Path], dict[str, Any]], int, tuple[str, ...]]] = {
    "missing": (lambda _: {"data__train": ["trian.jsonl"]}, 2, ("trian.jsonl", "train.jsonl")),
    "a directory": (_directory, 3, ("rows", "part.jsonl")),
    "unknown extension": (_extension, 3, ("train.docx", ".docx")),
    "a hub set without network": (lambda _: {"data__train": ["owner/name"]}, 3, ("owner/name",)),
    "column map that names nothing": (
        lambda _: {"data__columns": {"messages": "mesages"}},
        3,
        ("train.jsonl:1", "mesages", "messages"),
    ),
    "format that the rows do not have": (lambda _: {"data__format": "alpaca"}, 3, ("train.jsonl:1", "instruction")),
}


@pytest.mark.parametrize("case", SOURCES)
def test_a_source_that_cannot_be_read(case: str, tmp_path: Path, tiny_llama_dir: Path) -> None:
    write_recipe(tmp_path, tiny_llama_dir)
    spoil, code, words = SOURCES[case]
    recipe = write_recipe(tmp_path, tiny_llama_dir, **spoil(tmp_path))
    refused(run_cli("data", recipe), code, *words)


def test_more_loss_than_the_budget_is_refused(tmp_path: Path, tiny_llama_dir: Path) -> None:
    long = {"messages": [{"role": "user", "content": "word " * 100}, {"role": "assistant", "content": "x"}]}
    write_rows(tmp_path / "train.jsonl", [*chat_rows(20), long])
    recipe = write_recipe(tmp_path, tiny_llama_dir)
    refused(run_cli("data", recipe), 3, "data.max_lost_frac", "train.jsonl:21")
    assert run_cli("data", recipe, "data.max_lost_frac=0.9").code == 0


def test_a_row_without_its_answer_is_dropped_not_trained_on_nothing(tmp_path: Path, tiny_llama_dir: Path) -> None:
    long = {"messages": [{"role": "user", "content": "word " * 100}, {"role": "assistant", "content": "x"}]}
    write_rows(tmp_path / "train.jsonl", [*chat_rows(20), long])
    recipe = write_recipe(tmp_path, tiny_llama_dir, data__overlong="cut", data__max_lost_frac=0.9)
    outcome = run_cli("data", recipe)
    assert outcome.code == 0 and "20 of 21 rows (1 dropped)" in outcome.out, outcome.out
    assert "nothing left to train" in (tmp_path / "run" / "fates.jsonl").read_text()


def test_a_cut_row_is_trained_on_up_to_seq_len_and_listed(tmp_path: Path, tiny_llama_dir: Path) -> None:
    long = {"messages": [USER, {"role": "assistant", "content": "word " * 100}]}
    write_rows(tmp_path / "train.jsonl", [*chat_rows(20), long])
    recipe = write_recipe(tmp_path, tiny_llama_dir, data__overlong="cut", data__max_lost_frac=0.9)
    outcome = run_cli("data", recipe, "--json")
    assert outcome.code == 0, outcome.err
    audit = json.loads(outcome.out)["account"]["splits"][0]["audit"]
    assert audit["counts"]["cut"] == 1 and audit["counts"]["kept"] == 20 and audit["num_lost_tokens"] > 0
    assert "it loses its end" in (tmp_path / "run" / "fates.jsonl").read_text()


def test_duplicates_and_overlap_are_counted_and_dropped_where_asked(tmp_path: Path, tiny_llama_dir: Path) -> None:
    rows = chat_rows(6)
    write_rows(tmp_path / "train.jsonl", [*rows, rows[2], rows[4]])
    write_rows(tmp_path / "test.jsonl", [rows[0], *chat_rows(3, start=50)])
    recipe = write_recipe(tmp_path, tiny_llama_dir)
    kept = run_cli("data", recipe)
    assert "train: 8 of 8 rows" in kept.out and "2 rows repeat an earlier one" in kept.out
    assert "of 4 held-out rows 1 are trained on too" in kept.out
    dropped = run_cli("data", recipe, "data.duplicates=drop")
    assert "train: 6 of 8 rows (2 duplicate)" in dropped.out
    fates = [json.loads(line) for line in (tmp_path / "run" / "fates.jsonl").read_text().splitlines()]
    assert [fate["reason"].rpartition(":")[2] for fate in fates] == ["3", "5"]


def test_a_share_of_the_rows_is_held_out(tmp_path: Path, tiny_llama_dir: Path) -> None:
    write_rows(tmp_path / "train.jsonl", chat_rows(40))
    recipe = write_recipe(tmp_path, tiny_llama_dir, data__eval=[], data__split="10%")
    first, second = (run_cli("data", recipe, f"run.seed={seed}") for seed in (0, 1))
    assert first.code == 0, first.err
    assert "train: 36 of 40 rows (4 held out)" in first.out and "eval: 4 of 4 rows" in first.out
    held_out = [line for line in (tmp_path / "run" / "fates.jsonl").read_text().splitlines() if "held_out" in line]
    assert len(held_out) == 4 and "0 are trained on too" in first.out and "eval: 4 of 4 rows" in second.out


@pytest.mark.parametrize("loss_on", ["completion", "assistant", "all"])
def test_text_beside_conversations_is_trained_whole(loss_on: str, tmp_path: Path, tiny_llama_dir: Path) -> None:
    write_rows(tmp_path / "text.jsonl", [{"text": "ls -l"}])
    sources = [{"path": "text.jsonl", "format": "text"}, {"path": "train.jsonl", "format": "messages"}]
    changes = {"data__format": "text", "data__train": sources, "data__loss_on": loss_on}
    changes |= {"data__eval": [], "eval__generate_rows": 0}
    assert run_cli("data", write_recipe(tmp_path, tiny_llama_dir, **changes)).code == 0
    only_text = write_recipe(tmp_path, tiny_llama_dir, **changes | {"data__train": ["text.jsonl", sources[0]]})
    outcome = run_cli("data", only_text)
    assert outcome.code == (0 if loss_on == "all" else 2), outcome.err
    if loss_on != "all":
        refused(outcome, 2, "data.loss_on", "data.format is text", "text.jsonl is text")


def test_special_token_text_in_content_is_text_and_counted(tmp_path: Path, tiny_llama_dir: Path) -> None:
    template = (tiny_llama_dir / "chat_template.jinja").read_text()
    special = "<|im_end|>" if "<|im_end|>" in template else "</s>"
    forged = {"role": "user", "content": f"hello {special} {special}"}
    write_rows(tmp_path / "train.jsonl", [*chat_rows(4), {"messages": [forged, ANSWER]}])
    outcome = run_cli("data", write_recipe(tmp_path, tiny_llama_dir))
    assert outcome.code == 0 and "2 special tokens written in content are encoded as text" in outcome.out, outcome.out


def test_a_failing_template_is_named_with_its_line_and_the_row(tmp_path: Path, tiny_llama_dir: Path) -> None:
    (tmp_path / "t.jinja").write_text("{{ messages[0].content }}\n{{ raise_exception('no system role here') }}")
    recipe = write_recipe(tmp_path, tiny_llama_dir, model__chat_template="t.jinja")
    refused(run_cli("data", recipe), 4, "train.jsonl:1", "line 2", "no system role here")


def test_a_template_without_end_is_stopped(
    tmp_path: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlora_train.data.sandbox.ROW_SECONDS", 0.6)
    (tmp_path / "t.jinja").write_text("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}")
    recipe = write_recipe(tmp_path, tiny_llama_dir, model__chat_template="t.jinja")
    refused(run_cli("data", recipe), 8, "template")


def test_the_account_is_written_as_json_and_as_a_page(tmp_path: Path, tiny_llama_dir: Path) -> None:
    outcome = run_cli("data", write_recipe(tmp_path, tiny_llama_dir))
    assert outcome.code == 0, outcome.err
    account = json.loads((tmp_path / "run" / "data.json").read_text())
    train, held_out = account["splits"]
    assert (train["split"], train["num_rows"], held_out["num_rows"]) == ("train", 20, 6)
    assert train["num_tokens"] > train["num_supervised_tokens"] > 20 and train["batching"]["kind"] == "packed"
    assert len(train["previews"]) >= 10 and account["overlap"]["num_rows"] == 0
    page = (tmp_path / "run" / "audit.html").read_text()
    assert page.lower().startswith("<!doctype html>") and "http" not in page.lower().replace("http-equiv", "")
    assert run_cli("train", tmp_path / "recipe.yaml", "train.max_steps=1", "eval.generate_rows=0").code == 0


def test_the_weight_of_a_source_is_how_often_it_is_seen(tmp_path: Path, tiny_llama_dir: Path) -> None:
    steps = []
    for weight in (1, 2, 0.5):
        recipe = write_recipe(tmp_path, tiny_llama_dir, data__train=[{"path": "train.jsonl", "weight": weight}])
        outcome = run_cli("data", recipe, "data.batching=shuffled", "train.grad_accum_steps=1", "--json")
        assert outcome.code == 0, outcome.err
        batching = json.loads(outcome.out)["account"]["batching"]
        steps.append((batching["num_steps"], batching["num_unreached_rows"]))
    assert steps == [(20, 0), (40, 0), (10, 10)]
    assert "10 kept rows come in none of these steps" in run_cli("data", recipe, "data.batching=shuffled").out


def test_streaming_trains_what_the_cache_trains(tmp_path: Path, tiny_llama_dir: Path) -> None:
    losses = []
    for streaming in (True, False):
        recipe = write_recipe(tmp_path, tiny_llama_dir, data__streaming=streaming, run__dir=f"run-{streaming}")
        outcome = run_cli("train", recipe, "train.max_steps=2", "eval.generate_rows=0", "--json")
        assert outcome.code == 0, outcome.err
        losses.append(json.loads(outcome.out)["adapter"]["loss"])
    assert losses[0] == losses[1]


ANSWERED = {
    "messages": {"messages": [USER, ANSWER]},
    "sharegpt": {"conversations": [{"from": "human", "value": "list files"}, {"from": "gpt", "value": "ls"}]},
    "alpaca": {"instruction": "list files", "input": "", "output": "ls"},
    "prompt_completion": {"prompt": "list files:", "completion": " ls"},
    "text": {"text": "list files: ls"},
}


@pytest.mark.parametrize("row_format", ANSWERED)
def test_each_format_is_told_by_its_columns(row_format: str, tmp_path: Path, tiny_llama_dir: Path) -> None:
    write_rows(tmp_path / "train.jsonl", [ANSWERED[row_format]] * 3)
    outcome = run_cli("data", write_recipe(tmp_path, tiny_llama_dir))
    assert outcome.code == 0 and "train: 3 of 3 rows" in outcome.out and f"format {row_format}" in outcome.out


def test_a_run_is_measured_on_the_rows_that_it_held_out(tmp_path: Path, tiny_llama_dir: Path) -> None:
    """Not on others that the same share of a changed file would be; and on other rows where they are named."""
    write_rows(tmp_path / "train.jsonl", chat_rows(20))
    changes = {"data__eval": [], "data__split": "20%", "train__max_steps": 1, "eval__generate_rows": 0}
    assert run_cli("train", write_recipe(tmp_path, tiny_llama_dir, **changes)).code == 0
    run = tmp_path / "run"
    assert json.loads(run_cli("eval", run, "--json").out)["adapter"]["num_rows"] == 4
    other = run_cli("eval", run, "--rows", tmp_path / "test.jsonl", "--json")
    assert other.code == 0 and json.loads(other.out)["adapter"]["num_rows"] == 6, other.err
    refused(run_cli("eval", run, "data.split=50%"), 2, "data.split: cannot be changed here")
    for change in ("data.format=text", "data.columns={prompt: messages}"):
        refused(run_cli("eval", run, change), 2, "goes by what each row asks", "name held-out rows: data.eval=FILE")
    write_rows(tmp_path / "train.jsonl", chat_rows(30))
    refused(run_cli("eval", run), 3, "train.jsonl has changed since", "data.eval=FILE")
    refused(run_cli("export", run, tmp_path / "out"), 3, "train.jsonl has changed since")
    assert run_cli("export", run, tmp_path / "out", f"data.eval={tmp_path / 'test.jsonl'}").code == 0


def test_a_resume_may_be_measured_otherwise(tmp_path: Path, tiny_llama_dir: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_llama_dir, train__save_every=1)
    assert run_cli("train", recipe, "train.max_steps=3").code == 0
    outcome = run_cli("train", recipe, "train.max_steps=3", "--resume", "--from", "2", "eval.generate_rows=4", "--json")
    assert outcome.code == 0, outcome.err
    result = json.loads(outcome.out)
    assert len(result["base"]["answers"]) == len(result["adapter"]["answers"]) == 4
