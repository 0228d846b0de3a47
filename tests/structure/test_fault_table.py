"""The tests' page names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
NAMED = re.compile(r"`(?:[\w/]+\.py::)?(test_\w+?)(_\.\.\.)?`|`([\w/]*test_\w+\.py)(?:::\w+?(?:_\.\.\.)?)?`")


def defined() -> set[str]:
    """The names of all test functions."""
    sources = (path.read_text(encoding="utf-8") for path in TESTS.rglob("test_*.py"))
    return {name for source in sources for name in re.findall(r"^(?:async )?def (test_\w+)", source, re.MULTILINE)}


def missing(page: str) -> list[str]:
    """Tests, beginnings of names of tests, and files that the page names and that are not there."""
    names, files = defined(), {path.relative_to(TESTS).as_posix() for path in TESTS.rglob("test_*.py")}
    found = []
    for name, cut, file in NAMED.findall(page):
        if file and not any(other == file or other.endswith(f"/{file}") for other in files):
            found.append(file)
        if name and not any(other.startswith(name) if cut else other == name for other in names):
            found.append(name)
    return found


def test_what_the_page_names_is_there() -> None:
    page = (TESTS / "README.md").read_text(encoding="utf-8")
    assert len(NAMED.findall(page)) > 80
    assert missing(page) == []


@pytest.mark.parametrize(
    "text", ["`test_nothing_of_this_name`", "`test_nothing_of_...`", "`unit/test_gone.py`", "`test_gone.py::test_what`"]
)
def test_what_is_gone_is_seen(text: str) -> None:
    """Negative control."""
    assert missing(f"| a | b | {text} |")
