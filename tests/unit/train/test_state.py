"""What a checkpoint is bound to, and the counters that survive a restart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qlora_train.errors import ResumeError
from qlora_train.recipe.schema import DataSection, ModelSection, Recipe, RunSection, SourceSection, TrainSection
from qlora_train.train.state import NEUTRAL_KEYS, Binding, TrainState, trajectory_keys

RECIPE = Recipe(
    model=ModelSection(path="/models/tiny"),
    data=DataSection(train=(SourceSection(path="a.jsonl"),)),
    run=RunSection(dir=Path("run")),
)
ALL_KEYS = {
    f"{section}.{key}"
    for section, field in Recipe.model_fields.items()
    for key in field.annotation.model_fields  # type: ignore[union-attr]
}
BINDING = Binding(base="b" * 64, data="d" * 64, template="t" * 64, recipe=trajectory_keys(RECIPE))


def test_neutral_keys_are_keys_of_a_recipe() -> None:
    assert len(ALL_KEYS) > 40 and NEUTRAL_KEYS <= ALL_KEYS


def test_every_other_key_is_bound() -> None:
    assert set(trajectory_keys(RECIPE)) == ALL_KEYS - NEUTRAL_KEYS | {"data.train.weight"}
    bound = {"train.learning_rate", "run.seed", "run.threads", "adapter.r", "quant.block_size", "data.seq_len"}
    assert bound <= set(trajectory_keys(RECIPE))


def test_a_changed_value_changes_its_key_only() -> None:
    changed = RECIPE.model_copy(update={"train": TrainSection(learning_rate=1.0, keep=9)})
    old, new = trajectory_keys(RECIPE), trajectory_keys(changed)
    assert [key for key in old if old[key] != new[key]] == ["train.learning_rate"]


def test_the_weight_of_a_source_is_bound_and_its_path_is_not() -> None:
    moved, weighted = (
        RECIPE.model_copy(update={"data": DataSection(train=(source,))})
        for source in (SourceSection(path="b.jsonl"), SourceSection(path="a.jsonl", weight=2.0))
    )
    assert trajectory_keys(moved) == trajectory_keys(RECIPE)
    assert trajectory_keys(RECIPE)["data.train.weight"] == [1.0]
    assert trajectory_keys(weighted)["data.train.weight"] == [2.0]


def test_the_same_binding_is_accepted_after_json() -> None:
    BINDING.refuse_difference(json.loads(json.dumps(BINDING.as_dict())))


@pytest.mark.parametrize(
    ("key", "words"), [("base", "the base model"), ("data", "the training data"), ("template", "the chat template")]
)
def test_another_fingerprint_is_named_with_both_sides(key: str, words: str) -> None:
    stored = {**BINDING.as_dict(), key: "f" * 64}
    with pytest.raises(ResumeError) as caught:
        BINDING.refuse_difference(stored)
    message = str(caught.value)
    assert words in message and "f" * 16 + " at the checkpoint" in message and f"{key[0] * 16} now" in message
    assert message.count(" now") == 1


def test_every_differing_key_of_the_recipe_is_named() -> None:
    stored = BINDING.as_dict()
    stored["recipe"] = {**stored["recipe"], "train.learning_rate": 0.5, "adapter.lost": 1}
    del stored["recipe"]["run.seed"]
    with pytest.raises(ResumeError) as caught:
        BINDING.refuse_difference(stored)
    message = str(caught.value)
    assert "train.learning_rate: 0.5 at the checkpoint, 0.0002 now" in message
    assert "adapter.lost: 1 at the checkpoint, None now" in message
    assert "run.seed: None at the checkpoint, 0 now" in message
    assert message.count(" now") == 3


def test_an_empty_binding_is_refused() -> None:
    with pytest.raises(ResumeError, match="the base model"):
        BINDING.refuse_difference({})


def test_the_counters_survive_a_round_trip() -> None:
    state = TrainState(7, 56, "a" * 64, 1000, 300, 12.5, best_step=4, best_eval_loss=1.25)
    assert TrainState.from_dict(json.loads(json.dumps(state.as_dict()))) == state
    assert TrainState.from_dict(TrainState().as_dict()) == TrainState()


def test_unknown_and_missing_counters_are_refused() -> None:
    data = TrainState().as_dict()
    with pytest.raises(ResumeError, match="epoch"):
        TrainState.from_dict({**data, "epoch": 1})
    del data["best_step"]
    with pytest.raises(ResumeError, match=r"expected .*best_step"):
        TrainState.from_dict(data)
