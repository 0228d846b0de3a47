"""The counters that survive a restart."""

from __future__ import annotations

import json

import pytest

from qlora_train.errors import ResumeError
from qlora_train.train.state import TrainState


def test_the_counters_survive_a_round_trip() -> None:
    state = TrainState(7, 56, "a" * 64, 1000, 300, 12.5, best_step=4, best_eval_loss=1.25)
    assert TrainState.from_dict(json.loads(json.dumps(state.as_dict()))) == state
    assert TrainState.from_dict(TrainState().as_dict()) == TrainState()


def test_what_came_later_may_be_missing() -> None:
    data = TrainState(step=3).as_dict()
    del data["recent_losses"], data["evaluation_due"]
    assert TrainState.from_dict(data) == TrainState(step=3)


def test_a_step_is_counted() -> None:
    state = TrainState(step=2, num_rows=5, num_tokens=10, num_supervised_tokens=4, train_s=1.0)
    state.count(1, 2, 3, 0.5)
    assert state == TrainState(3, 6, "", 12, 7, 1.5)


def test_unknown_and_missing_counters_are_refused() -> None:
    data = TrainState().as_dict()
    with pytest.raises(ResumeError, match="epoch"):
        TrainState.from_dict({**data, "epoch": 1})
    del data["best_step"]
    with pytest.raises(ResumeError, match=r"expected .*best_step"):
        TrainState.from_dict(data)
