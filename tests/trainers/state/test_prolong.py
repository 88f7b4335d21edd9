"""Whether a run may go on with another total: the learning rates of its steps decide."""

import json

import pytest
from ml_collections import ConfigDict

from base.errors import UserError
from trainers.plan import Plan
from trainers.state.prolong import check_total

EPOCH, BATCH = 160, 16


def check(workdir, old, new, *, step, stretch=False, may_shrink=False, **schedule):
    """check_total for a run of `old` steps that has made `step`, with `new` steps."""
    (workdir / "config.json").write_text(json.dumps({"total": old}))
    config = ConfigDict(
        {
            "total": f"{new} steps",
            "stretch_schedule": stretch,
            "schedule": schedule,
            "input": {"batch_size": BATCH},
        }
    )
    plan = Plan(EPOCH, 0, new, None, None, {})
    check_total(config, plan, workdir, step, may_shrink=may_shrink)


@pytest.mark.parametrize("name", ["constant", "rsqrt"])
@pytest.mark.parametrize("step", [0, 1, 40, 80])
def test_a_schedule_without_the_total_in_it_goes_on(tmp_path, name, step):
    check(tmp_path, "8 epochs", 1000, step=step, name=name, warmup="5 steps")


@pytest.mark.parametrize(
    "schedule",
    [
        {"name": "cosine"},
        {"name": "linear"},
        {"name": "constant", "warmup": "10 percent"},
        {"name": "constant", "cooldown": "50 steps"},
        {"name": "rsqrt", "cooldown": "50 percent"},
    ],
)
def test_steps_that_would_have_had_another_learning_rate_need_a_yes(tmp_path, schedule):
    with pytest.raises(
        UserError, match=r"has other learning rates; pass --config.stretch_schedule to go"
    ) as error:
        check(tmp_path, "8 epochs", 100, step=80, **schedule)
    assert "\n" not in str(error.value)
    check(tmp_path, "8 epochs", 100, step=80, stretch=True, **schedule)


def test_a_run_goes_on_before_its_cool_down_began(tmp_path):
    check(tmp_path, "80 steps", 100, step=60, name="rsqrt", cooldown="20 steps")
    with pytest.raises(UserError, match="stretch_schedule"):
        check(tmp_path, "80 steps", 100, step=62, name="rsqrt", cooldown="20 steps")


def test_a_total_may_not_shrink_in_its_workdir(tmp_path):
    with pytest.raises(UserError, match="may grow, not shrink"):
        check(tmp_path, "80 steps", 70, step=10, name="constant", stretch=True)
    check(tmp_path, "80 steps", 70, step=10, name="constant", may_shrink=True)
    with pytest.raises(UserError, match="stretch_schedule"):
        check(tmp_path, "80 steps", 70, step=10, name="cosine", may_shrink=True)


def test_the_same_length_in_other_words_is_no_change(tmp_path):
    check(tmp_path, "8 epochs", 80, step=80, name="cosine")
