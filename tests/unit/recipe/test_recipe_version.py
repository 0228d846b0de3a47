"""A recipe may say which schema it is written in, and may not hold a secret."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_train.errors import Problem, RecipeError
from qlora_train.recipe.load import load_recipe
from qlora_train.recipe.reader import parse

GOOD = "model:\n  path: org/base\ndata: {train: [rows.jsonl]}\nrun:\n  dir: out\n"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    return tmp_path / "r.yaml"


def problem_of(recipe: Path, text: str) -> Problem:
    recipe.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe)
    (problem,) = caught.value.problems
    return problem


def test_the_known_version_changes_nothing(recipe: Path) -> None:
    recipe.write_text(GOOD)
    loaded = load_recipe(recipe).recipe
    recipe.write_text(f"version: 1\n{GOOD}")
    assert load_recipe(recipe).recipe == loaded


def test_another_version_is_refused_with_both(recipe: Path) -> None:
    problem = problem_of(recipe, f"{GOOD}version: 3\n")
    assert problem.what == "version: the recipe is of schema 3, this build knows 1" and "newer" in problem.fix
    assert (problem.where or "").endswith("r.yaml:6:10")
    for odd in ("0", "1.0", "'1'", "[1]", "null", "true"):
        assert problem_of(recipe, f"version: {odd}\n{GOOD}").fix == "write version: 1, or remove it", odd


@pytest.mark.parametrize(
    "secret",
    ["hf_" + "a1B" * 10, "https://me:word@example.org/x", "ghp_" + "a" * 36, "sk-" + "b" * 40, "AKIA" + "C" * 16],
)
def test_a_secret_is_refused_and_not_repeated(secret: str, recipe: Path) -> None:
    problem = problem_of(recipe, GOOD.replace("org/base", secret))
    assert "access token or a password" in problem.what and (problem.where or "").startswith(str(recipe) + ":2:")
    assert secret[8:] not in f"{problem}"


@pytest.mark.parametrize("text", ["hf_models/tiny", "https://example.org/a@b", "task-" + "a" * 40, "a: b@c", "AKIA"])
def test_what_is_no_secret_is_left_alone(text: str) -> None:
    root, problems = parse(f"x: '{text}'", "r.yaml")
    assert root is not None and not problems
