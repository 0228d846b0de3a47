"""Seconds add up, and an inner stretch is not counted twice."""

from __future__ import annotations

import time

import pytest

from qlora_train.export.clock import Clock


def test_inner_stretches_are_taken_from_the_outer(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 3.0, 4.0, 6.0, 10.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    clock = Clock()
    with clock.of("write"):  # 0 to 10, of which 2 + 2 are others'
        with clock.of("read"):
            pass
        with clock.of("read"):
            pass
    assert clock.seconds == {"read": 4.0, "write": 6.0}


def test_a_stretch_that_fails_is_counted() -> None:
    clock = Clock()
    with pytest.raises(ValueError, match="x"), clock.of("read"):
        raise ValueError("x")
    assert clock.seconds["read"] >= 0
