"""Learning rates against their closed form, AdamW against numpy, and its state through a round trip."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from qlora_train.errors import ResumeError
from qlora_train.recipe.schema import TrainSection
from qlora_train.train.optim import (
    build_optimizer,
    lr_factor,
    optimizer_tensors,
    restore_optimizer,
    trainable_parameters,
)

MOMENTS = ("exp_avg", "exp_avg_sq", "step")
SCHEDULES = ("linear", "cosine", "constant")
NUM_STEPS = (1, 2, 3, 4, 7, 10, 33, 34, 100)


def closed_form(step: int, num_steps: int, warmup_frac: str, schedule: str) -> float:
    """The same in exact fractions, written down again."""
    warmup = math.ceil(Fraction(warmup_frac) * num_steps)
    if step < warmup:
        return float(Fraction(step + 1, warmup + 1))
    left = Fraction(num_steps - step, num_steps - warmup)  # 1 at the peak, 0 one step after the last
    return {"constant": 1.0, "linear": float(left), "cosine": math.sin(math.pi / 2 * float(left)) ** 2}[schedule]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup_frac", ["0", "0.03", "0.5"])
def test_lr_factor_equals_its_closed_form_at_every_step(schedule: str, warmup_frac: str) -> None:
    for num_steps in NUM_STEPS:
        for step in range(num_steps):
            found = lr_factor(step, num_steps, float(warmup_frac), schedule)
            assert found == pytest.approx(closed_form(step, num_steps, warmup_frac, schedule), abs=1e-12)
            assert 0 < found <= 1, (num_steps, step)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_lr_rises_to_its_peak_and_never_rises_again(schedule: str) -> None:
    factors = [lr_factor(step, 40, 0.25, schedule) for step in range(40)]
    rising = [later - earlier for earlier, later in pairwise(factors[:11])]
    assert factors[10] == 1.0 and all(step == pytest.approx(1 / 11) for step in rising)
    assert all(later <= earlier for earlier, later in pairwise(factors[10:]))
    assert (factors[-1] < 0.05) == (schedule != "constant")


class Pair(nn.Module):
    """A frozen weight and two trainable ones."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.base = nn.Parameter(torch.randn(3, 3, generator=generator), requires_grad=False)
        self.lora_A = nn.Parameter(torch.randn(2, 5, generator=generator))
        self.lora_B = nn.Parameter(torch.randn(4, 2, generator=generator))


def give_gradients(model: nn.Module, step: int) -> dict[str, NDArray[np.float64]]:
    """Random gradients of a step; the same for every model."""
    generator = torch.Generator().manual_seed(100 + step)
    given = {}
    for name, parameter in trainable_parameters(model).items():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
        given[name] = parameter.grad.double().numpy()
    return given


def run(section: TrainSection, num_steps: int, model: Pair | None = None) -> tuple[Pair, torch.optim.Optimizer]:
    model = model or Pair()
    optimizer = build_optimizer(model, section)
    for step in range(num_steps):
        give_gradients(model, step)
        optimizer.step()
    return model, optimizer


def adamw(section: TrainSection, num_steps: int) -> dict[str, NDArray[np.float64]]:
    """AdamW as its paper has it (arXiv 1711.05101, algorithm 2), in float64."""
    model = Pair()
    beta1, beta2, lr, decay = section.adam_beta1, section.adam_beta2, section.learning_rate, section.weight_decay
    values = {name: p.detach().double().numpy().copy() for name, p in trainable_parameters(model).items()}
    m = {name: np.zeros_like(value) for name, value in values.items()}
    v = {name: np.zeros_like(value) for name, value in values.items()}
    for step in range(num_steps):
        for name, grad in give_gradients(model, step).items():
            m[name] = beta1 * m[name] + (1 - beta1) * grad
            v[name] = beta2 * v[name] + (1 - beta2) * grad**2
            m_hat = m[name] / (1 - beta1 ** (step + 1))
            v_hat = v[name] / (1 - beta2 ** (step + 1))
            values[name] = values[name] - lr * decay * values[name] - lr * m_hat / (np.sqrt(v_hat) + 1e-8)
    return values


def distance(model: nn.Module, expected: dict[str, NDArray[np.float64]]) -> float:
    parameters = trainable_parameters(model)
    assert parameters.keys() == expected.keys() == {"lora_A", "lora_B"}
    return max(float(np.abs(p.detach().double().numpy() - expected[n]).max()) for n, p in parameters.items())


DEFAULTS = {"learning_rate": 0.01}
SETTINGS = (
    DEFAULTS,
    {**DEFAULTS, "weight_decay": 0.5},
    {**DEFAULTS, "adam_beta1": 0.5},
    {**DEFAULTS, "adam_beta2": 0.9},
)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_adamw_equals_numpy_and_each_setting_reaches_it(settings: dict[str, float], optimizer: str) -> None:
    """float32 against float64: values up to 3 have a last place of 2.4e-7; a few roundings stay below 1e-6.

    Below 4,096 elements the moments of `adamw_8bit` are float32 as well.
    """
    for num_steps in (1, 3):
        section = TrainSection(**settings, optimizer=optimizer)  # type: ignore[arg-type]
        model, _ = run(section, num_steps)
        assert distance(model, adamw(section, num_steps)) <= 1e-6
        assert torch.equal(model.base, Pair().base), "a frozen weight moved"
    for other in SETTINGS:
        if other != settings:  # negative control: after three steps no other setting fits
            assert distance(model, adamw(TrainSection(**other), 3)) > 1e-4  # type: ignore[arg-type]


def test_the_state_survives_a_round_trip_to_the_bit() -> None:
    section = TrainSection(learning_rate=0.01, weight_decay=0.1)
    model, optimizer = run(section, 2)
    tensors = {name: tensor.clone() for name, tensor in optimizer_tensors(model, optimizer).items()}
    assert set(tensors) == {f"{moment}/{name}" for moment in MOMENTS for name in ("lora_A", "lora_B")}
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    assert tensors["step/lora_A"].item() == 2

    again = Pair()
    again.load_state_dict(model.state_dict())
    restored = build_optimizer(again, section)
    restore_optimizer(again, restored, tensors)
    found = optimizer_tensors(again, restored)
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)
    forgetful = Pair()
    forgetful.load_state_dict(model.state_dict())
    others = (again, restored), (model, optimizer), (forgetful, build_optimizer(forgetful, section))
    for one, its_optimizer in others:
        give_gradients(one, 2)
        its_optimizer.step()
    assert torch.equal(again.lora_A, model.lora_A) and torch.equal(again.lora_B, model.lora_B)
    assert not torch.equal(forgetful.lora_A, model.lora_A), "negative control: without its state it goes elsewhere"


def test_the_restored_state_is_a_copy() -> None:
    model, optimizer = run(TrainSection(), 1)
    tensors = {name: tensor.clone() for name, tensor in optimizer_tensors(model, optimizer).items()}
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    restore_optimizer(model, optimizer, tensors)
    give_gradients(model, 1)
    optimizer.step()
    assert all(torch.equal(tensors[name], kept[name]) for name in kept)


def test_an_optimiser_that_has_not_stepped_has_no_state() -> None:
    model = Pair()
    assert optimizer_tensors(model, build_optimizer(model, TrainSection())) == {}


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("exp_avg/lora_A", None, "exp_avg/lora_A"),
        ("exp_avg/base", torch.zeros(3, 3), "exp_avg/base"),
        ("exp_avg/lora_A", torch.zeros(5, 2), "lora_A has another shape"),
        ("exp_avg_sq/lora_B", torch.zeros(4, 1), "lora_B has another shape"),
        ("exp_avg_sq/lora_B", torch.zeros(4, 2, dtype=torch.bfloat16), "lora_B has another shape or dtype"),
        ("step/lora_A", torch.zeros(2), "lora_A has another shape"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(name: str, value: torch.Tensor | None, words: str) -> None:
    model, optimizer = run(TrainSection(), 1)
    tensors = optimizer_tensors(model, optimizer)
    tensors.pop(name, None)
    if value is not None:
        tensors[name] = value
    with pytest.raises(ResumeError, match=words):
        restore_optimizer(model, optimizer, tensors)
