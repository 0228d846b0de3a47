"""Counts of directions: what they must be where it is known, and their bounds everywhere."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlora_train.adapters.arithmetic import delta_svd
from qlora_train.adapters.fold import Delta
from qlora_train.analysis.recommend import recommend
from qlora_train.analysis.spectrum import Spectrum, in_model_order, spectra

COUNTS = ("stable_rank", "effective_rank", "participation")


def spectrum(*values: float) -> Spectrum:
    return Spectrum("m", (64, 64), values)


@pytest.mark.parametrize("k", [1, 3, 8])
def test_equal_values_count_as_many(k: int) -> None:
    found = spectrum(*[0.7] * k, *[0.0] * 4)
    for count in COUNTS:
        assert getattr(found, count) == pytest.approx(k, rel=1e-12), count
    assert found.energy_rank(1.0) == k and found.norm == pytest.approx(0.7 * math.sqrt(k))


@given(
    values=st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=20).map(lambda v: sorted(v, reverse=True)),
    scale=st.floats(1e-4, 1e4),
)
def test_counts_lie_between_one_and_the_rank_and_know_no_scale(values: list[float], scale: float) -> None:
    found, larger = spectrum(*values), spectrum(*(scale * value for value in values))
    for count in COUNTS:
        value = getattr(found, count)
        assert 1 - 1e-9 <= value <= len(values) + 1e-9, count
        assert getattr(larger, count) == pytest.approx(value, rel=1e-9), count
    ranks = (found.energy_rank_90, found.energy_rank_95, found.energy_rank_99)
    assert 1 <= ranks[0] <= ranks[1] <= ranks[2] <= len(values)


def test_known_values() -> None:
    """sigma = 2, 1: 5/4, exp(entropy of 2/3 and 1/3), 25/17."""
    found = spectrum(2.0, 1.0)
    assert found.stable_rank == pytest.approx(1.25)
    assert found.effective_rank == pytest.approx(3 / 2 ** (2 / 3))
    assert found.participation == pytest.approx(25 / 17)
    assert (found.energy_rank(0.8), found.energy_rank(0.81)) == (1, 2)


def test_no_update_has_no_directions() -> None:
    nothing = spectrum(0.0, 0.0)
    assert [getattr(nothing, count) for count in COUNTS] == [0, 0, 0] and nothing.energy_rank_95 == 0


def test_spectra_come_in_the_models_order_with_the_scaling() -> None:
    update = Delta(torch.eye(2, 5), torch.eye(4, 2), 3.0)
    names = ["lm_head", "m.layers.10.q_proj", "m.layers.2.up_proj", "m.layers.2.q_proj"]
    found = spectra({name: delta_svd(update) for name in names})
    assert [s.module for s in found] == [names[3], names[2], names[1], names[0]] == in_model_order(dict.fromkeys(names))
    assert found[0].values == pytest.approx((3.0, 3.0)) and found[0].shape == (4, 5)
    assert (found[0].layer, found[3].layer) == (2, None)


def test_the_recommendation_covers_nine_modules_in_ten() -> None:
    """Nine modules of one direction, one of eight: the tenth is the one that may be short."""
    narrow, wide = spectrum(1.0, *[0.0] * 15), spectrum(*[1.0] * 8, *[0.0] * 8)
    found = recommend([*[narrow] * 9, wide], 16)
    assert (found.r, found.energy_rank, found.num_bound, found.is_bound) == (4, 1, 0, False)
    assert recommend([*[narrow] * 8, wide, wide], 16).r == 8


def test_an_update_of_more_directions_than_r_is_told_as_it_is() -> None:
    """A start that is taken off again leaves up to 2 r directions: twelve equal ones of sixteen, trained with r = 8."""
    found = recommend([spectrum(*[1.0] * 12, *[0.0] * 4)] * 4, 8)
    assert (found.energy_rank, found.r, found.num_bound) == (12, 16, 0)
    assert recommend([spectrum(*[1.0] * 16)] * 4, 8).num_bound == 4


def test_a_run_that_uses_all_its_rank_is_called_bound() -> None:
    found = recommend([spectrum(*[1.0] * 8)] * 4, 8, shared=[2, 2, 2, 3])
    assert found.is_bound and found.num_bound == 4 and found.r == 8 and found.shared_rank == 3
