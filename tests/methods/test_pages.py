"""One recipe for each method, and a page whose table is the table."""

from __future__ import annotations

import re

import pytest

from qlora_train.recipe.load import load_recipe
from qlora_train.recipe.methods import METHODS, OPTIONS
from qlora_train.recipe.schema import AdapterSection
from tests.structure.source_tree import ROOT

FOLDER = ROOT / "recipes" / "methods"


def test_the_page_names_every_paper() -> None:
    """That its table is the table is held by tests/structure/test_docs.py."""
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert all(f"](https://arxiv.org/abs/{method.arxiv})" in text for method in METHODS.values())


def test_one_recipe_for_each_method_and_lord_and_no_other() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == {*METHODS, "lord"}
    lord = load_recipe(FOLDER / "lord.yaml").recipe
    assert lord.model.lord_keep_frac is not None and lord.adapter.method == "lora"
    assert "](https://arxiv.org/abs/2309.14021)" in (FOLDER / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", METHODS)
def test_a_recipe_trains_the_method_that_it_is_named_after(name: str) -> None:
    loaded = load_recipe(FOLDER / f"{name}.yaml")
    assert loaded.recipe.adapter.method == name
    given = loaded.recipe.adapter.model_fields_set
    assert given <= METHODS[name].reads
    assert str(loaded.recipe.run.dir).endswith(f"runs/methods/{name}")


def test_rows_are_sound() -> None:
    keys = set(AdapterSection.model_fields)
    for name, method in METHODS.items():
        assert method.name == name and re.fullmatch(r"\d{4}\.\d{5}", method.arxiv), name
        assert method.reads <= keys and set(method.without) <= keys, name
        assert method.trains, name
    common = set().union(*(method.reads for method in METHODS.values()))
    assert keys == common, "a key that no method reads would mean nothing"
    assert all(set(readers) <= METHODS.keys() and readers for readers in OPTIONS.values())
