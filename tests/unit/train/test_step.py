"""One optimiser step on a model whose gradients are known: normalisation, clipping, what is not finite."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from qlora_train.adapters.hooks import MethodHooks
from qlora_train.data.loader import MicroBatch
from qlora_train.errors import NumericsError
from qlora_train.train.step import HALF_UPDATED, StepResult, accumulate_gradients, train_step

START = (torch.tensor([1.0, 2.0]), torch.tensor([[3.0], [4.0], [5.0]]))


class Linear:
    """A loss that is linear in its parameters: each supervised token adds `direction`, so gradients are known."""

    def __init__(self, *directions: torch.Tensor) -> None:
        self.parameters = [nn.Parameter(start.clone()) for start in START]
        self.directions = directions
        self.seeds: list[int] = []

    def loss_sum(self, batch: MicroBatch) -> torch.Tensor:
        self.seeds.append(torch.initial_seed())
        terms = [(p * d).sum() for p, d in zip(self.parameters, self.directions, strict=True)]
        return torch.stack(terms).sum() * float(batch.input_ids[0, 0]) * batch.num_supervised_tokens


class Engine:
    """What a step asks of accelerate."""

    device = torch.device("cpu")

    @staticmethod
    def backward(loss: torch.Tensor) -> None:
        loss.backward()


def batch(scale: int, num_supervised: int, row: int = 0) -> MicroBatch:
    ids = torch.tensor([[scale, 0, 0]])
    return MicroBatch(ids, ids.clone(), num_supervised, (row,), (3,))


def step(model: Any, batches: list[MicroBatch], max_grad_norm: float, lr: float = 1.0) -> StepResult:
    optimizer = torch.optim.SGD(model.parameters, lr=123.0)
    engine: Any = Engine()
    return train_step(model, batches, optimizer, engine, seed=0, step=4, learning_rate=lr, max_grad_norm=max_grad_norm)


def update(model: Linear) -> np.ndarray[Any, np.dtype[np.float64]]:
    """New minus old, all parameters in one vector."""
    parts = [(p.detach() - start).double().flatten() for p, start in zip(model.parameters, START, strict=True)]
    return torch.cat(parts).numpy()


DIRECTIONS = (torch.tensor([2.0, -4.0]), torch.tensor([[4.0], [0.0], [8.0]]))
GRADIENT = np.array([2.0, -4.0, 4.0, 0.0, 8.0])  # norm 10


@pytest.mark.parametrize("limit", [0.25, 1.0, 9.0])
def test_clipping_shortens_the_gradient_to_the_limit_and_keeps_its_direction(limit: float) -> None:
    model = Linear(*DIRECTIONS)
    result = step(model, [batch(1, 2)], limit)
    assert result.grad_norm == 10.0, "the norm before clipping"
    # START is up to 5, with a last place of 4.8e-7.
    np.testing.assert_allclose(update(model), -GRADIENT * limit / 10, rtol=0, atol=1e-6)
    assert np.linalg.norm(update(model)) == pytest.approx(limit, abs=2e-6)


@pytest.mark.parametrize("limit", [0.0, 10.0, 10.5, 1e9])
def test_no_clipping_at_zero_nor_below_the_limit(limit: float) -> None:
    model = Linear(*DIRECTIONS)
    result = step(model, [batch(1, 2)], limit)
    assert result.grad_norm == 10.0 and np.array_equal(update(model), -GRADIENT)


def test_the_learning_rate_of_the_step_is_used() -> None:
    model = Linear(*DIRECTIONS)
    step(model, [batch(1, 2)], 0.0, lr=0.5)
    assert np.array_equal(update(model), -GRADIENT / 2)


def test_gradients_are_gone_after_the_step_and_tokens_are_counted() -> None:
    model = Linear(*DIRECTIONS)
    result = step(model, [batch(1, 2), batch(1, 3)], 0.0)
    assert all(p.grad is None for p in model.parameters)
    assert (result.num_rows, result.num_tokens, result.num_supervised_tokens) == (2, 6, 5)


def test_micro_batches_weigh_by_their_supervised_tokens() -> None:
    """Three tokens of scale 1 and one of scale 5: the mean is 2, and the mean of the two means would be 3."""
    model, engine = Linear(*DIRECTIONS), Engine()
    per_token = float((DIRECTIONS[0] * START[0]).sum() + (DIRECTIONS[1] * START[1]).sum())
    loss = accumulate_gradients(model, [batch(1, 3), batch(5, 1)], engine, seed=0, step=0)  # type: ignore[arg-type]
    assert loss == pytest.approx(2 * per_token, rel=1e-6)
    assert torch.equal(model.parameters[0].grad, 2 * DIRECTIONS[0])  # type: ignore[arg-type]


def test_tokens_count_as_often_as_they_weigh() -> None:
    """Two tokens of weight 0.5 and one of weight 3, in one step: the sum is divided by 4, not by 3."""
    model, engine = Linear(*DIRECTIONS), Engine()
    light = replace(batch(1, 2), weights=torch.tensor([[0.0, 0.5, 0.5]]))
    heavy = replace(batch(1, 1), weights=torch.tensor([[0.0, 3.0, 0.0]]))
    assert (light.weight_sum, heavy.weight_sum, batch(1, 2).weight_sum) == (1.0, 3.0, 2.0)
    accumulate_gradients(model, [light, heavy], engine, seed=0, step=0)  # type: ignore[arg-type]
    assert torch.equal(model.parameters[0].grad, 3 * DIRECTIONS[0] / 4)  # type: ignore[arg-type]


def test_dropout_is_seeded_by_seed_step_and_micro_step() -> None:
    model, engine = Linear(*DIRECTIONS), Engine()
    for seed, at in ((0, 0), (0, 1), (1, 0), (0, 0)):
        accumulate_gradients(model, [batch(1, 1)] * 2, engine, seed=seed, step=at)  # type: ignore[arg-type]
    assert len(set(model.seeds[:6])) == 6 and model.seeds[6:] == model.seeds[:2]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stops_before_the_update_and_names_the_rows(value: float) -> None:
    model = Linear(torch.tensor([value, 1.0]), DIRECTIONS[1])
    with pytest.raises(NumericsError, match=r"step 5: .*rows \[7, 8\]"):
        step(model, [batch(1, 1, row=7), batch(1, 1, row=8)], 1.0)
    assert not update(model).any() and all(p.grad is None for p in model.parameters)


def test_a_gradient_that_alone_is_not_finite_stops_too() -> None:
    model = Linear(*DIRECTIONS)
    model.parameters[0].register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(NumericsError, match=r"gradient norm (inf|nan)"):
        step(model, [batch(1, 1)], 1.0)
    assert not update(model).any()


def test_an_update_that_fails_says_that_it_is_half_done(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: Any) -> None:
        raise MemoryError

    model = Linear(*DIRECTIONS)
    monkeypatch.setattr(torch.optim.SGD, "step", no_room)
    with pytest.raises(MemoryError) as caught:
        step(model, [batch(1, 1)], 1.0)
    assert caught.value.__notes__ == [HALF_UPDATED]
    monkeypatch.setattr(model, "loss_sum", no_room)
    with pytest.raises(MemoryError) as caught:
        step(model, [batch(1, 1)], 1.0)
    assert not hasattr(caught.value, "__notes__"), "nothing was changed yet"


class Method(MethodHooks):
    """Adds a penalty of known gradient, doubles the gradients after clipping, and notes what it saw."""

    def __init__(self, model: Linear) -> None:
        self.model, self.calls = model, list[Any]()

    def extra_loss(self, share: float) -> torch.Tensor:
        self.calls.append(("extra_loss", share))
        return 4 * share * self.model.parameters[0].sum()

    def before_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        assert torch.equal(self.model.parameters[0], START[0]), "not updated yet"
        for parameter in self.model.parameters:
            assert parameter.grad is not None
            parameter.grad *= 2
        self.calls.append(("before_step", step))

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        gone = [p for p in self.model.parameters if p.grad is None]
        self.calls.append(("after_step", step, float(self.model.parameters[0].detach()[0]), len(gone)))


def test_a_method_is_asked_in_order_and_its_loss_is_apart() -> None:
    """The step's gradient is 2 (direction + 4) of the first tensor, from two micro-batches of 3 and 1 tokens."""
    model, engine = Linear(*DIRECTIONS), Engine()
    optimizer, method = torch.optim.SGD(model.parameters, lr=1.0), Method(model)
    result = train_step(
        model,  # type: ignore[arg-type]
        [batch(1, 3), batch(1, 1)],
        optimizer,
        engine,  # type: ignore[arg-type]
        seed=0,
        step=4,
        learning_rate=1.0,
        max_grad_norm=0.0,
        hooks=method,
    )
    first = START[0] - 2 * (DIRECTIONS[0] + 4)
    assert torch.equal(model.parameters[0].detach(), first)
    assert method.calls == [
        ("extra_loss", 0.75),
        ("extra_loss", 0.25),
        ("before_step", 4),
        ("after_step", 4, float(first[0]), 0),
    ]
    assert result.extra_loss == 12.0, "4 x (1 + 2)"
    assert result.loss == float((DIRECTIONS[0] * START[0]).sum() + (DIRECTIONS[1] * START[1]).sum())
    assert result.grad_norms is not None and result.grad_norms.tolist() == [6.0, float(DIRECTIONS[1].norm())]


@pytest.mark.parametrize("name", ["before_step", "after_step"])
def test_a_method_that_fails_around_the_update_leaves_it_half_done(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError

    model, engine = Linear(*DIRECTIONS), Engine()
    method = MethodHooks()
    monkeypatch.setattr(method, name, fail)
    optimizer = torch.optim.SGD(model.parameters, lr=1.0)
    options: dict[str, Any] = {"seed": 0, "step": 4, "learning_rate": 1.0, "max_grad_norm": 0.0, "hooks": method}
    with pytest.raises(MemoryError) as caught:
        train_step(model, [batch(1, 3)], optimizer, engine, **options)  # type: ignore[arg-type]
    assert caught.value.__notes__ == [HALF_UPDATED]
