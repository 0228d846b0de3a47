"""Conflicts inside a recipe: each is found, names both keys and their places, and its cure loads."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_train.errors import Problem, RecipeError
from qlora_train.recipe.advice import edit_distance, near_files, nearest
from qlora_train.recipe.load import load_recipe
from qlora_train.recipe.validate import cross_check

GOOD = "model: {path: org/base}\ndata:\n  train: [train.jsonl]\nrun: {dir: out}\n"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("train.jsonl", "test.jsonl", "template.jinja"):
        (tmp_path / name).write_text("{}\n")
    (tmp_path / "adapter").mkdir()
    Path("link.jsonl").symlink_to("train.jsonl")
    return tmp_path


def check(*overrides: str, text: str = GOOD) -> list[Problem]:
    Path("r.yaml").write_text(text)
    try:
        load_recipe(Path("r.yaml"), overrides)
    except RecipeError as error:
        return list(error.problems)
    return []


@pytest.mark.parametrize(
    ("lines", "where", "names"),
    [
        ("adapter:\n  method: lroa\n", 6, ["adapter.method", "'lroa'"]),
        ("adapter:\n  init_from: adaptr\n", 6, ["adapter.init_from", "no folder"]),
        ("adapter:\n  init_from: train.jsonl\n", 6, ["adapter.init_from", "is a file, not a folder"]),
        (
            "quant:\n  quant_type: none\n  double_quant: true\n",
            7,
            ["quant.double_quant", "quant.quant_type", "r.yaml:6"],
        ),
        ("quant:\n  quant_type: none\n  block_size: 64\n", 7, ["quant.block_size", "quant.quant_type"]),
        ("quant:\n  quant_type: none\n  storage_dtype: uint8\n", 7, ["quant.storage_dtype", "quant.quant_type"]),
        ("quant:\n  quant_type: none\n  skip_modules: [a]\n", 7, ["quant.skip_modules", "quant.quant_type"]),
        ("eval:\n  every: 5\n", 6, ["eval.every", "data.eval is empty (left at its default)"]),
        ("eval:\n  generate_rows: 5\n", 6, ["eval.generate_rows", "data.eval"]),
        ("eval:\n  generate_rows: 0\n  max_new_tokens: 5\n", 7, ["eval.max_new_tokens", "eval.generate_rows is 0"]),
    ],
)
def test_conflicts_in_the_file(lines: str, where: int, names: list[str]) -> None:
    found = check(text=GOOD + lines)
    assert len(found) == 1 and found[0].where == f"r.yaml:{where}" and found[0].fix
    for name in names:
        assert name in found[0].what


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        (["data.max_eval_rows=3"], ["data.max_eval_rows", "data.eval"]),
        (["data.format=text", "data.loss_on=assistant"], ["data.loss_on", "data.format", "set on the command line"]),
        (["data.format=text", "data.loss_on=completion"], ["data.loss_on", "data.format"]),
        (["data.eval=train.jsonl"], ["data.eval", "data.train (set at r.yaml:3)"]),
        (["data.eval=link.jsonl"], ["data.eval", "data.train"]),
        (["data.eval=nothing.jsonl"], ["data.eval", "no file"]),
        (["data.eval=train.jsonl", "data.train=train.jsonl"], ["data.eval", "no row of it is held out"]),
        (["data.eval=test.jsonl", "data.split=5%"], ["data.split", "data.eval", "held-out rows"]),
        (["data.eval={path: test.jsonl, weight: 2}"], ["data.eval[0].weight"]),
        (["data.train={path: train.jsonl, revision: main}"], ["data.train[0].revision", "local path"]),
        (["data.train={path: train.jsonl, subset: en}"], ["data.train[0].subset", "local path"]),
        (["data.train={path: train.jsonl, split: test}"], ["data.train[0].split has no effect", "one file"]),
        (["data.columns={instrution: question}"], ["data.columns", "'instrution'"]),
        (["data.train={path: train.jsonl, columns: {mesages: d}}"], ["data.train[0].columns", "'mesages'"]),
        (["data.eval={path: test.jsonl, columns: {tool: d}}"], ["data.eval[0].columns", "'tool'"]),
        (["model.attn_implementation=sdpa"], ["model.attn_implementation", "data.batching"]),
        (["model.path=./adapter", "model.revision=main"], ["model.revision", "model.path", "local path"]),
        (["model.path=package:a/b", "model.revision=main"], ["model.revision", "model.path", "package"]),
        (["model.path=./nothing"], ["model.path", "no file or folder"]),
        (["model.chat_template=tmplate.jinja"], ["model.chat_template", "no file"]),
        (["run.dir=train.jsonl"], ["run.dir", "is a file"]),
        (["data.eval=" + "x" * 300], ["data.eval", "no file"]),
    ],
)
def test_conflicts_on_the_command_line(overrides: list[str], names: list[str]) -> None:
    found = check(*overrides)
    assert len(found) == 1 and found[0].where == "command line" and found[0].fix, [str(problem) for problem in found]
    for name in names:
        assert name in found[0].what


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["quant.quant_type=none"],
        ["quant.quant_type=none", "quant.double_quant=false"],
        ["eval.every=0", "eval.generate_rows=0"],
        ["eval.batch_size=2", "eval.max_new_tokens=5"],  # an export reads them, of training rows if need be
        ["eval.every=5", "data.eval=test.jsonl", "data.max_eval_rows=3"],
        ["data.format=text"],
        ["data.format=text", "data.loss_on=all"],
        ["train.schedule=constant", "train.warmup_frac=0.1"],
        ["model.revision=main"],
        ["model.chat_template=template.jinja", "adapter.init_from=adapter", "run.dir=adapter"],
        ["adapter.method=rslora"],
        ["data.columns={instruction: q, system: s, role: r, from: f, text: t}"],
        ["data.train={path: adapter, split: test}"],
        ["data.train={path: adapter, split: a}", "data.eval={path: adapter, split: b}"],
    ],
)
def test_recipes_that_agree_with_themselves(overrides: list[str]) -> None:
    assert check(*overrides) == []


def test_one_file_is_the_same_whatever_its_split() -> None:
    whats = [problem.what for problem in check("data.eval={path: link.jsonl, split: test}")]
    assert len(whats) == 2
    assert "data.eval[0].split has no effect" in whats[0] and "no row of it is held out" in whats[1]
    folder = ("data.train={path: adapter, split: a}", "data.eval={path: adapter, split: a}")
    assert ["no row of it is held out" in problem.what for problem in check(*folder)] == [True]


def test_near_names_are_in_the_fix() -> None:
    assert check("adapter.method=lroa")[0].fix.startswith("did you mean lora? The methods are: lora, ")
    assert "test.jsonl" in check("data.eval=tset.jsonl")[0].fix
    assert "template.jinja" in check("model.chat_template=tmplate.jinja")[0].fix
    assert check("data.columns={instrution: question}")[0].fix.startswith("did you mean instruction? ")
    assert near_files(Path("nowhere/at/all.yaml")) == ""
    assert near_files(Path("train.json")).startswith("nearest in .: train.jsonl")


def test_conflicts_and_schema_errors_come_together_where_sections_parsed() -> None:
    whats = [problem.what for problem in check("adapter.method=lroa", "train.epochs=0", "data.eval=nothing.jsonl")]
    assert len(whats) == 3
    whats = [problem.what for problem in check("data.seq_len=0", "data.eval=nothing.jsonl", "eval.every=3")]
    assert len(whats) == 2  # of the data section only seq_len is unknown


def test_cross_check_needs_origins_to_call_a_default_ignored() -> None:
    Path("r.yaml").write_text(GOOD)
    loaded = load_recipe(Path("r.yaml"), ["quant.quant_type=none"])
    assert cross_check(loaded.recipe, loaded.origins) == []
    assert len(cross_check(loaded.recipe, {"quant.double_quant": "r.yaml:3"})) == 1


@pytest.mark.parametrize(
    ("a", "b", "edits"),
    [
        ("", "", 0),
        ("", "ab", 2),
        ("abc", "abc", 0),
        ("abc", "acb", 1),
        ("abcd", "bacd", 1),
        ("abc", "xbc", 1),
        ("abc", "a", 2),
    ],
)
def test_edit_distance(a: str, b: str, edits: int) -> None:
    assert edit_distance(a, b) == edit_distance(b, a) == edits


def test_nearest() -> None:
    assert nearest("adam_beta", ["adam_beta1", "adam_beta2", "epochs"]) == ["adam_beta1", "adam_beta2"]
    assert nearest("Learning-Rate", ["learning_rate", "epochs"]) == ["learning_rate"]
    assert nearest("zzz", ["r", "dir"]) == [] and nearest("x" * 10_000, ["r"]) == [] and nearest("x", []) == []


def test_a_wrong_key_hides_no_conflict_between_the_others_of_its_section() -> None:
    lines = "quant:\n  quant_type: none\n  double_quant: true\n  storage_dtype: 7\n"
    lines += "train:\n  epochs: -1\n  optimizer: paged_adamw\n"
    found = check("model.device=cpu", "data.seq_len=1", "eval.every=5", text=GOOD + lines)
    named = [problem.what.partition(":")[0].partition(" ")[0] for problem in found]
    assert named == [
        *("quant.double_quant", "quant.storage_dtype", "train.epochs", "train.optimizer"),
        *("data.seq_len", "eval.every"),
    ]


def test_files_are_near_by_their_stems() -> None:
    for name in ("gpu-24gb.yaml", "cpu.yaml", "poems.yaml"):
        Path(name).touch()
    assert near_files(Path("poem.yaml")) == "nearest in .: poems.yaml"
    assert near_files(Path("xyz.yaml")) == ""
