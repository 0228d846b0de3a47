"""The optimisers on a card: what the CPU cannot show is the fused update, where `step` lies, and paged moments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qlora_train.quant.moments import EIGHT_BIT, PAGED, optimizer_state_bytes
from qlora_train.recipe.schema import TrainSection
from qlora_train.train.optim import build_optimizer, optimizer_tensors, restore_optimizer, trainable_parameters

pytestmark = pytest.mark.gpu

NAMES = ("adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit")
RATE, DECAY = 0.01, 0.1


class Sizes(nn.Module):
    """One parameter large enough for pages (100,000 elements), one for 8 bit only (4,096), one for neither."""

    def __init__(self, device: str) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.large = nn.Parameter(torch.randn(512, 256, generator=generator).to(device))
        self.middle = nn.Parameter(torch.randn(300, 16, generator=generator).to(device))
        self.small = nn.Parameter(torch.randn(8, 16, generator=generator).to(device))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Random gradients, the same for every model and device."""
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for parameter in trainable_parameters(model).values():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.device)
        optimizer.step()


def optimizer_of(name: str, model: Sizes, weight_decay: float = DECAY) -> Any:
    settings: dict[str, Any] = {"optimizer": name, "learning_rate": RATE, "weight_decay": weight_decay}
    return build_optimizer(model, TrainSection(**settings))


def build(name: str, device: str = "cuda", weight_decay: float = DECAY) -> tuple[Sizes, Any]:
    model = Sizes(device)
    return model, optimizer_of(name, model, weight_decay)


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def apart(one: nn.Module, other: nn.Module) -> float:
    """The largest distance between two values of the same place."""
    others = trainable_parameters(other)
    return max(
        float((p.detach().cpu() - others[name].detach().cpu()).abs().max())
        for name, p in trainable_parameters(one).items()
    )


def check_places(model: Sizes, optimizer: Any) -> None:
    """Moments on the card or in its managed memory, `step` of the fused update on the card."""
    paged = optimizer.__class__.__name__.startswith("Paged")
    for parameter in (model.large, model.middle, model.small):
        state = optimizer.state[parameter]
        if isinstance(optimizer, torch.optim.AdamW):
            assert optimizer.param_groups[0]["fused"]
            assert {value.device.type for value in state.values()} == {"cuda"}
            continue
        for moment in ("state1", "state2"):
            in_pages = getattr(state[moment], "is_paged", False)
            assert in_pages == (paged and parameter is model.large)
            assert in_pages or state[moment].device.type == "cuda"


@pytest.mark.parametrize("name", NAMES)
def test_a_resume_is_exact(name: str, tmp_path: Path) -> None:
    model, straight = build(name)
    train(model, straight, range(6))

    again, first = build(name)
    train(again, first, range(3))
    check_places(again, first)
    save_file(optimizer_tensors(again, first), tmp_path / "optimizer.safetensors")
    second = optimizer_of(name, again)
    restore_optimizer(again, second, load_file(tmp_path / "optimizer.safetensors"))
    check_places(again, second)
    train(again, second, range(3, 6))
    check_places(again, second)
    assert apart(again, model) == 0
    found, expected = copies(optimizer_tensors(again, second)), copies(optimizer_tensors(model, straight))
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)


@pytest.mark.parametrize("name", NAMES)
def test_the_update_equals_that_of_a_cpu(name: str) -> None:
    """float32 moments: roundings of values up to 5. 8-bit ones too after one step, which reads no rounded moment."""
    num_steps = 1 if name in EIGHT_BIT else 4
    model, optimizer = build(name, weight_decay=0)
    train(model, optimizer, range(num_steps))
    reference, plain = build("adamw", "cpu", weight_decay=0)
    train(reference, plain, range(num_steps))
    assert apart(model, reference) <= 2e-6
    assert apart(model, Sizes("cpu")) > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_weights_decay_before_the_update_or_after_it(name: str) -> None:
    """torch shrinks what it updates, bitsandbytes what it has updated: lr^2 weight_decay apart at each step."""
    model, optimizer = build(name)
    train(model, optimizer, range(1))
    reference, plain = build("adamw", "cpu", weight_decay=0)
    before, shrink = copies(trainable_parameters(reference)), 1 - RATE * DECAY
    train(reference, plain, range(1))
    with torch.no_grad():
        for key, parameter in trainable_parameters(reference).items():
            if name == "adamw":
                parameter.sub_((1 - shrink) * before[key])
            else:
                parameter.mul_(shrink)
    assert apart(model, reference) <= 2e-6


def test_a_state_from_a_cpu_goes_on_a_card() -> None:
    model, plain = build("adamw", "cpu")
    train(model, plain, range(3))
    moved, fused = build("adamw")
    with torch.no_grad():
        for name, parameter in trainable_parameters(moved).items():
            parameter.copy_(trainable_parameters(model)[name])
    restore_optimizer(moved, fused, optimizer_tensors(model, plain))
    check_places(moved, fused)
    train(model, plain, range(3, 6))
    train(moved, fused, range(3, 6))
    assert apart(moved, model) <= 2e-6


@pytest.mark.parametrize("name", NAMES)
def test_state_bytes_are_exact(name: str) -> None:
    model, optimizer = build(name)
    train(model, optimizer, range(1))
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    found = sum({tensor.data_ptr(): tensor.nbytes for tensor in states}.values())
    assert optimizer_state_bytes(name, [p.shape for p in trainable_parameters(model).values()]) == found
    assert (name in PAGED) == any(getattr(tensor, "is_paged", False) for tensor in states)
