"""Ctrl-C and SIGTERM end a run at the next step, all processes at the same one."""

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
    """Raised within StopRequest.at_once."""


class StopRequest:
    """While entered, the first Ctrl-C or SIGTERM only sets a flag; a second one is immediate.

    With several processes JAX's own notifier agrees on a step that all reach (a Python handler for
    SIGTERM would switch that notifier off, so there is none then).
    """

    def __enter__(self) -> "StopRequest":
        self._asked = self._at_once = False
        self._together = jax.process_count() > 1
        caught = [signal.SIGINT] if self._together else [signal.SIGINT, signal.SIGTERM]
        self._previous = {s: signal.signal(s, self._handle) for s in caught}
        # A request that came before, and got lost on its way: see main.interrupt.
        if any(getattr(handler, "asked", False) for handler in self._previous.values()):
            os.kill(os.getpid(), signal.SIGINT)
        return self

    def __exit__(self, *unused) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, frame) -> None:
        del frame
        for caught, handler in self._previous.items():
            signal.signal(caught, handler)  # the next one is not ours
        name = signal.Signals(signum).name
        print(f"\n{name}: saving and stopping (once more: stop at once)", file=sys.stderr)
        if self._together:
            os.kill(os.getpid(), signal.SIGTERM)  # JAX's notifier tells the other processes
        self._asked = True
        if self._at_once:
            raise StopNow

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Within, the first Ctrl-C or SIGTERM raises StopNow: for long work that changes nothing.

        Several processes finish that work: they could not agree on where to leave it.
        """
        self._at_once = not self._together
        try:
            if self._at_once and self._asked:
                raise StopNow
            yield
        finally:
            self._at_once = False

    def reached(self, step: int) -> bool:
        """Whether to stop now, after `step`; the same answer on every process. Call every step."""
        if self._together:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked
