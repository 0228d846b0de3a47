"""Nothing grows until nobody reads it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.structure.source_tree import parse, python_files, relative

MAX_FILE = 500
MAX_FUNCTION = 100
MAX_INIT = 60
MAX_LOOP = 120  # the training loop reads as one page
FILES = python_files("qlora_train", "tools", "tests")


def long_functions(tree: ast.Module, limit: int) -> Iterator[tuple[str, int]]:
    """(name, lines) of each function over its limit, decorators and docstring included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            lines = (node.end_lineno or node.lineno) - first + 1
            if lines > (MAX_INIT if node.name == "__init__" else limit):
                yield node.name, lines


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_file_and_function_sizes(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE
    limit = MAX_LOOP if relative(path) == "qlora_train/train/loop.py" else MAX_FUNCTION
    assert list(long_functions(parse(path), limit)) == []


def test_the_rule_sees_long_functions() -> None:
    """Negative control."""
    long = "def f():\n" + "    pass\n" * MAX_FUNCTION
    constructor = "class C:\n    def __init__(self):\n" + "        pass\n" * MAX_INIT
    assert list(long_functions(ast.parse(long + constructor), MAX_FUNCTION)) == [("f", 101), ("__init__", 61)]
