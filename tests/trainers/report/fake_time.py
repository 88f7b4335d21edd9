"""A clock whose time the test moves."""

from trainers.report.clock import Clock


class Time:
    """Seconds that pass only when told to."""

    def __init__(self):
        self.seconds = 1000.0

    def __call__(self):
        return self.seconds

    def passes(self, seconds):
        self.seconds += seconds


def make_clock(time, *, total_steps=100, start_step=0, evals=None):
    return Clock(
        total_steps=total_steps,
        batch_size=32,
        num_devices=4,
        start_step=start_step,
        evals=evals,
        now=time,
    )


def train(clock, time, steps, seconds=0.5, wait=0.0):
    """Steps of so many seconds, of which `wait` for data, then a tick."""
    for _ in range(steps):
        with clock.waiting():
            time.passes(wait)
        time.passes(seconds - wait)
    clock.tick(clock.step + steps)


def evaluate(clock, time, name, seconds):
    with clock.evaluating(name, clock.step):
        time.passes(seconds)
