"""Where the time of a run goes: speed, share of waiting, time to go."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping


class Clock:
    """Turns the moments that the loop reports into rates and an ETA.

    Args:
      total_steps: where the run ends. start_step: where this life of it began.
      batch_size: examples in a step, over all devices. num_devices: all devices.
      evals: name -> steps between two evaluations; None: only at the end (all run there).
      now: seconds of a clock that never jumps; tests pass their own.

    The loop calls `tick(step)` when the device is done with `step` (jax runs ahead, so only after
    it fetched a value). The first tick starts the measurement: call it after the very first step
    of a life, whose compilation is then in no rate. Evaluations are in no rate either.
    """

    def __init__(
        self,
        *,
        total_steps: int,
        batch_size: int,
        num_devices: int,
        start_step: int = 0,
        evals: Mapping[str, int | None] | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total_steps, self.step = total_steps, start_step
        self._batch_size, self._num_devices, self._now = batch_size, num_devices, now
        self._evals = dict(evals or {})
        self._evaluated = dict.fromkeys(self._evals, start_step)  # name -> last step
        self._eval_seconds: dict[str, float] = {}
        self._ticked: float | None = None  # the time of the last tick
        # Seconds since the last tick, for batches and in evaluations.
        self._waited = self._evaluating = 0.0
        self._interval: tuple[float, int, float] | None = None  # seconds, steps, waited
        self._seconds = self._steps = 0.0  # of all intervals

    def tick(self, step: int) -> None:
        now = self._now()
        if self._ticked is not None and step == self.step:
            return  # nothing was done; the time since counts for the next interval
        if self._ticked is not None:
            seconds = max(now - self._ticked - self._evaluating, 1e-9)
            self._interval = (seconds, step - self.step, self._waited)
            self._seconds += seconds
            self._steps += step - self.step
        self.step, self._ticked, self._waited, self._evaluating = step, now, 0.0, 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """A context that times the fetch of the next batch."""
        start = self._now()
        try:
            yield
        finally:
            self._waited += self._now() - start

    @contextlib.contextmanager
    def evaluating(self, name: str, step: int) -> Iterator[None]:
        """A context that times the evaluation `name` at `step`."""
        start = self._now()
        try:
            yield
        finally:
            seconds = self._now() - start
            self._evaluating += seconds
            # The latest duration predicts the next ones: only the first one has compiled.
            self._eval_seconds[name] = seconds
            self._evaluated[name] = step

    def rates(self) -> dict[str, float]:
        """Rates of the last interval between two ticks, without those that are not known yet.

        The names are examples_per_s, examples_per_s_per_device, data_wait (share of the time, in
        [0, 1]) and eta_s.
        """
        rates = {}
        if self._interval:
            seconds, steps, waited = self._interval
            rate = steps * self._batch_size / seconds
            rates["examples_per_s"] = rate
            rates["examples_per_s_per_device"] = rate / self._num_devices
            rates["data_wait"] = min(waited / seconds, 1.0)
        if (eta := self.eta()[0]) is not None:
            rates["eta_s"] = eta
        return rates

    def eta(self) -> tuple[float | None, bool]:
        """(seconds to the end, whether every part of them was measured).

        Training goes on at the mean speed of this life, and an evaluation takes as long as it last
        did. One that has not run yet counts nothing and makes the second value False.
        """
        if not self._steps:
            return None, False
        to_go = {name: self._remaining(name) for name in self._evals}
        seconds = (self.total_steps - self.step) * self._seconds / self._steps
        seconds += sum(n * self._eval_seconds.get(name, 0.0) for name, n in to_go.items())
        return seconds, all(name in self._eval_seconds for name, n in to_go.items() if n)

    def _remaining(self, name: str) -> int:
        """Number of evaluations to come: at multiples of the interval, and at the end.

        The one that is due at this very step counts until it has run.
        """
        every = self._evals[name] or max(self.total_steps, 1)
        done = max(self._evaluated[name], self.step - 1)
        multiples = (self.total_steps - 1) // every - min(done, self.total_steps - 1) // every
        return multiples + (done < self.total_steps)
