"""Arithmetic on factors against the dense products, in float64 where the factors allow it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlora_train.adapters.arithmetic import (
    concatenated,
    delta_svd,
    energy_rank,
    folded,
    grown,
    inner_product,
    norm,
    ranks_within,
    uniform_rank_within,
)
from qlora_train.adapters.fold import Delta
from qlora_train.analysis.compress import Ask, resized
from qlora_train.analysis.sparse import nearest, sparse_sum


def delta(out: int, r: int, width: int, scaling: float = 1.0, seed: int = 0) -> Delta:
    """A random update whose factors are float64."""
    generator = torch.Generator().manual_seed(seed)
    halves = (torch.randn(size, generator=generator, dtype=torch.float64) for size in ((r, width), (out, r)))
    return Delta(*halves, scaling)


def dense(update: Delta) -> torch.Tensor:
    return update.scaling * update.lora_B.double() @ update.lora_A.double()


SHAPES = st.tuples(st.integers(1, 30), st.integers(1, 8), st.integers(1, 30))


@given(shape=SHAPES, scaling=st.floats(-4, 4).filter(lambda s: abs(s) > 1e-3), seed=st.integers(0, 50))
def test_the_svd_is_that_of_the_dense_update(shape: tuple[int, int, int], scaling: float, seed: int) -> None:
    """Also where r is larger than a side."""
    update = delta(*shape, scaling, seed)
    svd, reference = delta_svd(update), dense(update)
    k = min(shape)
    expected = torch.linalg.svdvals(reference)[:k]
    assert torch.allclose(svd.values_K, expected, rtol=1e-12, atol=1e-12 * float(expected[0]))
    for side in (svd.left_OK, svd.right_IK):
        assert torch.allclose(side.T @ side, torch.eye(k, dtype=torch.float64), atol=1e-12)
    torch.testing.assert_close((svd.left_OK * svd.values_K) @ svd.right_IK.T, reference, rtol=0, atol=1e-11)
    assert svd.norm == pytest.approx(norm(update), rel=1e-12)


def test_truncation_meets_its_bound_with_equality() -> None:
    """||X - X_k||_F = sqrt(sum of the dropped squares), and the spectral norm is the first dropped value.

    The factors are written in float32, 1e-7 of the update beside an error of some tenths.
    """
    update = delta(40, 16, 60, 2.0)
    svd = delta_svd(update)
    for k in (1, 5, 15):
        off = dense(update) - dense(svd.truncated(k))
        assert float(off.norm()) == pytest.approx(svd.dropped_norm(k), rel=1e-6)
        assert float(torch.linalg.svdvals(off)[0]) == pytest.approx(float(svd.values_K[k]), rel=1e-6)
    assert svd.dropped_norm(16) == 0
    torch.testing.assert_close(dense(svd.truncated(16)), dense(update), rtol=0, atol=1e-5)


def test_the_weighted_sum_is_exact_with_any_weights() -> None:
    parts = [delta(20, 3, 30, 2.0, 1), delta(20, 5, 30, 0.25, 2), delta(20, 2, 30, 1.0, 3)]
    weights = [0.7, -1.3, 1e-3]
    whole = concatenated(parts, weights)
    expected = sum(w * dense(part) for w, part in zip(weights, parts, strict=True))
    assert whole.lora_A.shape == (10, 30) and whole.scaling == 1
    torch.testing.assert_close(dense(whole), expected, rtol=1e-13, atol=1e-13)


def test_an_adapter_minus_itself_is_nothing() -> None:
    update = delta(20, 4, 30, 2.0)
    assert norm(concatenated([update, update], [1, -1])) < 1e-13 * norm(update)
    assert norm(concatenated([update, folded(update)], [1, -1])) < 1e-7 * norm(update), "folding rounds to float32"


def test_the_norm_of_factors_that_nearly_cancel_is_the_dense_one() -> None:
    """A's two rows differ by 1e-6: through tr(B^T B A A^T) four digits would be left of it."""
    a, b = torch.randn(1, 40, dtype=torch.float64), torch.randn(30, 1, dtype=torch.float64)
    change = 1e-6 * torch.randn(1, 40, dtype=torch.float64)
    update = Delta(torch.cat([a, a + change]), torch.cat([b, -b], dim=1), -2.0)
    assert norm(update) == pytest.approx(2 * float((b @ change).norm()), rel=1e-8)


@given(seed=st.integers(0, 50))
def test_inner_product_is_the_dense_one(seed: int) -> None:
    first, second = delta(12, 3, 17, 2.0, seed), delta(12, 5, 17, -0.5, seed + 1000)
    expected = float((dense(first) * dense(second)).sum())
    assert inner_product(first, second) == pytest.approx(expected, rel=1e-10, abs=1e-10)


def test_growth_changes_nothing_and_can_train() -> None:
    update = delta(20, 4, 30, 2.0)
    more = grown(update, 9, torch.Generator().manual_seed(0))
    assert more.lora_A.shape == (9, 30) and more.scaling == 1
    torch.testing.assert_close(dense(more), dense(folded(update)), rtol=0, atol=1e-13)
    assert (more.lora_B[:, 4:] == 0).all() and more.lora_A[4:].abs().min() > 0, "B moves first, as at LoRA's start"
    assert more.lora_A[4:].abs().max() <= 1 / math.sqrt(30)
    with pytest.raises(ValueError, match="does not fit"):
        grown(update, 3, torch.Generator())


@given(
    values=st.lists(st.floats(0, 10), min_size=1, max_size=12).map(lambda v: sorted(v, reverse=True)),
    frac=st.floats(0.01, 1),
)
def test_energy_rank_is_the_first_that_is_enough(values: list[float], frac: float) -> None:
    squares = [value**2 for value in values]
    k = energy_rank(torch.tensor(values, dtype=torch.float64), frac)
    if sum(squares) == 0:
        assert k == 0
        return
    assert sum(squares[:k]) >= frac * sum(squares) * (1 - 1e-11)
    assert k == 0 or sum(squares[: k - 1]) < frac * sum(squares) * (1 + 1e-11)


@given(
    values=st.lists(
        st.lists(st.floats(1e-3, 10), min_size=1, max_size=8).map(lambda v: sorted(v, reverse=True)),
        min_size=1,
        max_size=5,
    ),
    error=st.floats(0.0, 1.0),
)
def test_an_error_budget_is_never_exceeded(values: list[list[float]], error: float) -> None:
    """Neither with a rank for each module nor with one for all; and one direction less would exceed it."""
    tensors = {str(i): torch.tensor(v, dtype=torch.float64) for i, v in enumerate(values)}
    whole = sum(float((v**2).sum()) for v in tensors.values())

    def lost(ranks: dict[str, int]) -> float:
        return sum(float((v[ranks[name] :] ** 2).sum()) for name, v in tensors.items())

    own, uniform = ranks_within(tensors, error), uniform_rank_within(tensors, error)
    assert all(1 <= own[name] <= len(v) for name, v in tensors.items())
    assert lost(own) <= error**2 * whole * (1 + 1e-12)
    assert lost(dict.fromkeys(tensors, uniform)) <= error**2 * whole * (1 + 1e-12)
    if uniform > 1:
        assert lost(dict.fromkeys(tensors, uniform - 1)) >= error**2 * whole * (1 - 1e-12)


def spectrum_delta(values: list[float], seed: int) -> Delta:
    """An update with these singular values."""
    svd = delta_svd(delta(24, len(values), 32, 1.0, seed))
    return Delta(svd.right_IK.T.contiguous(), svd.left_OK * torch.tensor(values, dtype=torch.float64), 1.0)


def test_resize_by_error_takes_from_the_weak_modules_first() -> None:
    deltas = {"strong": spectrum_delta([8.0, 4.0, 2.0, 1.0], 1), "weak": spectrum_delta([0.8, 0.4, 0.2, 0.1], 2)}
    result = resized(deltas, Ask(error=0.12), per_module=True)
    ranks = {row.module: row.r for row in result.modules}
    assert ranks == {"strong": 3, "weak": 1}
    assert result.error_frac <= 0.12 and result.error_frac == pytest.approx(result.expected_error_frac, rel=1e-5)
    uniform = resized(deltas, Ask(error=0.12))
    assert {row.r for row in uniform.modules} == {3} and uniform.error_frac <= 0.12


def test_resize_by_energy_holds_for_every_module() -> None:
    deltas = {"steep": spectrum_delta([8.0, 1.0, 0.5], 1), "flat": spectrum_delta([1.0, 1.0, 1.0], 2)}
    assert [row.r for row in resized(deltas, Ask(energy=0.9), per_module=True).modules] == [1, 3]
    assert [row.r for row in resized(deltas, Ask(energy=0.9)).modules] == [3, 3]


def test_resize_twice_is_resize_once() -> None:
    once = resized({"m": delta(24, 8, 32, 2.0)}, Ask(r=3)).deltas
    twice = resized(once, Ask(r=3)).deltas
    assert torch.equal(twice["m"].lora_A, once["m"].lora_A) and torch.equal(twice["m"].lora_B, once["m"].lora_B)


def test_resize_up_and_down_again_is_the_update() -> None:
    update = delta(24, 4, 32, 2.0)
    wide = resized({"m": update}, Ask(r=10)).deltas
    back = resized(wide, Ask(r=4))
    torch.testing.assert_close(dense(back.deltas["m"]), dense(update), rtol=0, atol=1e-5)
    assert back.error_frac < 1e-6


def test_a_module_that_learned_nothing_keeps_room_to_learn() -> None:
    """B is zero as at the start: after a resize A must not be zero too, or no gradient would ever reach either."""
    nothing = Delta(torch.randn(8, 32), torch.zeros(24, 8), 2.0)
    made = resized({"m": nothing, "other": delta(24, 8, 32)}, Ask(r=2)).deltas["m"]
    assert made.lora_A.shape == (2, 32) and made.lora_A.abs().sum(1).min() > 0 and (made.lora_B == 0).all()


def test_dare_keeps_all_at_density_one_and_is_the_sum_on_average() -> None:
    parts = [delta(30, 3, 40, 1.0, seed) for seed in (1, 2)]
    exact = dense(parts[0]) - 0.5 * dense(parts[1])
    whole = sparse_sum(parts, [1, -0.5], "dare", 1.0, seed=0, position=0)
    torch.testing.assert_close(whole.double(), exact, rtol=0, atol=1e-5)
    half = [sparse_sum(parts, [1, -0.5], "dare", 0.5, seed=seed, position=0).double() for seed in range(200)]
    # Each value varies by its own size: 200 draws bring the mean to 1/14 of it.
    assert float((torch.stack(half).mean(0) - exact).norm() / exact.norm()) < 0.12
    assert torch.equal(half[0], sparse_sum(parts, [1, -0.5], "dare", 0.5, seed=0, position=0).double()), "seeded"
    assert not torch.equal(half[0], sparse_sum(parts, [1, -0.5], "dare", 0.5, seed=0, position=1).double())


def test_ties_elects_signs_after_weighting() -> None:
    """One value each: the paper's example by hand, and a negative weight that turns the sign."""
    first, second = (
        Delta(torch.tensor([[3.0]]), torch.ones(1, 1), 1.0),
        Delta(torch.tensor([[-1.0]]), torch.ones(1, 1), 1.0),
    )

    def merged(*weights: float) -> float:
        return float(sparse_sum([first, second], weights, "ties", 1.0, 0, 0))

    assert merged(1, 1) == 3, "the larger sum is positive; the negative value is left out of the mean"
    assert merged(1, -1) == 2, "both are positive now: their mean"
    assert merged(0.1, 1) == -1, "weights decide which sign is larger"


def test_ties_keeps_the_largest_values() -> None:
    update = delta(30, 3, 40, 1.0, 1)
    kept = sparse_sum([update], [1], "ties", 0.2, 0, 0)
    assert int((kept != 0).sum()) == 240
    assert float(kept[kept != 0].abs().min()) >= float(dense(update).abs()[kept == 0].max()) - 1e-6


def test_what_is_brought_back_to_a_rank_says_its_error() -> None:
    generator = torch.Generator().manual_seed(0)
    full = torch.randn(20, 30, generator=generator)
    found, error = nearest(full, 5)
    expected = float(torch.linalg.svdvals(full.double())[5:].norm())
    assert error == pytest.approx(expected, rel=1e-6) and found.lora_A.shape == (5, 30)
    assert nearest(full, 99)[1] < 1e-4, "no more than the whole"
