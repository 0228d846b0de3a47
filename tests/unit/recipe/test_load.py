"""The recipe loader: YAML without surprises, every mistake at once with its place, origins, and the round trip."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import get_args

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from qlora_train.errors import Problem, RecipeError
from qlora_train.recipe.advice import KEYS
from qlora_train.recipe.load import (
    LoadedRecipe,
    load_recipe,
    load_resolved,
    recipe_as_dict,
    resolved_yaml,
    with_overrides,
)
from qlora_train.recipe.methods import OPTIONS
from qlora_train.recipe.reader import MAX_BYTES, MAX_NODES, dump_value, parse
from qlora_train.recipe.schema import Recipe

GOOD = """\
model: {path: org/base}
data:
  train: train.jsonl
run:
  dir: out
"""
SAME_FOLDER = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder with one data file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").write_text("{}\n")
    (tmp_path / "test.jsonl").write_text("{}\n")
    return tmp_path


def load(text: str | bytes, *overrides: str) -> LoadedRecipe:
    path = Path("r.yaml")
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_recipe(path, overrides)


def problems(text: str | bytes, *overrides: str) -> tuple[Problem, ...]:
    with pytest.raises(RecipeError) as caught:
        load(text, *overrides)
    assert caught.value.exit_code == 2
    return caught.value.problems


def only(text: str | bytes, *overrides: str) -> Problem:
    found = problems(text, *overrides)
    assert len(found) == 1, [str(problem) for problem in found]
    return found[0]


def test_a_small_recipe_loads_with_defaults(here: Path) -> None:
    loaded = load(GOOD)
    assert loaded.path == here / "r.yaml"
    assert [source.path for source in loaded.recipe.data.train] == [str(here / "train.jsonl")]
    assert loaded.recipe.run.dir == here / "out"
    assert loaded.recipe.model.path == "org/base"
    assert loaded.recipe.train.learning_rate == 2e-4


def test_the_recipes_that_ship_load() -> None:
    shipped = sorted((Path(__file__).parents[3] / "recipes").glob("*.yaml"))
    assert shipped
    for path in shipped:
        assert load_recipe(path).recipe.run.dir.is_absolute()


@pytest.mark.parametrize(
    ("key", "written", "value"),
    [
        ("train.learning_rate", "1e-4", 1e-4),
        ("train.learning_rate", "1E-4", 1e-4),
        ("train.learning_rate", "1.e-4", 1e-4),
        ("train.learning_rate", "+1e4", 1e4),
        ("train.learning_rate", ".5", 0.5),
        ("adapter.alpha", "32", 32.0),
        ("train.max_steps", "null", None),
        ("train.max_steps", "~", None),
        ("run.seed", "0", 0),
        ("adapter.target_modules", "[q_proj, v_proj]", ("q_proj", "v_proj")),
        ("adapter.target_modules", "all-linear", "all-linear"),
        ("quant.skip_modules", "lm_head", ("lm_head",)),
        ("quant.skip_modules", "[yes, off]", ("yes", "off")),
        ("quant.double_quant", "false", False),
        ("model.revision", "12:30", "12:30"),
        ("model.revision", "2020-01-01", "2020-01-01"),
        ("model.revision", "yes", "yes"),
        ("model.revision", "010", "010"),
        ("model.revision", "0x10", "0x10"),
        ("model.revision", "1_000", "1_000"),
    ],
)
def test_values_in_the_file_and_on_the_command_line(here: Path, key: str, written: str, value: object) -> None:
    section, name = key.split(".")
    base = GOOD.replace(" {path: org/base}", "\n  path: org/base")
    in_file = base.replace(f"{section}:\n", f"{section}:\n  {name}: {written}\n")
    in_file = in_file if in_file != base else f"{base}{section}:\n  {name}: {written}\n"
    for loaded in (load(in_file), load(base, f"{key}={written}")):
        found = getattr(getattr(loaded.recipe, section), name)
        assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("line", "column", "text"),
    [
        (2, 1, "model:\n\tpath: x\n"),
        (2, 1, "data: [a, b\nrun: {dir: x}\n"),
        (2, 1, "model: {path: x}\n---\nrun: {dir: y}\n"),
        (1, 10, "model: a: b\n"),
        (1, 8, "model: @x\n"),
        (1, 8, "model: !!python/object/apply:os.system ['touch marker']\n"),
        (1, 8, "model: !!str x\n"),
        (1, 8, "model: &a {path: x}\n"),
        (1, 8, "model: *a\n"),
        (1, 17, "[" * 500),
        (1, 1, "- a\n- b\n"),
        (1, 1, "just text\n"),
        (1, 1, ""),
        (1, 1, "# nothing\n"),
        (2, 4, "a: b\nc: \0\n"),
        (1, 4, 'a: "\\UFFFFFFFF"\n'),
        (1, 1, GOOD.encode("utf-16")),
        (1, 4, b"a: \xff\n"),
        (1, 9, "%YAML 1." + "1" * 5000 + "\n--- a\n"),
        (1, 2 * MAX_NODES, "[" + "a," * (MAX_NODES + 5) + "]"),
    ],
)
def test_broken_files_say_line_and_column(here: Path, line: int, column: int, text: str | bytes) -> None:
    problem = only(text)
    assert re.fullmatch(rf"r\.yaml:{line}:\d+", problem.where or ""), problem
    assert abs(int((problem.where or "").rsplit(":", 1)[1]) - column) <= 3, problem
    assert problem.fix and "\n" not in problem.what
    assert not (here / "marker").exists()


def test_a_file_that_is_too_large_is_not_parsed(here: Path) -> None:
    assert "1 MiB" in only(b"#" * (MAX_BYTES + 1)).what


@pytest.mark.parametrize("text", [b"\xef\xbb\xbf" + GOOD.encode(), GOOD.replace("\n", "\r\n").encode()])
def test_bom_and_crlf_are_accepted(here: Path, text: bytes) -> None:
    loaded = load(text)
    assert loaded.recipe == load(GOOD).recipe
    assert loaded.origins["run.dir"] == "r.yaml:5"


def test_duplicate_keys_name_both_lines(here: Path) -> None:
    problem = only(GOOD + "train:\n  epochs: 1\n  epochs: 2\n")
    assert problem.where == "r.yaml:8:3"
    assert "train.epochs: given twice, at line 7 and at line 8" in problem.what


def test_merge_keys_and_odd_keys_are_refused(here: Path) -> None:
    assert "merge keys" in only(GOOD + "train:\n  <<: {epochs: 3}\n").fix
    assert "list or a mapping" in only(GOOD + "? [a]\n: b\n").what
    assert "\\x1b" in only(GOOD.replace("dir: out", 'dir: "a\\e[31m"')).what


BAD_VALUES = {
    "train.learning_rate": [
        ".nan",
        ".inf",
        "-1",
        "0",
        "1e308",
        "true",
        '"x"',
        "[]",
        "null",
        "yes",
        "12:30",
        "9" * 5000,
    ],
    "train.warmup_frac": [".nan", "-0.1", "1", "true", "x", "[]", "null"],
    "train.max_steps": [".nan", "0", "-1", "1e3", "1.5", "true", "x", "[1]", "9" * 200, "010"],
    "adapter.r": ["0", "4097", "16.0", "false", '"16"', "null", "010", "0x10", "1_6", "{a}"],
    "quant.block_size": ["65", "64.0", "true", '"64"', "null"],
    "quant.double_quant": ["yes", "on", "1", "0", "null", '"true"', "[]"],
    "quant.quant_type": ["nf5", "NF4", "4", "null", "[]"],
    "adapter.target_modules": ["[1]", '[""]', "3", "null", "q_proj", "[[q_proj]]"],
    "data.train": ["[]", "null", "3", "[3]", '""', "${HOME}/x.jsonl", "['$DATA/x']", "true"],
    "run.dir": ["null", "3", "[a]", '""', "${HOME}/x", "~nosuchuser-at-all/x"],
    "model.path": ["null", "3", "[a]", '""', "${HOME}/x.gguf"],
}


@pytest.mark.parametrize(
    ("key", "written"), [(key, written) for key, values in BAD_VALUES.items() for written in values]
)
def test_a_wrong_value_is_named_as_written_with_what_is_allowed(here: Path, key: str, written: str) -> None:
    problem = only(GOOD, f"{key}={written}")
    assert problem.what.startswith(key) and problem.where == "command line"
    assert written.strip("[]{}\"'")[:20] in problem.what
    assert problem.fix and "Input should" not in str(problem) and "pydantic" not in str(problem)


def test_wrong_values_in_the_file_have_their_own_column(here: Path) -> None:
    problem = only(GOOD + "adapter:\n  target_modules: [q_proj, 3]\n")
    assert problem.where == "r.yaml:7:28"
    assert problem.what == "adapter.target_modules[1]: 3 is not a string"
    problem = only(GOOD + "adapter:\n  r: 010\n")
    assert problem.where == "r.yaml:7:6"
    assert "such as 10" in problem.fix and "at most 4096" in problem.fix
    assert "did you mean nf4?" in only(GOOD + "quant: {quant_type: nf5}\n").fix
    assert only(GOOD, "train.max_steps=1e3").fix.endswith("write 1000")
    assert "default, 16" in only(GOOD, "adapter.r=null").fix


def test_all_mistakes_come_at_once_in_the_order_of_the_file(here: Path) -> None:
    text = "model: {path: 3}\ntrain:\n  learnig_rate: 1e-4\n  epochs: 0\n  seed: 1\n"
    text += "adapter:\n  method: lroa\ndata:\n  trian: x\n"
    found = problems(text, "run.dri=x", "eval.every=-1")
    assert [(problem.where, problem.what) for problem in found] == [
        ("r.yaml:1:15", "model.path: 3 is not a string"),
        ("r.yaml:3:3", "train.learnig_rate: unknown key"),
        ("r.yaml:4:11", "train.epochs: 0 is out of range"),
        ("r.yaml:5:3", "train.seed: unknown key"),
        ("r.yaml:7", "adapter.method: 'lroa' is not a known method"),
        ("r.yaml:9:3", "data.trian: unknown key"),
        ("command line", "run.dri: unknown key"),
        ("command line", "eval.every: -1 is out of range"),
    ]
    fixes = [problem.fix for problem in found]
    assert fixes[1] == "did you mean learning_rate?" and fixes[3] == "it belongs to the section run"
    assert fixes[5] == "did you mean train?" and fixes[6] == "did you mean dir?"


def test_missing_keys_point_at_their_section(here: Path) -> None:
    found = {problem.what: problem for problem in problems("model: {path: org/base}\ndata:\n  seq_len: 64\nrun:\n")}
    assert found["data.train: missing"].where == "r.yaml:2:1"
    assert found["run.dir: missing"].where == "r.yaml:4:1"
    assert len(found) == 2
    assert only("model: {path: org/base}\ndata: {train: train.jsonl}\n").what == "run.dir: missing"


def test_a_value_out_of_range_is_not_offered_again(here: Path) -> None:
    (found,) = problems(GOOD, "model.lord_keep_frac=1.0")
    assert found.what == "model.lord_keep_frac: 1.0 is out of range" and "write 1" not in found.fix


def test_a_misspelt_section_is_read_as_what_it_was_meant_to_be(here: Path) -> None:
    found = problems(GOOD.replace("data:", "dta:") + "exprot:\n  shard_gib: 0\n")
    assert [problem.what for problem in found] == [
        "dta: unknown section",
        "exprot: unknown section",
        "export.shard_gib: 0 is out of range",
    ]
    assert found[0].fix == "did you mean data?"
    assert "stands where keys are wanted" in only(GOOD + "eval: 3\n").what
    assert "train.learning_rate" in only(GOOD + "learning_rate: 3\n").fix


def test_overrides_win_and_relative_paths_start_at_the_current_folder(here: Path) -> None:
    (here / "sub").mkdir()
    path = here / "sub" / "r.yaml"
    path.write_text(GOOD.replace("train.jsonl", "../train.jsonl") + "train:\n  epochs: 0\n")
    overrides = ["train.epochs=2", "data.eval=test.jsonl", "train.learning_rate=1e-4", "train.max_steps=null"]
    loaded = load_recipe(path, overrides)
    assert loaded.recipe.train.epochs == 2.0 and loaded.recipe.train.learning_rate == 1e-4
    assert [source.path for source in loaded.recipe.data.eval] == [str(here / "test.jsonl")]
    assert [source.path for source in loaded.recipe.data.train] == [str(here / "train.jsonl")]
    assert loaded.recipe.run.dir == here / "sub" / "out"
    assert loaded.origins["train.epochs"] == "command line"
    assert loaded.origins["data.train"] == "sub/r.yaml:3"
    assert loaded.origins["quant.quant_type"] == "default"
    assert set(loaded.origins) == {f"{section}.{key}" for section, keys in KEYS.items() for key in keys}


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("train.epochs", "without a value"),
        ("train=3", "a whole section"),
        ("train.epochs=", "an empty value is not a number"),
        ("train.max_steps=", "no value"),
        ("train.keep=[1", "expected ',' or ']'"),
        ("trian.epochs=1", "unknown section"),
        ("learning_rate=1", "unknown section"),
        ("train.lr=1", "unknown key"),
        ("run.seed=!!python/name:os.system", "the tag"),
        ("", "without a value"),
    ],
)
def test_overrides_that_cannot_be_used(here: Path, override: str, what: str) -> None:
    problem = only(GOOD, override)
    assert problem.where == "command line" and what in problem.what and problem.fix
    assert "given twice" in only(GOOD, "train.epochs=1", "train.epochs=2").what


def test_files_that_cannot_be_read(here: Path) -> None:
    (here / "quickstart.yaml").write_text(GOOD)
    for name, what, fix in [
        ("quickstrat.yaml", "no such recipe", "quickstart.yaml"),
        (".", "a folder", "quickstart.yaml"),
        ("/dev/null", "a device", "file"),
        ("a\0b", "cannot be read", "path"),
        ("x" * 300, "cannot be read", "path"),
    ]:
        with pytest.raises(RecipeError) as caught:
            load_recipe(Path(name))
        assert what in caught.value.problems[0].what and fix in caught.value.problems[0].fix


def test_model_paths(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(here))
    (here / "folder").mkdir()
    (here / "m.gguf").touch()
    for written, path in [
        ("org/name", "org/name"),
        ("package:llm_x/F.gguf", "package:llm_x/F.gguf"),
        ("folder", str(here / "folder")),
        ("./folder", str(here / "folder")),
        ("m.gguf", str(here / "m.gguf")),
        ("~/m.gguf", str(here / "m.gguf")),
        (str(here / "folder"), str(here / "folder")),
    ]:
        assert load(GOOD.replace("org/base", f'"{written}"')).recipe.model.path == path


def test_the_resolved_recipe_reads_back_equal_and_names_every_origin(here: Path) -> None:
    loaded = load(GOOD, "train.learning_rate=1e-5", "adapter.target_modules=['yes', '1e-4', 'a: b', '#x', é]")
    text = resolved_yaml(loaded)
    lines = text.splitlines()
    assert "  learning_rate: 1.0e-05  # command line" in lines and "  r: 16  # default" in lines
    assert f"  dir: {here}/out  # r.yaml:5" in lines
    Path("resolved.yaml").write_text(text)
    Path("train.jsonl").unlink()
    Path("org/base").mkdir(parents=True)  # must not turn the hub id into a path
    assert load_resolved(Path("resolved.yaml")) == loaded.recipe
    plain = recipe_as_dict(loaded.recipe)
    assert json.loads(json.dumps(plain)) == plain
    assert {"version": 1, **plain} == yaml.safe_load(text)
    Path("resolved.yaml").write_text(text.replace("  r: 16", "  r: 0"))
    with pytest.raises(RecipeError, match=r"resolved\.yaml:.*adapter\.r: 0 is out of range"):
        load_resolved(Path("resolved.yaml"))


def test_overrides_on_a_loaded_recipe_change_the_named_sections_only(here: Path) -> None:
    recipe = load(GOOD).recipe
    Path("train.jsonl").unlink()  # what the run was trained on may be gone
    changed = with_overrides(recipe, ["data.eval=test.jsonl", "eval.generate_rows=9"], ("data", "eval"))
    assert changed.data.eval[0].path == str(here / "test.jsonl") and changed.eval.generate_rows == 9
    assert changed.data.train == recipe.data.train and changed.train == recipe.train
    assert with_overrides(recipe, [], ()) == recipe
    with pytest.raises(RecipeError) as caught:
        with_overrides(
            recipe, ["train.epochs=2", "eval.every=-1", "data.evl=x", "data.eval=no.jsonl"], ("data", "eval")
        )
    assert [problem.what.split(":")[0] for problem in caught.value.problems] == [
        "data.evl",
        "train.epochs",
        "eval.every",
        "data.eval",
    ]


_TEXT = st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp")), max_size=30)


@SAME_FOLDER
@given(
    st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | _TEXT, st.lists, max_leaves=5)
)
@example(["1e-4", "010", "12:30", "<<", "=", "yes", "null", "", " a ", "- b", "\ufeff", "\ufffe", "\xa0", "&a", "!x"])
def test_dumped_values_read_back_equal(value: object) -> None:
    def plain(node: object) -> object:
        inner = getattr(node, "value", node)
        return [plain(item) for item in inner] if isinstance(inner, list) else inner

    text = dump_value(value)
    root, found = parse(f"key: {text}  # origin", "x")
    assert "\n" not in text and not found and root is not None and isinstance(root.value, dict)
    assert plain(root.value["key"][1]) == value


@settings(SAME_FOLDER, max_examples=50)
@given(st.binary(max_size=60) | st.text(max_size=60) | st.text("[]{}:,-?&*!|>'\"%@`#\n\t ae1.\\", max_size=40))
def test_any_bytes_end_in_a_recipe_error(here: Path, junk: bytes | str) -> None:
    raw = junk if isinstance(junk, bytes) else junk.encode("utf-8", "surrogatepass")
    for text in (raw, b"model: {path: a}\ntrain:\n  " + raw):
        assert problems(text)


def test_a_flood_of_unknown_keys_ends_soon(here: Path) -> None:
    assert len(problems(GOOD + "train:\n" + "".join(f"  lerning_rat{i}: 1\n" for i in range(1000)))) == 1000


def test_every_literal_of_the_schema_is_accepted(here: Path) -> None:
    for section, keys in KEYS.items():
        fields = Recipe.model_fields[section].annotation.model_fields  # type: ignore[union-attr]
        for key in keys:
            for choice in (value for value in get_args(fields[key].annotation) if isinstance(value, str | int)):
                others = ["data.batching=shuffled"] if key == "attn_implementation" else []
                others += [f"adapter.method={OPTIONS[key][0]}"] if section == "adapter" and key in OPTIONS else []
                others += ["quant.quant_type=int4", f"quant.block_size={choice}"] if key == "group_size" else []
                others += ["adapter.experts=[a, b]"] if key == "granularity" else []
                loaded = load(GOOD, f"{section}.{key}={choice}", *others)
                assert getattr(getattr(loaded.recipe, section), key) == choice


def test_a_source_is_a_path_or_a_mapping_and_keeps_its_own_settings(here: Path) -> None:
    (here / "more.csv").write_text("question,answer\n", encoding="utf-8")
    text = GOOD.replace(
        "train: train.jsonl",
        "train:\n    - train.jsonl\n"
        "    - {path: more.csv, weight: 0.5, format: alpaca, columns: {instruction: question}}",
    )
    assert text != GOOD
    first, second = load(text).recipe.data.train
    assert (first.path, first.weight, first.format, first.columns) == (str(here / "train.jsonl"), 1.0, None, {})
    assert (second.path, second.weight, second.format) == (str(here / "more.csv"), 0.5, "alpaca")
    assert second.columns == {"instruction": "question"}


@pytest.mark.parametrize(
    ("entry", "what", "fix"),
    [
        ("{path: train.jsonl, wieght: 2}", "data.train[0].wieght: unknown key", "did you mean weight?"),
        ("{path: train.jsonl, weight: 0}", "data.train[0].weight: 0 is out of range", "above 0"),
        ("{path: train.jsonl, format: alpacca}", "data.train[0].format: alpacca is not", "did you mean alpaca?"),
        ("{path: train.jsonl, columns: {a: 3}}", "data.train[0].columns.a: 3 is not", "string"),
        ("{weight: 2}", "data.train[0]", "path"),
        ("3", "data.train[0]: 3 is not a path", "path"),
    ],
)
def test_a_wrong_source_is_named_with_its_place(here: Path, entry: str, what: str, fix: str) -> None:
    problem = only(GOOD.replace("train: train.jsonl", f"train: [{entry}]"))
    assert problem.what.startswith(what) and fix in problem.fix, problem
    assert re.fullmatch(r"r\.yaml:3:\d+", problem.where or "")


def test_a_hub_id_stays_as_it_is_and_a_percentage_is_a_share(here: Path) -> None:
    data = load(GOOD, "data.train=owner/name", "data.split=5%").recipe.data
    assert data.train[0].path == "owner/name" and data.split == 0.05


def test_a_hub_id_may_have_a_dot(here: Path) -> None:
    def path_of(written: str) -> str:
        return load(GOOD, f"data.train={written}").recipe.data.train[0].path

    assert path_of("teknium/OpenHermes-2.5") == "teknium/OpenHermes-2.5"
    for name in ("data/rows.v2", "data/rows.csv"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("{}\n")
        assert path_of(name) == str(here / name)
    for name in ("data/gone.jsonl", "data/rows.jsonl.gz", "./owner/name-2.5", "owner/a/b"):
        assert "there is no file or folder" in only(GOOD, f"data.train={name}").what
    assert load(GOOD, "data.split=0.125").recipe.data.split == 0.125
    assert only(GOOD, "data.split=105%").what.startswith("data.split")


def test_what_to_write_in_place_of_one_word(here: Path) -> None:
    section = only("adapter: qlora\n" + GOOD)
    assert section.fix == "adapter is a section here; for its first key write adapter: {method: lora}"
    assert only(GOOD + "adapter: {target_modules: 'q_proj,v_proj'}\n").fix.endswith(": write [q_proj, v_proj]")


def test_the_keys_of_a_section_are_listed_once(here: Path) -> None:
    with pytest.raises(RecipeError) as error:
        load(GOOD + "train: {zzzz: 1, qqqq: 2}\neval: {zzzz: 1}\n")
    fixes = [problem.fix for problem in error.value.problems]
    assert [fix.count("the keys of") for fix in fixes] == [1, 0, 1]


def test_a_key_out_of_place_is_one_problem(here: Path) -> None:
    recipe = load(GOOD).recipe
    with pytest.raises(RecipeError) as error:
        with_overrides(recipe, ["data.train=[a.jsonl]"], ["eval"])
    assert len(error.value.problems) == 1 and "cannot be changed here" in str(error.value)
