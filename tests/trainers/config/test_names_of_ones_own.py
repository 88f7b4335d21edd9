"""Blocks whose names the user chooses: objectives and evaluators."""

import pathlib

import pytest

from base.errors import UserError
from trainers.config import complete

QUICKSTART = pathlib.Path(complete.__file__).parents[2] / "configs" / "quickstart.py"


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("loss.name", "it is --config.objectives.contrastive.name now"),
        ("loss", "it is --config.objectives.contrastive now"),
    ],
)
def test_a_key_that_has_moved_is_refused_with_its_new_name(key, message):
    with pytest.raises(UserError, match=f"unknown key --config.{key}; {message}"):
        complete.load(str(QUICKSTART), [(key, "softmax")])


def test_an_override_can_add_an_objective_or_an_evaluator():
    flags = [
        ("objectives.second.weight", "0.5"),
        ("objectives.second.name", "softmax"),
        ("evals.more.type", "loss"),
        ("evals.more.source.name", "scenes"),
    ]
    config = complete.load(str(QUICKSTART), flags)
    assert config.objectives.contrastive.name == "sigmoid"
    assert (config.objectives.second.name, config.objectives.second.weight) == ("softmax", 0.5)
    assert config.evals.more.type == "loss" and "val" in config.evals
    with pytest.raises(UserError, match="'softmx' is unknown; the nearest: softmax"):
        complete.load(str(QUICKSTART), [("objectives.second.name", "softmx")])


def test_a_key_of_a_name_that_is_not_there_says_how_to_add_it():
    with pytest.raises(UserError, match=r"add 'color' by --config\.objectives\.color\.name="):
        complete.load(str(QUICKSTART), [("objectives.color.weight", "0.5")])
