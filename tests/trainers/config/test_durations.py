"""Durations: every unit, and every way to get one wrong."""

import functools

import pytest

from base.errors import UserError
from trainers.config import durations

to_steps = functools.partial(
    durations.to_steps, batch_size=100, examples_per_epoch=2000, total_steps=400
)


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("2000 steps", 2000),
        ("1 step", 1),
        ("0 steps", 0),
        ("2e3 steps", 2000),
        ("3e9 examples", 30_000_000),
        ("250 examples", 2),
        ("1 example", 1),  # not zero: it was asked for
        ("5 epochs", 100),
        ("1 epoch", 20),
        ("0.5 epochs", 10),
        ("10 percent", 40),
        ("100 percent", 400),
        ("0.01 percent", 1),
        ("0 percent", 0),
        ("  7   steps ", 7),
        ("", None),
    ],
)
def test_duration_in_steps(text, steps):
    assert to_steps(text) == steps


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("5 epoochs", "'epoochs' is not a unit"),
        ("five epochs", "'five' is not a number"),
        ("-1 steps", "'-1' is not a number >= 0"),
        ("nan steps", "'nan' is not a number"),
        ("inf examples", "'inf' is not a number"),
        ("2000", "is not a duration"),
        (2000, "is not a duration"),
        ("5 epochs or so", "is not a duration"),
        ("2.5 steps", "steps come whole"),
        ("101 percent", "more than 100 percent"),
        ("5 s", "'s' is not a unit"),
    ],
)
def test_a_wrong_duration_says_what_is_wrong_on_one_line(text, part):
    with pytest.raises(UserError) as error:
        to_steps(text, key="total")
    message = str(error.value)
    assert message.startswith(f"total = {text!r}")
    assert part in message
    assert "\n" not in message


def test_the_message_names_the_units():
    with pytest.raises(UserError, match="steps, examples, epochs, percent"):
        to_steps("5 epoochs")


def test_percent_needs_a_total_and_epochs_need_a_length():
    with pytest.raises(UserError, match="percent of what"):
        to_steps("10 percent", total_steps=None)
    with pytest.raises(UserError, match="no known length"):
        to_steps("10 epochs", examples_per_epoch=None)
