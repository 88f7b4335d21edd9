"""A request to stop is not lost, whenever it comes."""

import os
import signal

import pytest

import main
from trainers.machine.preemption import StopRequest


@pytest.fixture
def handlers_of_main():
    previous = {s: signal.signal(s, main.interrupt) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    for signum, handler in previous.items():
        signal.signal(signum, handler)
    vars(main.interrupt).pop("asked", None)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_is_immediate(handlers_of_main, signum):
    with StopRequest() as stop:
        assert not stop.reached(1)
        os.kill(os.getpid(), signum)
        assert stop.reached(2)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signum)


def test_a_signal_whose_exception_was_dropped_before_the_loop_stops_its_first_step(
    handlers_of_main,
):
    with pytest.raises(KeyboardInterrupt):  # and suppose that a callback swallows it
        os.kill(os.getpid(), signal.SIGINT)
    with StopRequest() as stop:
        assert stop.reached(1)
