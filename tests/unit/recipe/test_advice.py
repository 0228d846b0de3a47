"""Every likely slip leads to the right name: typos, names that keys had, names that other programs have."""

from __future__ import annotations

import re

import pytest

from qlora_train.recipe.advice import KEYS, advise_key, advise_section
from qlora_train.recipe.keys_elsewhere import NOT_HERE, OLD_KEYS, OLD_SECTIONS


def one_edit(word: str) -> set[str]:
    """Every deletion, every swap of neighbours, and one insertion and one replacement at every place."""
    cuts = [(word[:i], word[i:]) for i in range(len(word) + 1)]
    typos = {left + right[1:] for left, right in cuts if right}
    typos |= {left + right[1] + right[0] + right[2:] for left, right in cuts if len(right) > 1}
    typos |= {left + "x" + right for left, right in cuts} | {left + "x" + right[1:] for left, right in cuts if right}
    return typos - {word, ""}


@pytest.mark.parametrize("key", [f"{section}.{key}" for section, keys in KEYS.items() for key in keys])
def test_every_typo_of_one_edit_suggests_the_right_key(key: str) -> None:
    section, name = key.split(".")
    for typo in one_edit(name) - set(KEYS[section]) - set(OLD_KEYS):
        fix, meant = advise_key(section, typo)
        assert key in meant and re.search(rf"\b{name}\b", fix), (typo, fix)


@pytest.mark.parametrize("key", [f"{section}.{key}" for section, keys in KEYS.items() for key in keys if len(key) > 4])
def test_typos_of_two_edits_suggest_the_right_key(key: str) -> None:
    section, name = key.split(".")
    for first in sorted(one_edit(name))[::9]:
        for typo in sorted(one_edit(first) - set(KEYS[section]) - set(OLD_KEYS))[::23]:
            assert key in advise_key(section, typo)[1], typo


def test_typos_of_sections_suggest_the_right_section() -> None:
    for section in KEYS:
        for typo in one_edit(section) - set(KEYS) - set(OLD_SECTIONS):
            assert advise_section(typo)[1] == section, typo


def test_old_names_lead_to_keys_that_exist() -> None:
    for old, target in OLD_KEYS.items():
        section, _, key = target.partition(".")
        assert key in KEYS[section]
        if old not in KEYS[section]:
            assert advise_key(section, old) == (f"it is called {key} here", [target])
    assert set(OLD_SECTIONS.values()) <= set(KEYS) and not set(OLD_SECTIONS) & set(KEYS)
    assert advise_key("train", "lora_alpha")[0] == "it is called alpha here, in the section adapter"
    assert advise_key("train", "batch_size")[1] == ["train.micro_batch_size"]
    assert advise_key("train", "load_in_4bit")[1] == ["quant.quant_type"]


@pytest.mark.parametrize("key", sorted(NOT_HERE))
def test_a_key_that_only_peers_have_is_told_what_to_do_instead(key: str) -> None:
    fix, meant = advise_key("train", key)
    assert fix == NOT_HERE[key] and not meant and advise_section(key) == (fix, None)
    for named in re.findall(r"\b(model|quant|adapter|data|train|eval|run)\.(\w+)", fix):
        assert named[1] in KEYS[named[0]], fix
