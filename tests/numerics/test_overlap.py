"""Subspace similarity: 1 for the same, its mean and spread for random ones, and what must not change it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from qlora_train.adapters.arithmetic import FactoredSvd, delta_svd
from qlora_train.adapters.fold import Delta
from qlora_train.analysis.overlap import (
    DIRECTIONS,
    baseline,
    baseline_deviation,
    directions_of,
    overlaps,
    row_directions,
    similarity,
)
from qlora_train.analysis.recommend import shared_ranks


def basis(dim: int, k: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(dim, k, generator=generator, dtype=torch.float64))[0]


def update(r: int, seed: int, scaling: float = 2.0) -> Delta:
    generator = torch.Generator().manual_seed(seed)
    halves = (torch.randn(size, generator=generator, dtype=torch.float64) for size in ((r, 60), (40, r)))
    return Delta(*halves, scaling)


def sides(delta: Delta) -> tuple[Delta, FactoredSvd]:
    return delta, delta_svd(delta)


def test_the_same_and_nested_subspaces_give_one_and_orthogonal_ones_nothing() -> None:
    whole = basis(60, 20, torch.Generator().manual_seed(0))
    same = similarity(whole[:, :8], whole[:, :8])
    assert torch.allclose(same.diagonal(), torch.ones(8, dtype=torch.float64), atol=1e-12)
    nested = similarity(whole[:, :4], whole[:, :8])
    assert float(nested[3, 7]) == pytest.approx(1, abs=1e-12)
    assert float(similarity(whole[:, :8], whole[:, 8:]).max()) < 1e-24


def test_phi_is_the_papers_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = basis(30, 5, generator), basis(30, 7, generator)
    grid = similarity(first, second)
    for i, j in ((1, 1), (3, 2), (5, 7)):
        angles = torch.linalg.svdvals(first[:, :i].T @ second[:, :j])
        assert float(grid[i - 1, j - 1]) == pytest.approx(float((angles**2).sum()) / min(i, j), rel=1e-12)
    torch.testing.assert_close(similarity(second, first), grid.T)


@pytest.mark.parametrize(("i", "j", "dim"), [(1, 1, 20), (8, 20, 200), (5, 5, 16)])
def test_random_subspaces_have_the_mean_and_the_spread_that_are_shown(i: int, j: int, dim: int) -> None:
    """300 pairs. The mean within three standard errors; the spread within 15 %, three times its own error."""
    generator = torch.Generator().manual_seed(1)
    found = torch.tensor(
        [float(similarity(basis(dim, i, generator), basis(dim, j, generator))[-1, -1]) for _ in range(300)]
    )
    deviation = baseline_deviation(i, j, dim)
    assert abs(float(found.mean()) - baseline(i, j, dim)) < 3 * deviation / math.sqrt(300)
    if (i, j) != (1, 1):  # one squared cosine is too skewed for 300 samples of its spread
        assert float(found.std()) == pytest.approx(deviation, rel=0.15)
    else:
        assert deviation == pytest.approx(math.sqrt(2 * (dim - 1) / (dim**2 * (dim + 2))))


def test_directions_of_the_update_know_nothing_of_how_it_is_factored() -> None:
    """B A = (B M)(M^-1 A); A's own rows change with M, but not when they are only turned."""
    delta, generator = update(6, 0), torch.Generator().manual_seed(3)
    mixing = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    other = Delta(torch.linalg.inv(mixing) @ delta.lora_A, delta.lora_B @ mixing, delta.scaling)
    for directions in ("delta_right", "delta_left"):
        grid = similarity(*(directions_of(delta_svd(d), d.lora_A, directions) for d in (delta, other)))
        assert torch.allclose(grid.diagonal(), torch.ones(6, dtype=torch.float64), atol=1e-9), directions
    assert float(similarity(row_directions(delta.lora_A), row_directions(other.lora_A))[0, 0]) < 0.99
    turned = basis(6, 6, generator) @ delta.lora_A
    rows = similarity(row_directions(delta.lora_A), row_directions(turned))
    assert torch.allclose(rows.diagonal(), torch.ones(6, dtype=torch.float64), atol=1e-9)


def test_scaling_changes_no_overlap() -> None:
    first, second = update(4, 0), update(6, 1)
    louder = Delta(first.lora_A, first.lora_B, 77.0)
    grids = [overlaps({"m": sides(d)}, {"m": sides(second)}) for d in (first, louder)]
    for quiet, loud in zip(*grids, strict=True):
        torch.testing.assert_close(torch.tensor(loud.grid), torch.tensor(quiet.grid), rtol=0, atol=1e-9)


def test_overlaps_are_means_by_name_with_the_starts_as_control() -> None:
    first = {f"layers.{i}.q_proj": sides(update(4, i)) for i in range(3)} | {"layers.0.up_proj": sides(update(4, 9))}
    second = {f"layers.{i}.q_proj": sides(update(6, 50 + i)) for i in range(3)}
    starts = tuple({name: delta.lora_A for name, (delta, _) in side.items()} for side in (first, second))
    found = overlaps(first, second, (starts[0], starts[1]))
    assert [(o.name, o.directions, o.num_modules) for o in found] == [("q_proj", d, 3) for d in DIRECTIONS]
    by_rows = found[0]
    assert by_rows.control == by_rows.grid, "the control is phi of the starts, which here are the rows themselves"
    assert (found[1].control, found[1].dim, found[2].dim) == (None, 60, 40)
    expected = [float(similarity(*(directions_of(s, d.lora_A, "delta_right") for d, s in pair))[3, 5]) for pair in
                zip(list(first.values())[:3], second.values(), strict=True)]  # fmt: skip
    assert found[1].at(4, 6) == pytest.approx(sum(expected) / 3, rel=1e-12)
    assert found[1].baseline(4, 6) == pytest.approx(0.1)


def test_two_runs_share_as_many_directions_as_were_planted() -> None:
    """Three directions of the input are the same in both, the rest is random."""
    generator = torch.Generator().manual_seed(0)
    shared = basis(200, 3, generator)
    svds = []
    for _ in range(2):
        right = torch.linalg.qr(torch.cat([shared, torch.randn(200, 5, generator=generator).double()], dim=1))[0]
        values = torch.tensor([8.0, 7.0, 6.0, 1.0, 0.9, 0.8, 0.7, 0.6], dtype=torch.float64)
        svds.append({"m": FactoredSvd(basis(100, 8, generator), values, right)})
    # Three of six directions in common are phi = 0.5, and chance adds a little; three of seven are too few.
    assert shared_ranks(*svds) == [6]
