"""Learning-rate schedules with unit peak: step -> factor in [0, 1]. `step` counts past updates.

Every schedule is `fn(total_steps, to_steps, *, config keys) -> fn(step) -> f32 scalar`, where
`to_steps(text, key)` turns a duration into steps (durations.to_steps with the run's numbers).
The formulas are big_vision's (`create_learning_rate_schedule`).
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from base.errors import UserError

Step = ArrayLike  # whole numbers, of any shape
Schedule = Callable[[Step], Float[Array, "..."]]
ToSteps = Callable[[str, str], int | None]


def cosine(
    total_steps: int,
    to_steps: ToSteps,
    *,
    warmup: str = "0 steps",  # duration of the warm-up
) -> Schedule:
    """Linear warm-up from 0, then half a cosine to 0 at `total_steps`."""

    def decay(progress, steps):
        return 0.5 * (1 + jnp.cos(jnp.pi * progress))

    return _ramped(decay, total_steps, to_steps, warmup)


def linear(
    total_steps: int,
    to_steps: ToSteps,
    *,
    warmup: str = "0 steps",  # duration of the warm-up
    end: float = 0.0,  # factor of the peak at the end of the run
) -> Schedule:
    """Linear warm-up from 0, then a line to `end` (a share of the peak) at `total_steps`."""

    def decay(progress, steps):
        return end + (1 - end) * (1 - progress)

    return _ramped(decay, total_steps, to_steps, warmup)


def constant(
    total_steps: int,
    to_steps: ToSteps,
    *,
    warmup: str = "0 steps",  # duration of the warm-up
    cooldown: str = "0 steps",  # duration of the cool-down, at the end of the run
) -> Schedule:
    """Linear warm-up from 0, 1 in between, linear cool-down to 0 at `total_steps`."""

    def decay(progress, steps):
        return jnp.ones_like(progress)

    return _ramped(decay, total_steps, to_steps, warmup, cooldown)


def rsqrt(
    total_steps: int,
    to_steps: ToSteps,
    *,
    warmup: str = "0 steps",  # duration of the warm-up
    cooldown: str = "0 steps",  # duration of the cool-down, at the end of the run
    timescale: str = "10000 steps",  # duration after which the factor is 1 / sqrt(2)
) -> Schedule:
    """Linear warm-up, then 1 / sqrt(1 + steps after the warm-up / timescale), linear cool-down.

    The length of the run is not in the formula before the cool-down, so a run can be prolonged.
    """
    scale = to_steps(timescale, "schedule.timescale")
    if not scale:
        raise UserError(f"config.schedule.timescale = {timescale!r} must be at least one step")

    def decay(progress, steps):
        return 1 / jnp.sqrt(1 + jnp.maximum(steps, 0) / scale)

    return _ramped(decay, total_steps, to_steps, warmup, cooldown)


def _ramped(decay, total_steps, to_steps, warmup, cooldown="0 steps") -> Schedule:
    """The schedule that multiplies `decay` by a linear warm-up and a linear cool-down.

    decay(progress, steps) gets the progress after the warm-up, in [0, 1], and the steps after it.
    """
    up = to_steps(warmup, "schedule.warmup") or 0
    down = to_steps(cooldown, "schedule.cooldown") or 0
    # A run of 0 or 1 steps only checks the set-up, so ramps longer than it are no mistake.
    if total_steps > 1 and up + down >= total_steps:
        ramps = f"warmup = {warmup!r}" + (f" and cooldown = {cooldown!r}" if down else "")
        raise UserError(
            f"config.schedule: {ramps} take {up + down} steps, the whole run has {total_steps}; "
            "shorten them, or give them in percent"
        )

    def schedule(step: Step) -> Float[Array, "..."]:
        step = jnp.asarray(step, jnp.float32)
        progress = jnp.clip((step - up) / max(total_steps - up, 1), 0, 1)
        factor = decay(progress, step - up)
        if up:
            factor = factor * jnp.minimum(1, step / up)
        if down:
            factor = factor * jnp.clip((total_steps - step) / down, 0, 1)
        return factor

    return schedule


SCHEDULES = {"cosine": cosine, "constant": constant, "rsqrt": rsqrt, "linear": linear}
