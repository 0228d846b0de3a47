"""The README's file tree is the file tree."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.structure.source_tree import ROOT, python_files, relative

README = ROOT / "README.md"
TREE_LINE = re.compile(r"^(?P<indent>[\s│├└─|`-]*)(?P<name>[\w.-]+(?:/[\w.-]+)*/?)(?:\s{2,}.*|\s*)$")


def tree_files(block: str) -> set[str]:
    """Files named in an indented tree, `folder/` lines with `file.py   what it does` lines below them."""
    files, folders = set(), [(-1, "")]
    for line in block.splitlines():
        match = TREE_LINE.match(line)
        if not match:
            continue
        depth, name = len(match["indent"]), match["name"]
        while folders[-1][0] >= depth:
            folders.pop()
        path = folders[-1][1] + name
        if name.endswith("/"):
            folders.append((depth, path))
        else:
            files.add(path)
    return files


def test_readme_lists_every_file_of_the_package() -> None:
    """A line per file; `__init__.py` files hold a docstring only and need none."""
    text = README.read_text(encoding="utf-8") if README.exists() else ""
    if len(text.splitlines()) < 5:
        pytest.skip("README.md is not written yet")
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    listed = {file for block in blocks for file in tree_files(block) if file.startswith("qlora_train/")}
    present = {relative(path) for path in python_files("qlora_train") if path.name != "__init__.py"}
    assert present - listed == set(), "not in the README's tree"
    assert {file for file in listed if file.endswith(".py")} - present - {"qlora_train/__init__.py"} == set(), "gone"


def test_generated_parts_are_fresh() -> None:
    """File tree and figures are what tools/render_docs.py makes of the files and of the last proof."""
    command = [sys.executable, str(ROOT / "tools" / "render_docs.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_tree_is_read() -> None:
    """Both ways to draw a tree."""
    plain = (
        "qlora_train/\n  api.py   one function per verb\n  train/\n    loop.py  the page\n  loss.py  summed\nrecipes/\n"
    )
    drawn = "qlora_train/\n├── api.py   one\n├── train/\n│   └── loop.py  the page\n└── loss.py  summed\n"
    expected = {"qlora_train/api.py", "qlora_train/train/loop.py", "qlora_train/loss.py"}
    assert tree_files(plain) == tree_files(drawn) == expected
