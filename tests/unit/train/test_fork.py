"""What differs from a checkpoint: named with both sides, refused, allowed, or only rounded otherwise."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qlora_train.artifacts.layout import RunDir
from qlora_train.errors import RecipeError, ResumeError
from qlora_train.train.fork import (
    Change,
    OtherRun,
    binding_changes,
    check_allowed,
    describe_changes,
    environment_changes,
    is_another_split,
    may_fork,
    recipe_changes,
    record_resume,
    refuse_changes,
    refuse_idle,
    refuse_other_device,
)
from qlora_train.train.keys import default_of, trajectory_keys
from qlora_train.train.state import Binding
from tests.unit.train.test_keys import RECIPE

BINDING = Binding(base="b" * 64, data="d" * 64, template="e" * 64, recipe=trajectory_keys(RECIPE), tokenizer="a" * 64)
NOBODY: frozenset[str] = frozenset()


def stored(**changes: Any) -> dict[str, Any]:
    """A binding as a checkpoint gives it back."""
    return dict(json.loads(json.dumps(replace(BINDING, **changes).as_dict())))


def test_the_same_binding_is_accepted_after_json() -> None:
    assert binding_changes(stored(), BINDING) == []


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("base", "the base model"),
        ("data", "the training data"),
        ("template", "the chat template"),
        ("tokenizer", "the tokenizer"),
    ],
)
def test_another_fingerprint_is_named_with_both_sides(key: str, words: str) -> None:
    changes = binding_changes(stored(**{key: "f" * 64}), BINDING, {"model.path": "r.yaml:2", "data.train": "r.yaml:7"})
    assert [change.key for change in changes] == [key]
    with pytest.raises(OtherRun) as caught:
        refuse_changes(changes, NOBODY, "step-000004")
    (row,) = [line for line in str(caught.value).splitlines() if words in line]
    now = getattr(BINDING, key)[:16]
    assert row.split()[-3:-1] == ["f" * 16, now] or row.split()[-2:] == ["f" * 16, now]
    assert "not the run of step-000004: one thing that decides what is trained changed" in str(caught.value)


def test_every_differing_key_is_in_the_table_with_its_place() -> None:
    then = {**stored()["recipe"], "train.learning_rate": 0.5, "adapter.lost": 1, "run.seed": 7}
    changes = recipe_changes(then, BINDING.recipe, {"train.learning_rate": "r.yaml:12", "run.seed": "command line"})
    with pytest.raises(OtherRun) as caught:
        refuse_changes(changes, NOBODY, "step-000004")
    rows = [line.split() for line in str(caught.value).splitlines() if line.startswith("  ")]
    assert rows[1:] == [
        ["adapter.lost", "1", "None"],
        ["run.seed", "7", "0", "command", "line"],
        ["train.learning_rate", "0.5", "0.0002", "r.yaml:12"],
    ]
    assert caught.value.exit_code == ResumeError.exit_code and len(caught.value.problems) == 3
    assert caught.value.problems[2].where == "r.yaml:12"
    assert "--allow-change" not in str(caught.value), "of an adapter key, no run can be a fork"


def test_a_key_that_came_after_the_checkpoint_had_its_default_there() -> None:
    then = stored()["recipe"]
    for key in ("adapter.new_tokens", "adapter.target_modules", "run.seed", "train.adam_beta2", "data.format"):
        del then[key]
    assert recipe_changes(then, BINDING.recipe) == []
    (change,) = recipe_changes(then, {**BINDING.recipe, "adapter.new_tokens": ["<t>"]})
    assert (change.key, change.old, change.new) == ("adapter.new_tokens", [], ["<t>"])
    assert default_of("data.train") is default_of("no.such") is None, "these have none"


def test_a_fork_is_offered_where_all_may_change() -> None:
    with pytest.raises(OtherRun, match=r"--resume --allow-change run\.seed --allow-change train\.epochs$"):
        refuse_changes([Change("run.seed", 0, 1), Change("train.epochs", 1, 2)], NOBODY, "step-000004")


def test_what_is_allowed_passes_and_nothing_else() -> None:
    changes = [Change("run.seed", 0, 1), Change("data", "a", "b"), Change("data.train.weight", [1.0], [2.0])]
    refuse_changes(changes, frozenset({"run.seed", "data.train"}), "step-000004")
    with pytest.raises(OtherRun) as caught:
        refuse_changes(changes, frozenset({"data.train"}), "step-000004")
    assert [problem.what.partition(":")[0] for problem in caught.value.problems] == ["run.seed"]


def test_what_was_allowed_and_has_not_changed_is_an_error() -> None:
    refuse_idle([Change("run.seed", 0, 1)], frozenset({"run.seed"}))
    with pytest.raises(RecipeError, match=r"train\.epochs: nothing has changed there"):
        refuse_idle([Change("run.seed", 0, 1)], frozenset({"run.seed", "train.epochs"}))


def test_which_keys_a_fork_may_change() -> None:
    for key in ("train.learning_rate", "run.seed", "data.train", "adapter.dropout", "model.chat_template"):
        assert may_fork(key) and check_allowed([key], RECIPE) == {key}
    for key in ("adapter.r", "adapter.target_modules", "quant.quant_type", "train.optimizer"):
        assert not may_fork(key)
        with pytest.raises(RecipeError, match="do not fit another value"):
            check_allowed([key], RECIPE)
    with pytest.raises(RecipeError, match=r"eval\.every: .*may change anyway"):
        check_allowed(["eval.every"], RECIPE)
    with pytest.raises(RecipeError, match=r"name one of train\.epochs"):
        check_allowed(["train.epoch"], RECIPE)
    assert not may_fork("base") and not may_fork("tokenizer")


def test_a_split_of_as_many_packs_is_no_other_course() -> None:
    then = stored()["recipe"]

    def split(size: int, count: int, batching: str = "packed") -> bool:
        train = RECIPE.train.model_copy(update={"micro_batch_size": size, "grad_accum_steps": count})
        data = RECIPE.data.model_copy(update={"batching": batching})
        recipe = RECIPE.model_copy(update={"train": train, "data": data})
        changes = recipe_changes({**then, "data.batching": batching}, trajectory_keys(recipe))
        return is_another_split(changes, then, recipe)

    assert split(8, 2) and split(16, 1) and split(2, 8, "shuffled")
    assert not split(8, 4), "more packs"
    assert not split(4, 4), "nothing has changed"
    assert not split(8, 2, "length_grouped"), "rows are sorted within so many micro-batches"
    changes = [Change("train.micro_batch_size", 4, 8), Change("run.seed", 0, 1)]
    assert not is_another_split(changes, then, RECIPE)


def test_of_a_machine_what_computes_is_compared() -> None:
    then = {
        "threads": 2,
        "device": "cpu",
        "cpu_count": 2,
        "versions": {"torch": "2.15.0", "peft": "1"},
        "code_sha256": "a",
    }
    assert environment_changes(then, {**then, "cpu_count": 64}) == [], "cores that are not used"
    assert environment_changes({}, then) == [], "a checkpoint that does not say"
    assert environment_changes(then, {**then, "cpu_features": {"amx_bf16": True}}) == [], "nor this one, of this"
    (moved,) = environment_changes({**then, "cpu": "one maker's"}, {**then, "cpu": "another's"})
    assert (moved.key, moved.old, moved.new) == ("cpu", "one maker's", "another's")
    lost = environment_changes({**then, "cpu_features": {"avx2": True}}, {**then, "cpu_features": {}})
    assert [(change.key, change.old, change.new) for change in lost] == [("cpu_features.avx2", True, None)]
    now = {**then, "threads": 4, "device": "cuda", "versions": {"torch": "2.16.0", "peft": "1"}, "code_sha256": "b"}
    found = {change.key: (change.old, change.new) for change in environment_changes(then, now)}
    assert found == {
        "threads": (2, 4),
        "device": ("cpu", "cuda"),
        "versions.torch": ("2.15.0", "2.16.0"),
        "code_sha256": ("a", "b"),
    }
    text = describe_changes(environment_changes(then, now))
    assert "threads 2 -> 4" in text and "this program's code" in text and "code_sha256" not in text


def test_each_resume_is_a_line(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    record_resume(run_dir, "step-000002", 2, "D2", [], [])
    record_resume(run_dir, "step-000004", 4, "D0", [Change("run.seed", 0, 1, "r.yaml:3")], [Change("threads", 1, 2)])
    first, second = (json.loads(line) for line in run_dir.resumes.read_text().splitlines())
    assert (first["from"], first["level"], first["fork"]) == ("step-000002", "D2", [])
    assert second["fork"] == [{"key": "run.seed", "old": 0, "new": 1, "where": "r.yaml:3"}]
    assert second["rounding"][0]["key"] == "threads" and second["time"][:2] == "20"


def test_a_quantised_base_goes_on_with_its_kind_of_device() -> None:
    """The codes depend on it; without them another device only rounds otherwise. A checkpoint may not say."""
    plain = RECIPE.model_copy(update={"quant": RECIPE.quant.model_copy(update={"quant_type": "none"})})
    refuse_other_device({"device": "cpu"}, RECIPE, "cpu", "step-000002")
    refuse_other_device({}, RECIPE, "cuda", "step-000002")
    refuse_other_device({"device": "cpu"}, plain, "cuda", "step-000002")
    with pytest.raises(ResumeError, match=r"step-000002 was trained on cpu.*on cuda: .* Fix: set model.device: cpu;"):
        refuse_other_device({"device": "cpu"}, RECIPE, "cuda", "step-000002")
    with pytest.raises(ResumeError, match=r"trained on cuda.*on cpu: .* Fix: go on where there is a CUDA device"):
        refuse_other_device({"device": "cuda"}, RECIPE, "cpu", "step-000002")
