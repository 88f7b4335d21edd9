"""Evaluations of moving averages: in a run, by --eval_only, and after a resume."""

import dataclasses

import numpy as np
import pytest
from tiny_run import Tiny, assert_same_state, results, saved

import main as program
from base.errors import UserError
from trainers.setup import make_evaluators, make_setup

AVERAGE = ("--config.average.what=img,txt,t,b", "--config.average.decay=0.5")
OF_AVERAGED = ("--config.evals.val.params=averaged", "--config.evals.val.every=")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return Tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def run(tiny):
    workdir = tiny.folder / "run"
    assert tiny.main(workdir, *AVERAGE, *OF_AVERAGED, evals="val") == program.DONE
    return workdir


def loss(workdir) -> float:
    return results(workdir)["val"]["loss"]["value"]


def test_averages_are_saved_and_differ_from_the_parameters(run):
    state = saved(run)
    names = [name.removeprefix("averaged/") for name in state if name.startswith("averaged/")]
    assert sorted(names) == sorted(
        name.removeprefix("params/") for name in state if name.startswith("params/")
    )
    different = [n for n in names if np.any(state[f"averaged/{n}"] != state[f"params/{n}"])]
    assert len(different) > len(names) / 2


def test_an_evaluator_of_averages_gives_other_numbers_and_eval_only_the_same(tiny, run, capsys):
    of_averages = loss(run)
    assert tiny.main(run, "--eval_only", *AVERAGE, *OF_AVERAGED, evals="val") == program.DONE
    assert loss(run) == pytest.approx(of_averages, rel=1e-6)
    assert "left out" not in capsys.readouterr().out
    params = ("--config.evals.val.params=params", "--config.evals.val.every=")
    assert tiny.main(run, "--eval_only", *AVERAGE, *params, evals="val") == program.DONE
    assert "also holds averaged (" in capsys.readouterr().out
    assert abs(loss(run) - of_averages) > 1e-4 * of_averages


def test_a_run_with_averages_goes_on_bit_for_bit(tiny, run):
    other = tiny.folder / "other"
    flags = (*AVERAGE, *OF_AVERAGED)
    assert tiny.main(other, *flags, "--config.total=12 steps", evals="val") == program.DONE
    for step in (8, 12):  # as if the run had been killed after step 4
        for folder in (other / "checkpoints").glob(str(step)):
            folder.rename(other / f"gone-{step}")
    assert tiny.main(other, *flags, evals="val") == program.DONE
    assert_same_state(saved(run), saved(other))


def test_averages_that_nobody_keeps_cannot_be_evaluated(tiny, tmp_path, capsys):
    assert tiny.main(tmp_path / "run", *OF_AVERAGED, evals="val") == program.MISTAKE
    message = capsys.readouterr().err
    assert "config.evals.val.params=averaged, but the run keeps no averages of a tower" in message
    assert tiny.main(tmp_path / "run", "--config.average.what=image") == program.MISTAKE
    assert "config.average: there are no parameters 'image'" in capsys.readouterr().err


def test_released_weights_have_no_averages_to_evaluate(tiny, run, tmp_path, capsys):
    flags = (*AVERAGE, *OF_AVERAGED, f"--config.init={run}")
    assert tiny.main(tmp_path / "new", "--eval_only", *flags, evals="val") == program.MISTAKE
    assert "params=averaged needs a run's own checkpoint" in capsys.readouterr().err


def test_the_loss_of_a_run_without_a_contrastive_objective_is_refused(tiny):
    setup = dataclasses.replace(make_setup(tiny.load(evals="val")), loss_fn=None)
    with pytest.raises(UserError, match=r"val\.type=loss measures the loss of a contrastive"):
        make_evaluators(setup)
