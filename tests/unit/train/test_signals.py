"""A signal asks for a stop, a second SIGINT insists, and the old handlers come back."""

from __future__ import annotations

import signal
import threading

import pytest

from qlora_train.train.signals import stop_requests

CAUGHT = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.mark.parametrize("number", CAUGHT)
def test_a_signal_sets_its_number_and_nothing_else(number: signal.Signals) -> None:
    before = [signal.getsignal(one) for one in CAUGHT]
    with stop_requests() as request:
        assert request.signal_number is None
        signal.raise_signal(number)
        assert request.signal_number == number
    assert [signal.getsignal(one) for one in CAUGHT] == before


def test_a_second_sigint_ends_at_once_and_restores_the_handlers() -> None:
    before = [signal.getsignal(one) for one in CAUGHT]
    with pytest.raises(KeyboardInterrupt), stop_requests() as request:
        signal.raise_signal(signal.SIGINT)
        assert request.signal_number == signal.SIGINT
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the second SIGINT was ignored")
    assert [signal.getsignal(one) for one in CAUGHT] == before


def test_other_repeats_wait_for_the_step() -> None:
    with stop_requests() as request:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert request.signal_number == signal.SIGINT


def test_outside_the_main_thread_nothing_is_caught() -> None:
    before = [signal.getsignal(one) for one in CAUGHT]
    seen: list[object] = []

    def work() -> None:
        with stop_requests() as request:
            seen.extend([request.signal_number, [signal.getsignal(one) for one in CAUGHT]])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [None, before]
