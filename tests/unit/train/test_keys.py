"""Every key of a recipe is in exactly one list of what it does to a run that goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_train.recipe.schema import DataSection, ModelSection, Recipe, RunSection, SourceSection, TrainSection
from qlora_train.train.keys import (
    NEUTRAL_KEYS,
    NEUTRAL_SECTIONS,
    ROUNDING_KEYS,
    TRAJECTORY_KEYS,
    TRAJECTORY_SECTIONS,
    WEIGHTS,
    is_neutral,
    trajectory_keys,
)

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


def of_sections(sections: frozenset[str]) -> set[str]:
    return {key for key in ALL_KEYS if key.partition(".")[0] in sections}


def test_every_key_is_in_one_list() -> None:
    """A new key: say in train/keys.py what it does to a run that goes on, and test it where the others are."""
    neutral = NEUTRAL_KEYS | of_sections(NEUTRAL_SECTIONS)
    trajectory = (TRAJECTORY_KEYS | of_sections(TRAJECTORY_SECTIONS)) - NEUTRAL_KEYS
    assert neutral | trajectory | ROUNDING_KEYS == ALL_KEYS, ALL_KEYS ^ (neutral | trajectory | ROUNDING_KEYS)
    assert not neutral & trajectory and not neutral & ROUNDING_KEYS and not trajectory & ROUNDING_KEYS
    assert trajectory | {WEIGHTS} == trajectory_keys(RECIPE).keys()
    assert all(is_neutral(key) == (key in neutral) for key in ALL_KEYS)


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
def test_a_changed_value_changes_its_key_only() -> None:
    """Each key by itself, with a value that no recipe has."""
    before = trajectory_keys(RECIPE)
    for dotted in sorted(ALL_KEYS - {"data.train"}):
        name, _, key = dotted.partition(".")
        section = getattr(RECIPE, name).model_copy(update={key: "another value"})
        after = trajectory_keys(RECIPE.model_copy(update={name: section}))
        changed = [other for other in after if after[other] != before[other]]
        assert changed == ([] if is_neutral(dotted) or dotted in ROUNDING_KEYS else [dotted]), dotted


def test_the_weight_of_a_source_is_bound_and_its_path_is_not() -> None:
    moved, weighted = (
        RECIPE.model_copy(update={"data": DataSection(train=(source,))})
        for source in (SourceSection(path="b.jsonl"), SourceSection(path="a.jsonl", weight=2.0))
    )
    assert trajectory_keys(moved) == trajectory_keys(RECIPE)
    assert trajectory_keys(RECIPE)[WEIGHTS] == [1.0]
    assert trajectory_keys(weighted)[WEIGHTS] == [2.0]


def test_the_section_s_own_defaults_are_kept() -> None:
    assert trajectory_keys(RECIPE)["train.learning_rate"] == TrainSection().learning_rate
