"""Nothing that looks like a test, a recipe or an example is passed over silently."""

from __future__ import annotations

import ast
import doctest
import importlib
from pathlib import Path

import pytest

from qlora_train.recipe.methods import METHODS
from tests.structure.source_tree import ROOT, parse, python_files, relative

# Every recipe, relative to recipes/. A new one is added here, so that none can be left out of the tests unseen.
RECIPES = {
    "jargon.yaml",
    "llama3-70b-48gb.yaml",
    "llama3-8b-12gb.yaml",
    "quickstart.yaml",
    "qwen3-32b-24gb.yaml",
    "spelling.yaml",
    *(f"methods/{name}.yaml" for name in (*METHODS, "lord")),
}

WITH_DOCTESTS = [path for path in python_files("qlora_train") if ">>> " in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", python_files("tests"), ids=relative)
def test_every_file_with_tests_is_collected(path: Path) -> None:
    names = [node.name for node in ast.walk(parse(path)) if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    if any(name.startswith(("test_", "Test")) for name in names):
        assert path.match("test_*.py"), f"{relative(path)} defines tests that pytest does not collect"


def test_every_recipe_is_known() -> None:
    found = {path.relative_to(ROOT / "recipes").as_posix() for path in (ROOT / "recipes").rglob("*.y*ml")}
    assert found == RECIPES


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_recipe_loads(name: str) -> None:
    load = importlib.import_module("qlora_train.recipe.load")
    assert load.load_recipe(ROOT / "recipes" / name) is not None


@pytest.mark.parametrize("path", WITH_DOCTESTS, ids=relative)
def test_examples_in_docstrings(path: Path) -> None:
    module = importlib.import_module(relative(path).removesuffix(".py").replace("/", "."))
    failed, attempted = doctest.testmod(module, report=True)
    assert attempted > 0 and failed == 0
