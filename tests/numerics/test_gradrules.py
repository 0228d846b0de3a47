"""LoRA-Pro against its defining property: of all steps of A and B, the one whose effect is nearest to the gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qlora_train.adapters.gradrules import LoraProAdamW, LoraProRule, Pair, lora_pro
from qlora_train.errors import NumericsError

SCALING = 2.0


def problem(dtype: torch.dtype = torch.float64, r: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """A (r, 24), B (32, r) and a full gradient (32, 24)."""
    generator = torch.Generator().manual_seed(0)
    a, b, g = (torch.randn(shape, generator=generator).to(dtype) for shape in ((r, 24), (32, r), (32, 24)))
    return a, b, g


def low_rank_gradients(a: Tensor, b: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    return SCALING * b.t() @ g, SCALING * g @ a.t()


def effect(a: Tensor, b: Tensor, step_a: Tensor, step_b: Tensor) -> Tensor:
    return SCALING * (b @ step_a + step_b @ a)


def projector(columns: Tensor) -> Tensor:
    q = torch.linalg.qr(columns).Q
    return q @ q.t()


def test_the_effect_is_the_nearest_to_the_full_gradient() -> None:
    a, b, g = problem()
    found = effect(a, b, *lora_pro(a, b, *low_rank_gradients(a, b, g), SCALING))
    outside_b, outside_a = torch.eye(32) - projector(b), torch.eye(24) - projector(a.t())
    least = float((outside_b @ g @ outside_a).norm())
    assert float((found - g).norm()) == pytest.approx(least, rel=1e-6)
    design = torch.cat(
        [SCALING * torch.kron(b, torch.eye(24)), SCALING * torch.kron(torch.eye(32), a.t().contiguous())], dim=1
    )
    by_least_squares = design @ torch.linalg.lstsq(design, g.reshape(-1, 1), driver="gelsd").solution
    assert torch.allclose(found.reshape(-1, 1), by_least_squares, atol=1e-5)
    assert float((found * g).sum()) > 0
    vanilla = effect(a, b, *low_rank_gradients(a, b, g))
    rescaled = vanilla * float((vanilla * g).sum() / vanilla.square().sum())
    assert least < float((rescaled - g).norm()), "negative control: LoRA's own step is further off at any rate"


def test_x_solves_its_sylvester_equation_and_keeps_the_steps_near() -> None:
    a, b, g = problem()
    grad_a, grad_b = low_rank_gradients(a, b, g)
    step_a, step_b = lora_pro(a, b, grad_a, grad_b, SCALING)
    natural_a = torch.linalg.solve(b.t() @ b, grad_a) / SCALING**2
    x = torch.linalg.lstsq(a.t(), (step_a - natural_a).t()).solution.t()  # step_a = natural_a + X A
    left = b.t() @ b @ x + x @ a @ a.t()
    right = -torch.linalg.solve(b.t() @ b, grad_a @ a.t()) / SCALING**2
    assert float((left - right).abs().max()) < 1e-5 * float(right.abs().max())

    def distance(of_a: Tensor, of_b: Tensor) -> float:
        return float((of_a - grad_a).square().sum() + (of_b - grad_b).square().sum())

    generator = torch.Generator().manual_seed(1)
    for size in (1e-3, 1e-1, 1.0):
        other = size * torch.randn(4, 4, generator=generator).double()
        moved = step_a + other @ a, step_b - b @ other
        assert torch.allclose(effect(a, b, *moved), effect(a, b, step_a, step_b), atol=1e-9)
        assert distance(*moved) > distance(step_a, step_b)


def test_the_first_step_of_plain_lora() -> None:
    a, b, g = problem()
    b = torch.zeros_like(b)
    step_a, step_b = lora_pro(a, b, *low_rank_gradients(a, b, g), SCALING)
    assert not step_a.any()
    expected = low_rank_gradients(a, b, g)[1] @ torch.linalg.inv(a @ a.t()) / SCALING**2
    assert torch.allclose(step_b, expected, rtol=1e-5)


def test_a_rank_deficient_factor_gives_finite_steps() -> None:
    a, b, g = problem(torch.float32)
    b[:, 1] = b[:, 0]
    steps = lora_pro(a, b, *low_rank_gradients(a, b, g), SCALING)
    assert all(bool(torch.isfinite(step).all()) for step in steps)
    zero = torch.zeros_like(a)
    steps = lora_pro(zero, torch.zeros_like(b), zero, torch.zeros_like(b), SCALING)
    assert all(not step.any() for step in steps)


@pytest.mark.parametrize(("r", "num_out", "num_in"), [(40, 24, 32), (28, 24, 64), (28, 64, 24)])
def test_a_rank_above_a_side_of_the_layer(r: int, num_out: int, num_in: int) -> None:
    """Both Gram matrices may have zeros then: no step is made of the noise in their place."""
    generator = torch.Generator().manual_seed(0)
    a, b, g = (torch.randn(*shape, generator=generator) for shape in ((r, num_in), (num_out, r), (num_out, num_in)))
    reachable = effect(a, b, *lora_pro(a, b, *low_rank_gradients(a, b, g), SCALING))
    assert float((reachable - g).norm()) < 1e-2 * float(g.norm()), "A or B spans the whole layer"
    before = g.norm()
    for _ in range(30):
        step_a, step_b = lora_pro(a, b, *low_rank_gradients(a, b, g), SCALING)
        a, b, g = a - 0.1 * step_a, b - 0.1 * step_b, g - 0.1 * effect(a, b, step_a, step_b)
    assert float(g.norm()) < 0.1 * float(before)


def pair_with_gradients() -> tuple[Pair, Tensor]:
    a, b, g = problem(torch.float32)
    pair = Pair(nn.Parameter(a), nn.Parameter(b), SCALING)
    pair.lora_A.grad, pair.lora_B.grad = low_rank_gradients(a, b, g)
    return pair, g


def test_the_rule_rewrites_gradients_before_the_update() -> None:
    pair, _ = pair_with_gradients()
    assert pair.lora_A.grad is not None and pair.lora_B.grad is not None
    expected = lora_pro(pair.lora_A, pair.lora_B, pair.lora_A.grad, pair.lora_B.grad, SCALING)
    before = pair.lora_A.detach().clone(), pair.lora_B.detach().clone()
    optimizer = torch.optim.SGD([pair.lora_A, pair.lora_B], lr=0.1)
    rule = LoraProRule([pair])
    optimizer.register_step_pre_hook(rule)
    optimizer.step()
    assert rule.rule_norm == pytest.approx(
        float(torch.cat([step.detach().flatten() for step in expected]).norm()), rel=1e-5
    )
    for parameter, old, step in zip((pair.lora_A, pair.lora_B), before, expected, strict=True):
        assert torch.allclose(parameter, old - 0.1 * step, atol=1e-6)


def test_a_pair_without_gradients_is_left_alone() -> None:
    pair, _ = pair_with_gradients()
    pair.lora_A.grad = None
    kept = pair.lora_B.grad.clone()  # type: ignore[union-attr]
    LoraProRule([pair])()
    assert torch.equal(pair.lora_B.grad, kept)  # type: ignore[arg-type]


def test_full_mode_moves_the_weight_along_adams_direction() -> None:
    """To first order in the rate: the effect of the step is the projection of Adam's direction for the effect g~."""
    pair, g = pair_with_gradients()
    a, b = pair.lora_A.detach().clone(), pair.lora_B.detach().clone()
    optimizer = LoraProAdamW([pair], lr=1e-4, betas=(0.9, 0.999), weight_decay=0.0)
    optimizer.step()
    seen = effect(a, b, *lora_pro(a, b, *low_rank_gradients(a, b, g), SCALING))
    direction = seen / (seen.abs() + 1e-8)  # Adam's first step
    inside = direction - (torch.eye(32) - projector(b)) @ direction @ (torch.eye(24) - projector(a.t()))
    moved = SCALING * (pair.lora_B @ pair.lora_A - b @ a).detach()
    assert torch.allclose(moved, -1e-4 * inside, atol=3e-6)
    state = optimizer.state[pair.lora_B]
    assert state["exp_avg"].shape == state["exp_avg_sq"].shape == (32, 24) and pair.lora_A not in optimizer.state
    assert torch.allclose(state["exp_avg"], 0.1 * seen, rtol=1e-5, atol=1e-7)


def test_full_mode_moves_nothing_by_numbers_that_are_not_finite() -> None:
    """The first pair is sound, the second is not: neither moves, and no moment has seen anything."""
    pairs = [pair_with_gradients()[0], pair_with_gradients()[0]]
    assert pairs[1].lora_B.grad is not None
    pairs[1].lora_B.grad[0, 0] = torch.inf
    before = [p.detach().clone() for pair in pairs for p in (pair.lora_A, pair.lora_B)]
    optimizer = LoraProAdamW(pairs, lr=0.01, betas=(0.9, 0.999), weight_decay=0.5)
    with pytest.raises(NumericsError, match="LoRA-Pro"):
        optimizer.step()
    after = [p for pair in pairs for p in (pair.lora_A, pair.lora_B)]
    assert all(torch.equal(p, old) for p, old in zip(after, before, strict=True)) and not optimizer.state


def test_full_mode_decays_and_refuses_a_closure() -> None:
    decayed, plain = pair_with_gradients()[0], pair_with_gradients()[0]
    before = decayed.lora_A.detach().clone()
    LoraProAdamW([decayed], lr=0.01, betas=(0.9, 0.999), weight_decay=0.5).step()
    optimizer = LoraProAdamW([plain], lr=0.01, betas=(0.9, 0.999), weight_decay=0.0)
    optimizer.step()
    assert torch.allclose(decayed.lora_A, plain.lora_A - 0.005 * before, atol=1e-6)
    with pytest.raises(ValueError, match="closure"):
        optimizer.step(lambda: 0.0)
