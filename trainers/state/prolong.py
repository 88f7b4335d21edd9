"""A run that goes on with another config.total than it was started with."""

import json
import pathlib
from typing import Any

import numpy as np

from base.errors import UserError
from trainers.config import durations
from trainers.config.stored import CONFIG_FILE
from trainers.data import without
from trainers.plan import Plan
from trainers.step.schedules import SCHEDULES


def check_total(
    config: Any, plan: Plan, run: pathlib.Path, step: int, *, may_shrink: bool = False
) -> None:
    """Compares config.total with that of the run whose checkpoint of `step` is gone on from.

    A constant or an inverse square root goes on as if the total had always been the new one: the
    steps made so far had the same learning rates. A schedule that is a function of the total, such
    as a cosine, would have had others: it needs config.stretch_schedule, and then continues at the
    new total's learning rates, which jump up at `step`.

    Args:
      run: workdir of that run.

    Raises:
      UserError: the total shrinks, or the learning rates of steps made so far would change.
    """
    try:
        old_text = json.loads((run / CONFIG_FILE).read_text())["total"]
    except (OSError, ValueError, KeyError):
        return  # a checkpoint without its config: nothing to compare with
    old = _steps(old_text, config, plan, "total", None)
    if not old or old == plan.total:
        return
    if plan.total < old and not may_shrink:
        raise UserError(
            f"config.total={config.total!r} is {plan.total} steps, but the run in {run} was "
            f"started with {old_text!r}, {old} steps; a total may grow, not shrink"
        )
    if not config.stretch_schedule and not np.array_equal(
        _schedule(config, plan, old)[:step], _schedule(config, plan, plan.total)[:step]
    ):
        raise UserError(
            f"config.total={config.total!r} is {plan.total} steps, but the run in {run} made its "
            f"{step} steps towards {old}, for which this {config.schedule.name} schedule has other "
            f"learning rates; pass --config.stretch_schedule to go on with those of {plan.total} "
            "steps"
        )


def _schedule(config: Any, plan: Plan, total: int) -> np.ndarray:
    """The factor of the learning rate at each step of a run of `total` steps."""

    def to_steps(text: str, key: str) -> int | None:
        return _steps(text, config, plan, key, total)

    schedule = SCHEDULES[config.schedule.name](total, to_steps, **without(config.schedule, "name"))
    return np.asarray(schedule(np.arange(total)))


def _steps(text: str, config: Any, plan: Plan, key: str, total: int | None) -> int | None:
    return durations.to_steps(
        text,
        batch_size=config.input.batch_size,
        examples_per_epoch=plan.epoch,
        total_steps=total,
        key=f"config.{key}",
    )
