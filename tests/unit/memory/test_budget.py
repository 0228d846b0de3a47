"""The choice of the fastest settings that fit, against examples added up by hand and against its own rules."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_train.errors import RecipeError
from qlora_train.memory.budget import RERUN_FRAC, Asked, Choice, Costs, choose, predict_peak
from qlora_train.model.checkpointing import Checkpointing

# Four layers; base and adapter 100, optimiser 20, head 30, transient 40.
COSTS = Costs(
    model_bytes=100,
    optimizer_bytes=20,
    head_bytes=30,
    num_layers=4,
    saved_bytes={"none": 50, "selective": 15, "full": 5},
    transient_bytes=40,
    dense_layer_bytes=8,
)


@pytest.mark.parametrize(
    ("policy", "resident", "expected"),
    [
        # 100 + 20 + input 5 + layers + max(30, 40)
        (Checkpointing("none"), 0, 165 + 4 * 50),
        (Checkpointing("full"), 0, 165 + 3 * 5 + 50),
        (Checkpointing("selective"), 0, 165 + 3 * 15 + 50),
        (Checkpointing("full", every=2), 0, 165 + 2 * 5 + 2 * 50),
        (Checkpointing("full", every=3), 0, 165 + 5 + 3 * 50),
        (Checkpointing("full"), 3, 165 + 3 * 5 + 50 + 3 * 8),
        (Checkpointing("full", offload=True), 0, 165 + 50),
        (Checkpointing("selective", offload=True), 0, 165 + 3 * 10 + 50),
    ],
    ids=str,
)
def test_the_peak_is_the_sum_of_its_parts(policy: Checkpointing, resident: int, expected: int) -> None:
    assert predict_peak(COSTS, policy, resident) == expected


def test_the_head_counts_where_it_is_larger() -> None:
    assert predict_peak(replace(COSTS, head_bytes=45), Checkpointing("none")) == 165 + 5 + 4 * 50


@pytest.mark.parametrize(
    ("limit", "policy", "resident"),
    [
        (1000, Checkpointing("none"), 4),
        (365 + 8 * 4, Checkpointing("none"), 4),
        (365 + 8 * 4 - 1, Checkpointing("none"), 3),
        (365, Checkpointing("none"), 0),
        (364, Checkpointing("selective", every=3), 4),  # 330; one layer again at 0.9 beats one at 1
        (330, Checkpointing("selective", every=3), 0),
        (329, Checkpointing("full", every=3), 1),  # 320
        (319, Checkpointing("selective", every=2), 3),  # 295: two layers at 0.9
        (294, Checkpointing("full", every=2), 2),  # 275
        (274, Checkpointing("selective"), 1),  # 260
        (259, Checkpointing("full"), 3),  # 230
        (230, Checkpointing("full"), 0),
    ],
    ids=str,
)
def test_the_fastest_that_fits(limit: int, policy: Checkpointing, resident: int) -> None:
    choice = choose(COSTS, limit, Asked())
    assert (choice.checkpointing, choice.resident_layers, choice.fits) == (policy, resident, True)
    assert choice.peak_bytes == predict_peak(COSTS, policy, resident)


def test_where_nothing_fits_the_leanest_comes_back() -> None:
    assert choose(COSTS, 229, Asked()) == Choice(Checkpointing("full"), 0, 230, fits=False)


@pytest.mark.parametrize(
    ("asked", "limit", "expected"),
    [
        (Asked("full", every=2), 1000, Choice(Checkpointing("full", every=2), 4, 307, fits=True)),
        (Asked("none", resident_layers=0), 1000, Choice(Checkpointing("none"), 0, 365, fits=True)),
        (Asked("none", resident_layers=1), 300, Choice(Checkpointing("none"), 1, 373, fits=False)),
        (Asked(resident_layers=2), 365, Choice(Checkpointing("selective", every=3), 2, 346, fits=True)),
        (Asked("full", offload=True), 215, Choice(Checkpointing("full", offload=True), 0, 215, fits=True)),
    ],
    ids=str,
)
def test_what_the_recipe_fixes_stays(asked: Asked, limit: int, expected: Choice) -> None:
    assert choose(COSTS, limit, asked) == expected


def test_no_4bit_weights_no_resident_layers() -> None:
    assert choose(replace(COSTS, dense_layer_bytes=0), 10_000, Asked()).resident_layers == 0


@pytest.mark.parametrize(
    ("held_out", "limit", "resident"),
    [(0, 397, 4), (245, 397, 4), (246, 397, 3), (277, 397, 0), (10_000, 397, 0), (10_000, 10_151, 3)],
)
def test_resident_layers_leave_room_for_evaluations(held_out: int, limit: int, resident: int) -> None:
    """Base, adapter and optimiser are 120; a resident layer is 8. Nothing is computed again for an evaluation."""
    choice = choose(replace(COSTS, held_out_bytes=held_out), limit, Asked())
    assert (choice.checkpointing.kind, choice.resident_layers, choice.fits) == ("none", resident, True)


def test_more_resident_layers_than_layers_is_an_error() -> None:
    with pytest.raises(RecipeError, match=r"train\.resident_layers is 5, but the model has 4 layers"):
        choose(COSTS, 1000, Asked(resident_layers=5))


sizes = st.integers(0, 10**12)


@st.composite
def all_costs(draw: st.DrawFn) -> Costs:
    full, kept, rest = draw(sizes), draw(sizes), draw(sizes)
    return Costs(
        model_bytes=draw(sizes),
        optimizer_bytes=draw(sizes),
        head_bytes=draw(sizes),
        num_layers=draw(st.integers(1, 90)),
        saved_bytes={"full": full, "selective": full + kept, "none": full + kept + rest},
        transient_bytes=draw(sizes),
        dense_layer_bytes=draw(sizes),
        held_out_bytes=draw(sizes),
    )


all_asked = st.builds(
    Asked,
    kind=st.sampled_from(("auto", "none", "selective", "full")),
    every=st.integers(1, 100),
    resident_layers=st.sampled_from(("auto", 0, 1)),
    compiled=st.booleans(),
)


def reruns(costs: Costs, choice: Choice) -> float:
    policy = choice.checkpointing
    return policy.num_recomputed(costs.num_layers) * RERUN_FRAC[policy.kind]


@given(all_costs(), all_asked, st.integers(0, 10**14))
def test_what_fits_stays_within_the_limit(costs: Costs, asked: Asked, limit: int) -> None:
    choice = choose(costs, limit, asked)
    assert choice.peak_bytes == predict_peak(costs, choice.checkpointing, choice.resident_layers)
    assert choice.fits == (choice.peak_bytes <= limit)
    assert 0 <= choice.resident_layers <= costs.num_layers
    if asked.compiled and asked.kind == "auto":
        assert choice.checkpointing.kind != "selective"
    if asked.kind == "auto" and not choice.fits:
        assert choice.peak_bytes <= predict_peak(costs, Checkpointing("full"), choice.resident_layers)


@given(all_costs(), all_asked, st.integers(0, 10**14), st.integers(0, 10**13))
def test_more_memory_is_never_slower(costs: Costs, asked: Asked, limit: int, more: int) -> None:
    small, large = choose(costs, limit, asked), choose(costs, limit + more, asked)
    if not small.fits:
        return
    assert large.fits
    assert reruns(costs, large) <= reruns(costs, small)
    if large.checkpointing == small.checkpointing:
        assert large.resident_layers >= small.resident_layers
