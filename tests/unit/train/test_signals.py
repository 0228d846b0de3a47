"""A signal ends the run at once, or waits for the loop; a second SIGINT insists; and the old handlers come back."""

from __future__ import annotations

import signal
import threading
from pathlib import Path

import pytest

from qlora_train.errors import Interrupted
from qlora_train.train.signals import SAVING, STOPPING, stop_requests

CAUGHT = (*STOPPING, SAVING)


def handlers() -> list[object]:
    return [signal.getsignal(one) for one in CAUGHT]


@pytest.mark.parametrize("number", STOPPING)
def test_outside_the_loop_a_signal_ends_the_run_at_once(number: signal.Signals) -> None:
    before = handlers()
    with pytest.raises(Interrupted, match="before the first step") as caught, stop_requests():
        signal.raise_signal(number)
        pytest.fail("it was ignored")
    assert caught.value.exit_code == 128 + number and handlers() == before


@pytest.mark.parametrize("number", STOPPING)
def test_in_the_loop_it_waits_and_then_says_what_was_saved(number: signal.Signals) -> None:
    before, done = handlers(), []
    with pytest.raises(Interrupted, match=r"saved ckpt/step-000003; go on with --resume"), stop_requests() as request:
        with request.waiting():
            assert not request.wants_checkpoint
            signal.raise_signal(number)
            assert request.wants_checkpoint and request.signal_number == number
            request.saved_in(Path("ckpt/step-000003"))
            done.append("the step")
        pytest.fail("it was ignored after the loop")
    assert done == ["the step"] and handlers() == before


def test_an_error_in_the_loop_is_not_hidden_by_a_signal() -> None:
    with pytest.raises(ValueError, match="ours"), stop_requests() as request, request.waiting():
        signal.raise_signal(signal.SIGTERM)
        raise ValueError("ours")


def test_items_come_until_the_request() -> None:
    seen = []
    with pytest.raises(Interrupted), stop_requests() as request, request.waiting():
        for item in request.until_stopped(range(9)):
            seen.append(item)
            if item == 2:
                signal.raise_signal(signal.SIGTERM)
    assert seen == [0, 1, 2]


def test_a_second_sigint_ends_at_once_in_the_loop_too() -> None:
    before = handlers()
    with pytest.raises(KeyboardInterrupt), stop_requests() as request, request.waiting():
        signal.raise_signal(signal.SIGINT)
        assert request.signal_number == signal.SIGINT
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the second SIGINT was ignored")
    assert handlers() == before


def test_other_repeats_wait_for_the_step() -> None:
    with pytest.raises(Interrupted), stop_requests() as request, request.waiting():
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
        assert request.signal_number == signal.SIGINT


def test_a_second_signal_does_not_disturb_what_cleans_up() -> None:
    cleaned = []
    with pytest.raises(Interrupted), stop_requests():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)
            cleaned.append("all")
    assert cleaned == ["all"]


def test_sigusr1_asks_for_a_checkpoint_and_nothing_else() -> None:
    with stop_requests() as request:
        signal.raise_signal(SAVING)
        assert request.wants_checkpoint and request.signal_number is None
        request.saved_in(Path("x"))
        assert not request.wants_checkpoint
        request.check()


def test_what_is_ignored_stays_ignored() -> None:
    """`nohup` starts a program with SIGHUP ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_requests() as request:
            signal.raise_signal(signal.SIGHUP)
            assert request.signal_number is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_outside_the_main_thread_nothing_is_caught() -> None:
    before = handlers()
    seen: list[object] = []

    def work() -> None:
        with stop_requests() as request:
            seen.extend([request.signal_number, handlers()])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [None, before]
