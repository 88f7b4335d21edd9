"""Runs that go on with a longer total, or with some parameters new."""

import pytest
from tiny_run import Tiny, assert_same_state, losses, saved, steps_with

import main as program
from base.errors import UserError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return Tiny(tmp_path_factory.mktemp("tiny"))


CONSTANT = {"evals": "", "schedule__name": "constant"}


@pytest.fixture(scope="module")
def short(tiny):
    """A finished run of 4 steps at a constant learning rate."""
    tiny.train(tiny.folder / "short", total="4 steps", **CONSTANT)
    return tiny.folder / "short"


@pytest.fixture(scope="module")
def long(tiny):
    """The same, of 6 steps."""
    tiny.train(tiny.folder / "long", total="6 steps", **CONSTANT)
    return tiny.folder / "long"


def test_a_finished_run_that_is_prolonged_equals_one_of_that_length(tiny, short, long, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    tiny.train(elsewhere, total="6 steps", resume=short, **CONSTANT)
    assert steps_with(elsewhere, "loss") == [5, 6]
    tiny.train(short, total="6 steps", **CONSTANT)
    assert losses(short) == losses(long)
    for workdir in (short, elsewhere):
        assert_same_state(saved(workdir, 6), saved(long, 6))
    with pytest.raises(UserError, match="at step 6, beyond the 5 steps"):
        tiny.train(short, total="5 steps", **CONSTANT)


def test_a_cosine_over_a_new_total_needs_a_yes(tiny, tmp_path, capsys):
    flags = ("--config.checkpoint.every=", "--config.total=2 steps")
    assert tiny.main(tmp_path / "w", *flags) == program.DONE
    longer = (flags[0], "--config.total=4 steps")
    capsys.readouterr()
    assert tiny.main(tmp_path / "w", *longer) == program.MISTAKE
    err = capsys.readouterr().err
    assert "a cosine schedule over 2 steps; pass --config.stretch_schedule" in err
    assert err.count("\n") == 1
    assert tiny.main(tmp_path / "w", *longer, "--config.stretch_schedule") == program.DONE
    assert steps_with(tmp_path / "w", "loss") == [1, 2, 3, 4]


def test_a_resumed_run_may_have_new_parameters(tiny, long, tmp_path, capsys):
    """The text tower is wider: its parameters start anew, the image tower's go on."""
    wider = {"model__txt__mlp_dim": 48, "total": "7 steps", **CONSTANT}
    with pytest.raises(UserError, match="does not fit the model"):
        tiny.train(tmp_path / "w", resume=long, **wider)
    tiny.train(tmp_path / "w", resume=long, fresh="(txt/.*,)", lr=0.0001, **wider)
    assert steps_with(tmp_path / "w", "loss") == [7]
    with pytest.raises(UserError, match=r"config\.fresh says what of config\.resume"):
        tiny.train(tmp_path / "other", fresh="(txt/.*,)", **wider)
