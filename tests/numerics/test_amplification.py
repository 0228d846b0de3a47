"""The amplification factor where it is known exactly, and its two controls."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from qlora_train.adapters.arithmetic import delta_svd
from qlora_train.adapters.fold import Delta
from qlora_train.analysis import amplification as module
from qlora_train.analysis.amplification import amplification


def weight(rows: int = 48, columns: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def through(found: Tensor, left: Tensor, right: Tensor) -> Delta:
    """3 U U^T W V V^T as factors."""
    return Delta(right.T.contiguous(), 3 * left @ (left.T @ found @ right), 1.0)


def random_bases(k: int, found: Tensor) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    left, right = (torch.linalg.qr(torch.randn(size, k, generator=generator))[0] for size in found.shape)
    return left, right


def test_three_times_what_the_weight_does_there_is_a_factor_of_three() -> None:
    found = weight()
    result = amplification("layers.3.q_proj", delta_svd(through(found, *random_bases(5, found))), found, None)
    assert result.whole.factor == pytest.approx(3, rel=1e-5)
    assert (result.few.num_directions, result.whole.num_directions, result.above_quant_error) == (4, 5, None)
    assert result.few.delta_norm < result.whole.delta_norm == pytest.approx(result.delta_norm)
    assert result.weight_norm == pytest.approx(float(found.norm()), rel=1e-6)


def test_the_weights_own_directions_are_the_control_that_repeats() -> None:
    """An update along W's first directions sees all of them: Eckart and Young."""
    found = weight()
    left, values, right_t = torch.linalg.svd(found)
    result = amplification("m", delta_svd(through(found, left[:, :5], right_t[:5].T)), found, None)
    for through_k, k in ((result.few, 4), (result.whole, 5)):
        assert through_k.by_delta == pytest.approx(float(values[:k].norm()), rel=1e-5)
        assert through_k.by_weight == pytest.approx(through_k.by_delta, rel=1e-5)
        assert through_k.of_first == pytest.approx(1, rel=1e-5) and through_k.emphasis > 2
        assert through_k.factor == pytest.approx(through_k.factor_weight, rel=1e-5)
    assert result.spectral_frac == pytest.approx(3, rel=1e-5)


def test_random_directions_see_what_the_formula_says() -> None:
    """||U^T W V||^2 is k^2 ||W||^2 / (out in) on average: 400 draws of k = 4 bring it to 2 %."""
    found, squares = weight(), []
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        left, right = (torch.linalg.qr(torch.randn(size, 4, generator=generator))[0] for size in found.shape)
        squares.append(float((left.T @ found @ right).norm()) ** 2)
    result = amplification("m", delta_svd(through(found, *random_bases(4, found))), found, None)
    assert math.sqrt(sum(squares) / 400) == pytest.approx(result.whole.by_random, rel=0.05)


def test_size_and_quantisation_error_stand_beside_the_weight() -> None:
    found = weight()
    update = Delta(torch.eye(2, 64), torch.eye(48, 2), 0.5)
    result = amplification("m", delta_svd(update), found, 0.25)
    assert result.delta_norm == pytest.approx(0.5 * math.sqrt(2))
    assert result.delta_frac == pytest.approx(result.delta_norm / float(found.norm()), rel=1e-6)
    assert result.above_quant_error == pytest.approx(result.delta_norm / 0.25)


def test_no_update_amplifies_nothing() -> None:
    result = amplification("m", delta_svd(Delta(torch.randn(4, 64), torch.zeros(48, 4), 2.0)), weight(), None)
    assert (result.whole.num_directions, result.delta_frac, result.spectral_frac) == (0, 0, 0)
    assert (result.whole.factor, result.whole.emphasis, result.few.of_first) == (0, 0, 0)


def test_large_weights_are_looked_at_by_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a hundredth, and never above: of a random matrix, whose values lie close together, the hardest case."""
    found = weight(150, 200)
    update = delta_svd(through(found, *random_bases(8, found)))
    exact = amplification("m", update, found, None)
    monkeypatch.setattr(module, "EXACT_UP_TO", 64)
    iterated = amplification("m", update, found, None)
    assert iterated.whole.by_weight == pytest.approx(exact.whole.by_weight, rel=0.01)
    assert iterated.whole.by_weight <= exact.whole.by_weight * (1 + 1e-6)
