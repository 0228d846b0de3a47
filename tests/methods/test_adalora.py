"""AdaLoRA: the budget in closed form, PEFT's allocator as the oracle, and what stays at zero."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig
from peft.tuners.adalora.layer import RankAllocator as PeftAllocator
from torch import nn

from qlora_train.adapters.fold import Delta, read_deltas
from qlora_train.adapters.forms.base import layer_tensors
from qlora_train.adapters.layers import lora_layers
from qlora_train.adapters.schedules import RankAllocator, Window
from qlora_train.adapters.state import save_adapter
from tests.methods.cases import Case, build, section_of

NUM_STEPS = 20
WINDOW = {"schedule_every": 2, "schedule_start_frac": 0.2, "schedule_end_frac": 0.3}
KEYS: dict[str, Any] = {"r": 6, "target_r": 4, **WINDOW}


def run(case: Case, allocator: RankAllocator, first: int, last: int, **watch: Any) -> list[int]:
    """Steps on one batch, the triplets left after each."""
    optimizer = torch.optim.AdamW([p for p in case.model.parameters() if p.requires_grad], lr=1e-2)
    left = []
    case.model.train()
    for step in range(first, last):
        loss = case.causal.loss_sum(case.batches[0]) / 30
        penalty = allocator.extra_loss(1.0)
        assert penalty is not None
        (loss + penalty).backward()
        optimizer.step()
        allocator.after_step(step, optimizer)
        if watch:
            watch["seen"](step + 1)
        optimizer.zero_grad(set_to_none=True)
        left.append(int(allocator.figures()["num_triplets"]))
    return left


def values(case: Case) -> dict[str, torch.Tensor]:
    return {name: layer_tensors(layer, "default")["lora_core_e"] for name, layer in lora_layers(case.model).items()}


def test_the_budget_is_kept_and_what_is_dropped_stays_at_zero(tiny_dir: Path, tmp_path: Path) -> None:
    section = section_of("adalora", **KEYS)
    case = build(tiny_dir, section)
    allocator = RankAllocator(case.model, section, NUM_STEPS)
    assert allocator.window == Window(4, 14, 2) and (allocator.start, allocator.target) == (42, 28)
    left = run(case, allocator, 0, 14)
    for step in (6, 8, 10, 12):
        budget = int(28 + 14 * (1 - (step - 4) / 10) ** 3)
        assert left[step - 1] == allocator.budget(step) == budget
    assert left[13] == 28, "the target at the end of the window"
    zero = {name: (value == 0).clone() for name, value in values(case).items()}
    assert set(run(case, allocator, 14, NUM_STEPS)) == {28}
    assert all(torch.equal(value == 0, zero[name]) for name, value in values(case).items()), "the same ones"
    save_adapter(case.model, tmp_path)
    ranks = [delta.lora_A.shape[0] for delta in read_deltas(tmp_path).values() if isinstance(delta, Delta)]
    assert sum(ranks) == 28, "a fold has the ranks that were kept"


class Shown(nn.Module):
    """Our tensors under the names that PEFT's allocator looks for."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = [case]

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        for name, layer in lora_layers(self.case[0].model).items():
            tensors = layer_tensors(layer, "default")
            for attribute, theirs in (("lora_A", "lora_A"), ("lora_core_e", "lora_E"), ("lora_B", "lora_B")):
                tensor = tensors[attribute]
                if attribute == "lora_core_e":
                    tensor = tensor.detach().clone()[:, None]
                    tensor.grad = tensors[attribute].grad[:, None] if tensors[attribute].grad is not None else None
                yield f"{name}.{theirs}.default", tensor


def test_the_choices_are_those_of_peft_s_allocator(tiny_dir: Path) -> None:
    """From the same parameters and gradients; PEFT's is called by hand, as it never is by the transformers trainer."""
    section = section_of("adalora", **KEYS)
    case = build(tiny_dir, section)
    ours = RankAllocator(case.model, section, NUM_STEPS)
    schedule = {"tinit": 4, "tfinal": 6, "deltaT": 2, "total_step": NUM_STEPS}
    config = AdaLoraConfig(init_r=6, target_r=4, beta1=0.85, beta2=0.85, **schedule)
    shown = Shown(case)
    theirs = PeftAllocator(shown, config, "default")
    assert theirs.init_bgt == ours.start and theirs.target_bgt == ours.target
    compared = []

    class Both(RankAllocator):
        def _choose(self, budget: int) -> dict[str, torch.Tensor]:
            kept = super()._choose(budget)
            pattern = theirs.mask_to_budget(shown, budget)
            compared.append({name: pattern[f"{name}.lora_E.default"] == mask.tolist() for name, mask in kept.items()})
            return kept

        def _measure(self) -> None:
            theirs.update_ipt(shown)
            super()._measure()

    run(case, Both(case.model, section, NUM_STEPS), 0, 13)
    assert len(compared) == 4 and all(all(same.values()) for same in compared)


def test_the_penalty_is_zero_for_orthonormal_factors_and_falls_in_training(tiny_dir: Path) -> None:
    section = section_of("adalora", **KEYS)
    case = build(tiny_dir, section)
    allocator = RankAllocator(case.model, section, NUM_STEPS)
    start = float(allocator.extra_loss(1.0))
    run(case, allocator, 0, 10)
    end = float(allocator.extra_loss(1.0))
    assert end < start and float(allocator.extra_loss(0.25)) == pytest.approx(end / 4)
    for layer in lora_layers(case.model).values():
        nn.init.orthogonal_(layer.lora_A["default"].weight)
        nn.init.orthogonal_(layer.lora_B["default"].weight)
    assert float(allocator.extra_loss(1.0)) < 1e-6
    assert RankAllocator(case.model, section_of("adalora", **KEYS, orthogonality=0.0), 9).extra_loss(1.0) is None


def test_a_resumed_schedule_is_the_straight_one(tiny_dir: Path) -> None:
    section = section_of("adalora", **KEYS)
    straight, again = build(tiny_dir, section), build(tiny_dir, section)
    first = RankAllocator(straight.model, section, NUM_STEPS)
    run(straight, first, 0, 9)
    for name, layer in lora_layers(straight.model).items():
        there = layer_tensors(lora_layers(again.model)[name], "default")
        for attribute, tensor in layer_tensors(layer, "default").items():
            there[attribute].data.copy_(tensor)
    second = RankAllocator(again.model, section, NUM_STEPS)
    second.load_state_dict({name: value.clone() for name, value in first.state_dict().items()})
    assert run(straight, first, 9, 16) == run(again, second, 9, 16)
    assert all(torch.equal(values(straight)[name], value) for name, value in values(again).items())
    with pytest.raises(ValueError, match="keeps no"):
        second.load_state_dict({"other": 1})
