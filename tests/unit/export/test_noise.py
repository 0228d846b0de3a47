"""The change of each weight beside its errors: quantiles, the nearest to the noise, and what is said of them."""

from __future__ import annotations

from dataclasses import astuple

import pytest

from qlora_train.export.merge import ModuleRow
from qlora_train.export.noise import noise


def row(name: str, delta: float, quant: float = 10.0, rounding: float = 0.5) -> ModuleRow:
    return ModuleRow(name, weight_norm=100.0, delta_norm=delta, quant_error_norm=quant, rounding_norm=rounding)


def test_quantiles_and_the_nearest_to_the_noise() -> None:
    found = noise([row(str(i), delta) for i, delta in enumerate((8.0, 0.25, 4.0, 2.0, 6.0, 1.0, 7.0))])
    assert found is not None and found.over_quant_error is not None and found.over_rounding is not None
    assert astuple(found.over_quant_error) == pytest.approx((0.025, 0.15, 0.4, 0.65, 0.8))
    assert found.over_weight.median == 0.04 and found.over_rounding.most == 16.0
    assert found.num_below_rounding == 1 and [one.name for one in found.worst] == ["1", "5", "3", "2", "4"]
    assert "4.00% of its norm" in found.reading and "40.0% of what quantising changed" in found.reading
    assert "less than it in 1 of 7 weights" in found.reading


@pytest.mark.parametrize(
    ("delta", "words"), [(1.0, "would lose most"), (10.0, "partly survive"), (30.0, "stands above")]
)
def test_the_reading_follows_the_figures(delta: float, words: str) -> None:
    found = noise([row("a", delta)])
    assert found is not None and words in found.reading


def test_nothing_quantised_and_nothing_rounded() -> None:
    found = noise([row("a", 3.0, quant=0.0, rounding=0.0)])
    assert found is not None and found.over_quant_error is None and found.over_rounding is None
    assert found.reading == "training changed the median weight by 3.00% of its norm"
    assert noise([]) is None
