"""The base's licence is found where it stands, and carried on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from gguf import GGUFWriter

from qlora_train.export.licence import copy_texts, find_licence
from qlora_train.model.source import Source


def run(licence: str | None = None) -> Any:
    return SimpleNamespace(recipe=SimpleNamespace(export=SimpleNamespace(license=licence)))


def card(text: str, folder: Path) -> Source:
    (folder / "README.md").write_text(text, encoding="utf-8")
    return Source("org/base", folder)


def test_from_the_header_of_the_card(tmp_path: Path) -> None:
    text = "---\nlanguage: en\nlicense: other\nlicense_name: 'llama3'\nlicense_link: LICENSE\n---\nlicense: mit\n"
    found = find_licence(run(), card(text, tmp_path))
    assert (found.name, found.own_name, found.link) == ("other", "llama3", "LICENSE")
    assert found.found_in == "README.md of org/base" and found.files == ()


def test_the_recipe_names_it_before_all(tmp_path: Path) -> None:
    found = find_licence(run("apache-2.0"), card("---\nlicense: mit\n---\n", tmp_path))
    assert found.name == "apache-2.0" and "recipe" in found.found_in


@pytest.mark.parametrize(
    "text",
    [
        "license: mit\n",
        "---\nlicense: [a, b]\n---\n",
        "---\nlicense: <b>\n---\n",
        "---\nlicense: mit\n",
        "",
        "---\n---\n",
    ],
)
def test_a_card_that_does_not_say_is_no_licence(text: str, tmp_path: Path) -> None:
    assert find_licence(run(), card(text, tmp_path)).name is None


def test_texts_are_copied_and_stand_for_a_licence_without_a_name(tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    base.mkdir()
    out.mkdir()
    for name in ("LICENSE", "NOTICE.txt", "USE_POLICY.md", "notes.txt"):
        (base / name).write_text(name)
    found = find_licence(run(), Source("org/base", base))
    assert found.name == "other" and found.files == ("LICENSE", "NOTICE.txt", "USE_POLICY.md")
    copy_texts(Source("org/base", base), out)
    assert sorted(path.name for path in out.iterdir()) == list(found.files)
    assert (out / "LICENSE").read_text() == "LICENSE"


@pytest.mark.parametrize(("named", "expected"), [("apache-2.0", "apache-2.0"), ("<script>", None), (None, None)])
def test_from_a_gguf_file(named: str | None, expected: str | None, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = GGUFWriter(path, "llama")
    if named:
        writer.add_license(named)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    folder = tmp_path / "converted"
    folder.mkdir()
    found = find_licence(run(), Source(str(path), folder))
    assert found.name == expected and str(tmp_path) not in found.found_in, "no folder of the machine that trained"
