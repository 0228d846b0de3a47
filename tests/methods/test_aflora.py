"""AFLoRA: the score from logged gradients, both rules, and what is frozen for good."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qlora_train.adapters.forms.base import layer_tensors
from qlora_train.adapters.layers import lora_layers
from qlora_train.adapters.schedules import Freezer, Window
from tests.methods.cases import Case, build, section_of

NUM_STEPS = 20
KEYS: dict[str, Any] = {"schedule_every": 2, "schedule_start_frac": 0.2, "schedule_end_frac": 0.3}


class Spy(Freezer):
    """Keeps the gradients and what trained at each step."""

    def before_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        self.log: list[dict[str, np.ndarray]] = [*getattr(self, "log", [])]
        self.log.append({key: t.grad.double().numpy().copy() for key, t in self._trained().items()})
        before = list(self._trained())
        super().before_step(step, optimizer)
        self.scored = {**getattr(self, "scored", {}), **dict.fromkeys(set(before) - set(self._trained()), step)}


def run(case: Case, freezer: Freezer, first: int, last: int) -> tuple[list[float], torch.optim.Optimizer]:
    """Steps on one batch; the share of A and B that trains after each."""
    optimizer = torch.optim.AdamW([p for p in case.model.parameters() if p.requires_grad], lr=5e-3)
    shares = []
    case.model.train()
    for step in range(first, last):
        (case.causal.loss_sum(case.batches[0]) / 30).backward()
        freezer.before_step(step, optimizer)
        optimizer.step()
        freezer.after_step(step, optimizer)
        optimizer.zero_grad(set_to_none=True)
        shares.append(freezer.figures()["trainable_frac"])
    return shares, optimizer


@pytest.mark.parametrize("rule", ["rank", "reference"])
def test_tensors_freeze_one_after_the_other_and_stay_frozen(rule: str, tiny_dir: Path) -> None:
    section = section_of("aflora", **KEYS, freeze_rule=rule)
    case = build(tiny_dir, section)
    freezer = Freezer(case.model, section, NUM_STEPS)
    assert freezer.window == Window(4, 14, 2)
    shares, optimizer = run(case, freezer, 0, 10)
    assert shares[:4] == [1.0] * 4 and shares == sorted(shares, reverse=True) and shares[-1] < 1
    if rule == "rank":
        assert shares[-1] > 0
        assert all(share <= freezer.window.remaining(step + 1) for step, share in enumerate(shares) if step % 2)
    frozen = {name: tensor.detach().clone() for name, tensor in held(case).items()}
    assert frozen and all(tensor not in optimizer.state for tensor in held(case).values()), "their moments are gone"
    with case.model.disable_adapter():
        pass
    assert held(case).keys() == frozen.keys(), "switching the adapter off and on thaws nothing"
    moving = {name: t.clone() for name, t in cores(case).items()}
    more, _ = run(case, freezer, 10, NUM_STEPS)
    assert more[3:] == [0.0] * 7, "none from the end of the window on"
    assert all(torch.equal(held(case)[name], tensor) for name, tensor in frozen.items())
    assert not any(torch.equal(cores(case)[name], tensor) for name, tensor in moving.items()), "d and b still train"


def held(case: Case) -> dict[str, torch.Tensor]:
    """The factors that no longer train."""
    return {n: t for n, t in tensors(case).items() if n.endswith(("lora_A", "lora_B")) and not t.requires_grad}


def cores(case: Case) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors(case).items() if "core" in name}


def tensors(case: Case) -> dict[str, torch.Tensor]:
    return {
        f"{name}/{attribute}": tensor
        for name, layer in lora_layers(case.model).items()
        for attribute, tensor in layer_tensors(layer, "default").items()
    }


def test_the_first_choice_follows_from_the_logged_gradients(tiny_dir: Path) -> None:
    """The score recomputed in numpy: windows of two steps, two averages, the mean of their product."""
    section = section_of("aflora", **KEYS)
    case = build(tiny_dir, section)
    spy = Spy(case.model, section, NUM_STEPS)
    run(case, spy, 0, 6)
    scores = {}
    for key in spy.log[0]:
        mean = spread = np.zeros_like(spy.log[0][key])
        for start in (0, 2, 4):
            seen = (np.abs(spy.log[start][key]) + np.abs(spy.log[start + 1][key])) / 2
            mean = 0.85 * mean + 0.15 * seen
            spread = 0.95 * spread + 0.05 * np.abs(seen - mean)
        scores[key] = float((mean * spread).mean())
        if key in spy.importance:  # what was frozen has left it
            np.testing.assert_allclose(spy.importance[key].numpy(), mean, rtol=1e-5)
            np.testing.assert_allclose(spy.uncertainty[key].numpy(), spread, rtol=1e-5)
    count = len(spy.frozen)
    assert 0 < count < len(scores)
    assert set(spy.frozen) == set(sorted(scores, key=lambda key: scores[key])[:count])


def test_a_resumed_schedule_is_the_straight_one(tiny_dir: Path) -> None:
    section = section_of("aflora", **KEYS)
    straight, stopped = build(tiny_dir, section), build(tiny_dir, section)
    freezer = Freezer(straight.model, section, NUM_STEPS)
    run(straight, freezer, 0, 9)
    first = Freezer(stopped.model, section, NUM_STEPS)
    run(stopped, first, 0, 9)
    again = build(tiny_dir, section)
    for name, tensor in tensors(stopped).items():
        tensors(again)[name].data.copy_(tensor)
    second = Freezer(again.model, section, NUM_STEPS)
    second.load_state_dict(first.state_dict())
    assert second.frozen == first.frozen == freezer.frozen and first.frozen
    for one in (straight, again):
        run(one, freezer if one is straight else second, 9, 12)
    assert second.frozen == freezer.frozen
    with pytest.raises(ValueError, match="list of frozen"):
        second.load_state_dict({})


def test_the_reference_rule_freezes_what_lies_below_the_quantile(tiny_dir: Path) -> None:
    """The authors': tensors whose mean score is below the elements' quantile at one minus the share that may train."""
    section = section_of("aflora", **KEYS, freeze_rule="reference")
    case = build(tiny_dir, section)
    freezer = Freezer(case.model, section, NUM_STEPS)
    run(case, freezer, 0, 6)
    share = 0.3
    left = {key: t for key, t in freezer._trained().items() if key in freezer.importance}
    elements = {key: (freezer.importance[key] * freezer.uncertainty[key]).double().numpy() for key in left}
    pool = np.concatenate([element.ravel() for element in elements.values()])
    wanted = {key for key, element in elements.items() if element.mean() < np.quantile(pool, 1 - share)}
    assert len(left) == len(freezer._trained()) and 0 < len(wanted) < len(left)
    assert set(freezer._choose(share)) == wanted
