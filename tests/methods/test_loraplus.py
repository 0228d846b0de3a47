"""LoRA+: every trainable parameter in exactly one group, the rates of the groups, and what a run logs of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qlora_train.adapters.groups import loraplus_groups
from qlora_train.recipe.load import load_recipe
from qlora_train.recipe.schema import AdapterSection, TrainSection
from qlora_train.train.metrics import Silent
from qlora_train.train.optim import (
    build_optimizer,
    learning_rates,
    lr_factor,
    optimizer_tensors,
    restore_optimizer,
    set_learning_rate,
    trainable_parameters,
)
from qlora_train.train.run import run_training
from tests.commandline import write_recipe
from tests.tiny import build_tiny_llama

PLUS = AdapterSection(method="loraplus", lr_ratio=8.0)


class Everything(nn.Module):
    """One parameter of every kind that an adapter may train, and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = {
            "q_proj_lora_A": (2, 64),
            "q_proj_lora_B": (70, 2),
            "q_proj_lora_core_c": (2, 2),
            "q_proj_lora_magnitude_vector": (70,),
            "q_proj_bias": (70,),
            "embed_lora_embedding_A": (2, 50),
            "embed_lora_embedding_B": (64, 2),
        }
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator)))
        self.base = nn.Parameter(torch.randn(4, 4, generator=generator), requires_grad=False)


def give_gradients(model: nn.Module, step: int = 0) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in trainable_parameters(model).values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_every_parameter_is_in_exactly_one_group() -> None:
    parameters = trainable_parameters(Everything())
    groups = loraplus_groups(parameters, 8.0)
    names = {id(parameter): name for name, parameter in parameters.items()}
    found = {group.name: {names[id(p)] for p in group.parameters} for group in groups}
    assert found == {
        "A": {"q_proj_lora_A", "q_proj_lora_core_c", "embed_lora_embedding_A", "embed_lora_embedding_B"},
        "B": {"q_proj_lora_B"},
        "vector": {"q_proj_lora_magnitude_vector", "q_proj_bias"},
    }
    assert {group.name: (group.lr_ratio, group.decays) for group in groups} == {
        "A": (1.0, True),
        "B": (8.0, True),
        "vector": (1.0, False),
    }
    assert sum(len(group.parameters) for group in groups) == len(parameters)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_the_ratio_holds_at_every_step(schedule: str) -> None:
    train = TrainSection(learning_rate=1e-3)
    optimizer = build_optimizer(Everything(), train, PLUS)
    for step in range(10):
        rate = train.learning_rate * lr_factor(step, 10, 0.2, schedule)
        set_learning_rate(optimizer, rate)
        found = learning_rates(optimizer)
        assert found["A"] == found["vector"] == rate
        assert found["B"] == pytest.approx(8 * rate)


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_the_first_step_is_the_sign_times_the_rate_of_the_group(name: str) -> None:
    model = Everything()
    before = {name: p.detach().clone() for name, p in trainable_parameters(model).items()}
    optimizer = build_optimizer(model, TrainSection(learning_rate=1e-3, optimizer=name), PLUS)  # type: ignore[arg-type]
    give_gradients(model)
    set_learning_rate(optimizer, 1e-3)
    optimizer.step()
    for key, parameter in trainable_parameters(model).items():
        rate = 8e-3 if "lora_B" in key else 1e-3
        assert parameter.grad is not None
        assert torch.allclose(parameter - before[key], -rate * parameter.grad.sign(), rtol=1e-3, atol=1e-7), key


def test_vectors_do_not_decay() -> None:
    model = Everything()
    before = {name: p.detach().clone() for name, p in trainable_parameters(model).items()}
    optimizer = build_optimizer(model, TrainSection(learning_rate=1e-2, weight_decay=0.5), PLUS)
    for parameter in trainable_parameters(model).values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moved = {name for name, p in trainable_parameters(model).items() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "magnitude" not in name and "bias" not in name}


def test_a_ratio_of_one_is_plain_adamw() -> None:
    plus, plain = Everything(), Everything()
    section = PLUS.model_copy(update={"lr_ratio": 1.0})
    optimizers = [
        build_optimizer(plus, TrainSection(learning_rate=1e-3), section),
        build_optimizer(plain, TrainSection(learning_rate=1e-3)),
    ]
    for step in range(3):
        for model, optimizer in zip((plus, plain), optimizers, strict=True):
            give_gradients(model, step)
            set_learning_rate(optimizer, 1e-3)
            optimizer.step()
    others = trainable_parameters(plain)
    assert all(torch.equal(p, others[name]) for name, p in trainable_parameters(plus).items())
    assert learning_rates(optimizers[1]) == learning_rates(optimizers[0]) == {}, "one rate for all"


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_the_state_of_several_groups_survives_a_round_trip(name: str) -> None:
    train = TrainSection(learning_rate=1e-3, optimizer=name)  # type: ignore[arg-type]
    model = Everything()
    optimizer = build_optimizer(model, train, PLUS)
    give_gradients(model)
    optimizer.step()
    tensors = {name: tensor.clone() for name, tensor in optimizer_tensors(model, optimizer).items()}
    again = Everything()
    again.load_state_dict(model.state_dict())
    restored = build_optimizer(again, train, PLUS)
    restore_optimizer(again, restored, tensors)
    for one, its in ((model, optimizer), (again, restored)):
        give_gradients(one, 1)
        set_learning_rate(its, 1e-3)
        its.step()
    others = trainable_parameters(again)
    assert all(torch.equal(p, others[name]) for name, p in trainable_parameters(model).items())


def test_a_run_logs_the_rate_of_each_group(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"adapter__method": "loraplus", "adapter__lr_ratio": 4.0, "eval__generate_rows": 0}
    folder = build_tiny_llama(tmp_path / "llama", num_hidden_layers=1)
    recipe = load_recipe(write_recipe(tmp_path, folder, train__max_steps=2, **changes), ())
    run_training(recipe, resume=False, from_step=None, reporter=Silent())
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    assert len(steps) == 2
    for line in steps:
        assert line["learning_rates"]["A"] == line["learning_rate"]
        assert line["learning_rates"]["B"] == pytest.approx(4 * line["learning_rate"])
