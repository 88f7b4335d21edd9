"""Schedules at the steps whose values are known: 0, end of the warm-up, middle, last, total."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from base.errors import UserError
from trainers.config import durations
from trainers.step.schedules import SCHEDULES

TOTAL = 110


def make(name, **keywords):
    def to_steps(text, key):
        return durations.to_steps(
            text, batch_size=8, examples_per_epoch=80, total_steps=TOTAL, key=key
        )

    return SCHEDULES[name](TOTAL, to_steps, **keywords)


# The middle of the decay from step 10 to 110 is step 60.
@pytest.mark.parametrize(
    ("name", "keywords", "values"),
    [
        ("cosine", {}, {60: 0.5, 109: 0.5 * (1 + np.cos(np.pi * 0.99)), 110: 0}),
        ("cosine", {}, {35: 0.5 * (1 + np.cos(np.pi / 4))}),
        ("linear", {}, {60: 0.5, 109: 0.01, 110: 0}),
        ("linear", {"end": 0.2}, {60: 0.6, 109: 0.208, 110: 0.2}),
        ("constant", {}, {60: 1, 109: 1, 110: 1}),
        ("constant", {"cooldown": "20 steps"}, {60: 1, 90: 1, 100: 0.5, 109: 0.05, 110: 0}),
        ("rsqrt", {"timescale": "50 steps"}, {60: 2**-0.5, 110: 3**-0.5}),
        ("rsqrt", {"timescale": "50 steps", "cooldown": "20 steps"}, {60: 2**-0.5, 110: 0}),
    ],
)
def test_known_values(name, keywords, values):
    schedule = make(name, warmup="10 steps", **keywords)
    for step, value in ({0: 0, 1: 0.1, 5: 0.5, 10: 1} | values).items():
        np.testing.assert_allclose(schedule(step), value, atol=1e-6, err_msg=f"step {step}")


@pytest.mark.parametrize("name", SCHEDULES)
def test_without_warmup_the_first_step_has_the_peak(name):
    assert float(make(name)(0)) == 1.0


def test_warmup_is_a_duration():
    for warmup in ("10 steps", "80 examples", "1 epoch"):
        assert float(make("cosine", warmup=warmup)(5)) == 0.5
    assert float(make("cosine", warmup="10 percent")(11)) == 1.0


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_traced_step_gives_the_same_f32(name):
    schedule = make(name, warmup="10 steps")
    traced = jax.jit(schedule)(jnp.int32(60))
    assert traced.dtype == jnp.float32 and traced.shape == ()
    np.testing.assert_allclose(traced, schedule(60), rtol=1e-6)


def test_a_warmup_as_long_as_the_run_is_refused():
    with pytest.raises(UserError, match="warmup = '110 steps' take 110 steps, the whole run has"):
        make("cosine", warmup="110 steps")
    with pytest.raises(UserError, match=r"config\.schedule: .* cooldown"):
        make("constant", warmup="60 steps", cooldown="50 steps")
    with pytest.raises(UserError, match=r"config\.schedule\.timescale"):
        make("rsqrt", timescale="0 steps")
    with pytest.raises(UserError, match=r"schedule\.warmup = '5 epoochs'"):
        make("linear", warmup="5 epoochs")
