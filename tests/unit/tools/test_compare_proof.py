"""The bars of `make prove WHAT=methods` can fail, and they name what they found."""

from __future__ import annotations

from typing import Any

import pytest
from proofs import methods

DIM = 576


def overlap(phi: float, directions: str = "delta_right", control: float | None = None) -> dict[str, Any]:
    grid = [[phi] * methods.LARGE_R for _ in range(methods.SMALL_R)]
    starts = None if control is None else [[control] * methods.LARGE_R] * methods.SMALL_R
    return {
        "name": "q_proj", "directions": directions, "num_modules": 30, "dim": DIM, "grid": grid, "control": starts
    }  # fmt: skip


@pytest.mark.parametrize(("phi", "shared"), [(1 / DIM, False), (0.3, True)])
def test_a_shared_direction_is_one_above_chance(phi: float, shared: bool) -> None:
    (bar,) = methods._shared_directions([overlap(phi)])
    assert bar.ok is shared
    assert bar.at_least is not None and 1 / DIM < bar.at_least < 0.01


def test_rows_of_a_are_shown_beside_their_starts_and_not_judged() -> None:
    (bar,) = methods._shared_directions([overlap(0.2, "A", control=0.01)])
    assert bar.ok and not bar.bar and "starts 0.0100" in bar.note
    assert methods._shared_directions([{**overlap(0.2), "name": "up_proj"}]) == []


@pytest.mark.parametrize(("of_first", "holds"), [(0.1, True), (0.9, False)])
def test_an_update_that_repeats_its_weight_falls_short(of_first: float, holds: bool) -> None:
    few = {"factor": 5.0, "factor_weight": 0.5, "factor_random": 10.0, "of_first": of_first, "emphasis": 0.8}
    rows = [{"module": f"model.layers.{layer}.self_attn.{name}", "few": few} for layer in range(2) for name in
            methods.LOOKED_AT]  # fmt: skip
    bars = methods._amplified({"amplifications": rows})
    judged = [bar.ok for bar in bars if bar.bar]
    assert judged == [holds] * len(methods.LOOKED_AT)
    assert [bar.value for bar in bars if "random directions" in bar.what] == [0.8, 0.8], "shown, not judged"
    assert "laid into W's first directions 0.50, into random ones 10.00" in bars[0].note


def study(nf4: float) -> dict[str, Any]:
    losses = {"loss": 3.0, "perplexity": 20.0, "above_bf16": 0.1, "standard_error": 0.01}
    pair = {"set": methods.TEXT, "better": "nf4", "worse": "fp4", "difference": 0.2 - nf4, "standard_error": 0.01}
    errors = {"int4": 0.11, "fp4": 0.12, "nf4": nf4, "nf4_dq": nf4, "int4_affine": 0.08}
    return {"sets": {methods.TEXT: {"nf4": losses}}, "pairs": [pair], "errors": {"Gaussian": errors}, "loader_gap": 0.0}


@pytest.mark.parametrize(("nf4", "holds"), [(0.09, True), (0.3, False)])
def test_nf4_must_be_the_best_code(nf4: float, holds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "measure_codes", lambda rows: study(nf4))
    judged = {bar.what: bar.ok for bar in methods._codes(full=False) if bar.bar}
    assert judged.pop("the rounded model and the 4-bit layers: difference of loss")
    assert list(judged.values()) == [holds, holds]


def test_a_few_steps_say_nothing_of_the_gap_to_bf16() -> None:
    assert methods._after_training(full=False) == []


def test_the_gap_to_bf16_is_held_against_the_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    for nf4, word in (([2.00, 2.04], "within"), ([2.10, 2.11], "above")):
        trained = {"trained": {"nf4": nf4, "bf16": [1.99, 2.02]}}
        monkeypatch.setattr(methods, "measure_training", lambda sample, threads, found=trained: found)
        bars = {bar.what: bar for bar in methods._after_training(full=True)}
        assert bars["LoRA on NF4 above LoRA on bf16"].note.startswith(word)
        assert bars["LoRA: distance between two seeds, the larger one"].value == pytest.approx(
            max(0.03, nf4[1] - nf4[0])
        )
