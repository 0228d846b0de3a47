"""Which losses are spikes, and which adapters do not learn."""

from __future__ import annotations

import random

import pytest
import torch

from qlora_train.names import TOKEN_ROWS
from qlora_train.train.watch import FEW_STEPS, LEAST, WINDOW, ZERO_STEPS, DeadAdapters, spike_limit

NAMES = ("a.q_proj.lora_A", "a.q_proj.lora_B", "b.q_proj.lora_A", "b.q_proj.lora_B")
START = torch.tensor([1.0, 0.0, 1.0, 0.0])
MOVED = torch.tensor([1.0, 0.1, 1.0, 0.1])


def test_too_few_steps_tell_nothing() -> None:
    assert spike_limit([1.0] * (LEAST - 1)) is None and spike_limit([1.0] * LEAST) is not None


def test_the_limit_follows_the_spread_and_not_the_spikes() -> None:
    """Robust: a few wild losses among the last steps do not hide the next one."""
    draw = random.Random(0)
    calm = [2 + draw.gauss(0, 0.1) for _ in range(WINDOW)]
    limit = spike_limit(calm)
    assert limit is not None and 2.4 < limit < 2.9, "six deviations of 0.1"
    wild = spike_limit([*calm[5:], *[50.0] * 5])
    assert wild is not None and wild == pytest.approx(limit, rel=0.1)


def test_noise_and_a_falling_loss_are_no_spikes() -> None:
    draw = random.Random(1)
    losses = [3 - step / 500 + draw.gauss(0, 0.3) for step in range(1000)]
    limits = ((loss, spike_limit(losses[max(0, i - WINDOW) : i])) for i, loss in enumerate(losses))
    assert not [loss for loss, limit in limits if limit is not None and loss > limit]


def test_layers_that_learn_are_not_spoken_of() -> None:
    dead = DeadAdapters(NAMES, START)
    for _ in range(10):
        assert dead.look(torch.ones(4), MOVED, 2.0, 1e-4) == []


def test_a_has_no_gradient_in_the_first_step() -> None:
    """B begins at zero, so that A's gradient is zero too."""
    dead = DeadAdapters(NAMES, START)
    assert dead.look(torch.tensor([0.0, 1.0, 0.0, 1.0]), MOVED, 1.4, 1e-4) == []
    assert dead.look(torch.ones(4), MOVED, 2.0, 1e-4) == []


def test_rows_of_tokens_wait_until_their_tokens_are_read() -> None:
    names = (*NAMES, f"model.embed_tokens.{TOKEN_ROWS}")
    start, moved = (torch.cat([norms, torch.ones(1)]) for norms in (START, MOVED))
    dead = DeadAdapters(names, start)
    for _ in range(FEW_STEPS + 1):
        assert dead.look(torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0]), moved, 2.0, 1e-4) == []


def test_a_resumed_run_has_no_first_steps() -> None:
    """Near the end of a schedule updates round to nothing."""
    for from_start in (True, False):
        dead = DeadAdapters(NAMES, START, from_start=from_start)
        told = [dead.look(torch.ones(4), START, 2.0, 1e-30) for _ in range(FEW_STEPS + 1)]
        assert any(told) == from_start
    assert any(dead.look(torch.zeros(4), START, 0.0, 1e-30) for _ in range(ZERO_STEPS)), "still told of gradients"


@pytest.mark.parametrize(("norms", "words"), [([1, 1, 0, 0], "1 of the 2"), ([0, 0, 0, 0], "any of the 2")])
def test_layers_that_no_gradient_reaches_are_named(norms: list[int], words: str) -> None:
    dead = DeadAdapters(NAMES, START)
    assert dead.look(torch.tensor(norms).float(), MOVED, 1.0, 1e-4) == []
    (text,) = dead.look(torch.tensor(norms).float(), MOVED, 1.0, 1e-4)
    assert f"no gradient reached {words} adapted layers" in text and "adapter.target_modules" in text
    assert f"first {'a' if not norms[0] else 'b'}.q_proj" in text


def test_layers_that_do_not_move_are_named_with_the_rate() -> None:
    dead = DeadAdapters(NAMES, START)
    half = torch.tensor([1.0, 0.1, 1.0, 0.0])
    texts = [dead.look(torch.ones(4), half, 2.0, 1e-30) for _ in range(FEW_STEPS)]
    assert texts[0] == [] and len(texts[1]) == 1
    assert "1 of the 2 adapted layers have gradients and did not move" in texts[1][0] and "1.0e-30" in texts[1][0]
    assert "first b.q_proj" in texts[1][0] and "raise train.learning_rate" in texts[1][0]


def test_gradients_of_zero_are_told_once_until_one_comes() -> None:
    dead = DeadAdapters(NAMES, START)

    def look(norm: float) -> list[str]:
        return dead.look(torch.full((4,), norm), MOVED, norm, 1e-4)

    assert [look(1.0) for _ in range(5)] == [[]] * 5
    told = [look(0.0) for _ in range(ZERO_STEPS + 3)]
    assert [bool(texts) for texts in told] == [step == ZERO_STEPS - 1 for step in range(ZERO_STEPS + 3)]
    assert "exactly zero for 3 steps" in told[ZERO_STEPS - 1][0]
    look(1.0)
    assert any(look(0.0) for _ in range(ZERO_STEPS))
