"""Cards by the names that people write, and amounts of memory."""

from __future__ import annotations

import pytest

from qlora_train.errors import RecipeError
from qlora_train.memory.cards import CARDS, SIZES_GB, find_card, parse_memory, size_card


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("RTX 4090", "RTX 4090"),
        ("rtx4090", "RTX 4090"),
        ("4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 3090", "RTX 3090"),
        ("a100-80gb", "A100 80GB"),
        ("A100 40", "A100 40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("h100", "H100 80GB"),
        ("a6000", "RTX A6000"),
        ("Tesla T4", "T4"),
        ("l40s", "L40S"),
        ("4060 ti", "RTX 4060 Ti 8GB"),
        ("NVIDIA GeForce RTX 4060 Ti", "RTX 4060 Ti 8GB"),
        ("4060 ti 16gb", "RTX 4060 Ti 16GB"),
    ],
)
def test_names_as_written(written: str, name: str) -> None:
    assert find_card(written).name == name


@pytest.mark.parametrize("written", ["RTX 4095", "A1000", "", "potato"])
def test_an_unknown_card_is_an_error_that_names_others(written: str) -> None:
    with pytest.raises(RecipeError, match=r"no card .* is known\. Fix: name one of .*; or give its memory: --vram"):
        find_card(written)


def test_what_is_usable_is_less_than_what_is_sold() -> None:
    assert len({card.name for card in CARDS}) == len(CARDS)
    for card in CARDS:
        assert 0.9 * card.nominal_gb < card.total_gib < card.nominal_gb
        assert find_card(card.name) is card
    assert [size_card(size).nominal_gb for size in SIZES_GB] == list(SIZES_GB)
    assert size_card(24).name == "L4"


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("24GiB", 24 * 2**30), ("24", 24 * 2**30), ("7.5 gib", 15 * 2**29), ("24GB", 24 * 10**9), ("512MiB", 2**29)],
)
def test_amounts(text: str, num_bytes: int) -> None:
    assert parse_memory(text) == num_bytes


@pytest.mark.parametrize("text", ["", "lots", "24 apples", "-3GiB", "0"])
def test_amounts_that_are_none(text: str) -> None:
    with pytest.raises(RecipeError, match="is no amount of memory"):
        parse_memory(text)
