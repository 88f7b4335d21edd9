"""Blocks whose names the user chooses: objectives and evaluators."""

import pathlib

import pytest

from base.errors import UserError
from trainers.config import complete, stored

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


def test_none_drops_a_block_with_a_name_of_ones_own():
    config = complete.load(
        str(QUICKSTART),
        [
            ("evals.val", "None"),
            ("objectives.contrastive", "None"),
            ("objectives.second.name", "softmax"),
        ],
    )
    assert "val" not in config.evals
    assert list(config.objectives) == ["second"]


def test_what_is_dropped_need_not_be_valid_and_takes_earlier_flags_of_its_keys_along(tmp_path):
    command = [("evals.val.every", "5 steps"), ("evals.mine.type", "loss"), ("evals.val", "None")]
    evals = complete.load(str(QUICKSTART), [*command, ("evals.mine", "None")]).evals
    assert not {"val", "mine"} & set(evals)
    file = tmp_path / "gone.py"  # its component was there once
    file.write_text(
        "def get_config():\n"
        "    source = {'name': 'scenes'}\n"
        "    return {'evals': {'val': {'type': 'gone'}}, 'input': {'source': source}}\n"
    )
    assert not complete.load(str(file), [("evals.val", "None")]).evals
    with pytest.raises(UserError, match=r"config\.evals\.val.*'gone'"):
        complete.load(str(file), [])


def test_an_evaluator_of_a_run_can_be_dropped_later(tmp_path):
    stored.save(complete.load(str(QUICKSTART)), tmp_path)
    assert "val" in stored.read(tmp_path).evals
    config = stored.read(tmp_path, [("evals.val", "None")])
    assert "val" not in config.evals
    stored.check_workdir(config, tmp_path)  # raises nothing: the run may go on without it


def test_a_part_of_a_mixture_can_be_dropped_and_made_anew(tmp_path):
    file = tmp_path / "mixture.py"
    file.write_text(
        "def get_config():\n"
        "    parts = {name: {'name': 'scenes', 'weight': 3.0} for name in ('a', 'b')}\n"
        "    return {'input': {'source': {'name': 'mixture'}, 'mixture': parts}}\n"
    )
    assert list(complete.load(str(file), [("input.mixture.a", "None")]).input.mixture) == ["b"]
    anew = [("input.mixture.b", "None"), ("input.mixture.b.name", "scenes")]
    parts = complete.load(str(file), anew).input.mixture
    assert (parts.a.weight, parts.b.weight) == (3.0, 1.0)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("evals.vl", "None", "unknown key --config.evals.vl; the nearest: --config.evals.val"),
        ("evals.val", "", "is a block; set one of its keys: .*; None drops it"),
        ("model.img", "None", "is a block; set one of its keys: [^;]*$"),
        ("evals", "None", "is a block; set one of its keys: [^;]*$"),
    ],
)
def test_what_cannot_be_dropped_is_refused(key, value, message):
    with pytest.raises(UserError, match=message):
        complete.load(str(QUICKSTART), [(key, value)])
