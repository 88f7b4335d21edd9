"""Stops a run after Ctrl-C or SIGTERM at the next step, all processes at the same one."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils


class Interrupted(Exception):
    """The run was asked to stop, and has saved its state: the same command continues it."""


class StopNow(KeyboardInterrupt):
    """The run was asked to stop within StopRequest.at_once."""


class StopRequest:
    """While entered, the first Ctrl-C or SIGTERM only sets a flag; a second one is immediate.

    With several processes JAX's own notifier agrees on a step that all reach (a Python handler for
    SIGTERM would switch that notifier off, so there is none then).
    """

    def __enter__(self) -> "StopRequest":
        self._stop_requested = self._at_once = False
        self._several_processes = jax.process_count() > 1
        caught = [signal.SIGINT] if self._several_processes else [signal.SIGINT, signal.SIGTERM]
        self._previous = {s: signal.signal(s, self._handle) for s in caught}
        # A signal from before, whose exception Python dropped: see main.interrupt.
        if any(getattr(handler, "asked", False) for handler in self._previous.values()):
            os.kill(os.getpid(), signal.SIGINT)
        return self

    def __exit__(self, *unused) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, frame) -> None:
        del frame
        for caught, handler in self._previous.items():
            signal.signal(caught, handler)  # the second signal has its usual effect
        name = signal.Signals(signum).name
        print(f"\n{name}: saving and stopping (once more: stop at once)", file=sys.stderr)
        if self._several_processes:
            os.kill(os.getpid(), signal.SIGTERM)  # JAX's notifier tells the other processes
        self._stop_requested = True
        if self._at_once:
            raise StopNow

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """A context in which the first signal raises StopNow, for long work that changes nothing.

        Several processes finish that work, as they could not agree on where to leave it.
        """
        self._at_once = not self._several_processes
        try:
            if self._at_once and self._stop_requested:
                raise StopNow
            yield
        finally:
            self._at_once = False

    def reached(self, step: int) -> bool:
        """Whether to stop now, after `step`; the same answer on every process. Call every step."""
        if self._several_processes:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._stop_requested
