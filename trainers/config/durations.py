"""Durations as people say them, '5 epochs', to the steps that the program counts in."""

import math

from base.errors import UserError

UNITS = ("steps", "examples", "epochs", "percent")
_WANTED = "write '<number> <unit>' with one of the units " + ", ".join(UNITS)


def to_steps(
    text: str,
    *,
    batch_size: int,
    examples_per_epoch: int | None,
    total_steps: int | None = None,
    key: str = "duration",
) -> int | None:
    """Steps that `text` stands for; None for '' (never).

    Args:
      text: '2000 steps', '3e9 examples', '5 epochs', '10 percent'; '1 epoch' is accepted too.
      batch_size: examples in a step, over all devices.
      examples_per_epoch: examples in one pass over the data; None where the source is endless.
      total_steps: length of the run, what '100 percent' means; None while it is not known.
      key: name of the setting, for the message.

    A part of a step is rounded to the nearest whole, but what is not zero is at least one step
    (as in big_vision). Raises UserError for anything else than a number and a unit.
    """
    if text == "":
        return None
    words = text.split() if isinstance(text, str) else []
    if len(words) != 2:
        raise UserError(f"{key} = {text!r} is not a duration; {_WANTED}")
    number, unit = _number(words[0]), _unit(words[1])
    if number is None:
        raise UserError(f"{key} = {text!r}: {words[0]!r} is not a number >= 0; {_WANTED}")
    if unit is None:
        raise UserError(f"{key} = {text!r}: {words[1]!r} is not a unit; {_WANTED}")
    if unit == "steps":
        if number != int(number):
            raise UserError(f"{key} = {text!r}: steps come whole; write '{round(number)} steps'")
        return int(number)
    if unit == "examples":
        return _whole(number / batch_size)
    if unit == "epochs":
        if not examples_per_epoch:
            raise UserError(
                f"{key} = {text!r}: this data has no known length, so no epochs; "
                "use steps or examples"
            )
        return _whole(number * examples_per_epoch / batch_size)
    if number > 100:
        raise UserError(f"{key} = {text!r}: more than 100 percent of the run")
    if total_steps is None:
        raise UserError(
            f"{key} = {text!r}: percent of what? The run's length itself is given in "
            "steps, examples or epochs"
        )
    return _whole(number / 100 * total_steps)


def _number(word: str) -> float | None:
    try:
        number = float(word)
    except ValueError:
        return None
    return number if math.isfinite(number) and number >= 0 else None


def _unit(word: str) -> str | None:
    return next((unit for unit in UNITS if word in (unit, unit.removesuffix("s"))), None)


def _whole(steps: float) -> int:
    return max(1, round(steps)) if steps else 0
