"""The clock of a run: rates, what is in no rate, and the time to go."""

import pytest
from fake_time import Time, evaluate, make_clock, train


@pytest.fixture
def time():
    return Time()


def test_rates_without_the_compilation_of_the_first_step(time):
    clock = make_clock(time)
    train(clock, time, 1, seconds=60)  # compiles
    assert clock.rates() == {} and clock.eta() == (None, False)
    train(clock, time, 10, wait=0.2)
    assert clock.rates() == pytest.approx(
        {
            "examples_per_s": 64,
            "examples_per_s_per_device": 16,
            "data_wait": 0.4,
            "eta_s": (100 - 11) * 0.5,
        }
    )


def test_rates_are_of_the_last_interval_and_the_eta_of_the_whole_life(time):
    clock = make_clock(time)
    train(clock, time, 1)
    train(clock, time, 10, seconds=2.0, wait=1.0)
    train(clock, time, 10, seconds=1.0)
    assert clock.rates()["examples_per_s"] == pytest.approx(32)
    assert clock.rates()["data_wait"] == 0
    assert clock.eta()[0] == pytest.approx((100 - 21) * 1.5)


def test_evaluations_are_in_no_rate(time):
    clock = make_clock(time, evals={"retrieval": 10})
    train(clock, time, 1)
    train(clock, time, 9)
    evaluate(clock, time, "retrieval", 30)
    train(clock, time, 10)
    assert clock.rates()["examples_per_s"] == pytest.approx(64)


def test_a_second_tick_of_a_step_changes_nothing(time):
    clock = make_clock(time)
    train(clock, time, 1)
    train(clock, time, 10)
    rates = clock.rates()
    time.passes(1.0)
    clock.tick(clock.step)
    assert clock.rates() == rates
    train(clock, time, 10)
    assert clock.rates()["examples_per_s"] == pytest.approx(320 / 6)  # that second is not lost


@pytest.mark.parametrize(
    ("every", "total_steps", "step", "remaining"),
    [
        (10, 100, 0, 10),  # 10, 20, ..., 100
        (10, 100, 5, 10),
        (10, 100, 10, 10),  # that of step 10 is to come
        (10, 100, 11, 9),
        (30, 100, 50, 3),  # 60, 90, and the end
        (None, 100, 50, 1),
        (1000, 100, 50, 1),
        (10, 100, 100, 1),
        (None, 100, 100, 1),
    ],
)
def test_evaluations_to_come_by_counting(time, every, total_steps, step, remaining):
    clock = make_clock(time, total_steps=total_steps, evals={"a": every})
    clock.tick(step)
    due = {s for s in range(1, total_steps) if every and s % every == 0} | {total_steps}
    assert clock._remaining("a") == sum(s >= step for s in due) == remaining
    if step in due:
        evaluate(clock, time, "a", 1)
        assert clock._remaining("a") == remaining - 1


def test_the_eta_has_the_remaining_evaluations_at_their_measured_time(time):
    clock = make_clock(time, evals={"often": 20, "end": None})
    train(clock, time, 1)
    train(clock, time, 19)
    assert clock.eta() == (pytest.approx(40), False)  # nothing known of the evaluations
    evaluate(clock, time, "often", 50)  # compiles
    assert clock.eta() == (pytest.approx(40 + 4 * 50), False)
    train(clock, time, 20)
    evaluate(clock, time, "often", 10)
    assert clock.eta() == (pytest.approx(30 + 3 * 10), False)
    train(clock, time, 60)
    assert clock.eta() == (pytest.approx(10), False)
    evaluate(clock, time, "often", 10)
    assert clock.eta() == (0, False)
    evaluate(clock, time, "end", 7)
    assert clock.eta() == (0, True)


def test_an_eta_with_everything_measured_is_complete(time):
    clock = make_clock(time, evals={"often": 20})
    train(clock, time, 20)
    evaluate(clock, time, "often", 10)
    train(clock, time, 10)
    assert clock.eta() == (pytest.approx(35 + 4 * 10), True)


def test_a_resumed_life_measures_itself(time):
    clock = make_clock(time, start_step=40, evals={"often": 20})
    train(clock, time, 1, seconds=60)
    train(clock, time, 9)
    assert clock.eta() == (pytest.approx(25), False)
    evaluate(clock, time, "often", 10)  # out of turn: it still has its time
    assert clock.eta() == (pytest.approx(25 + 3 * 10), True)


def test_a_failed_evaluation_still_took_its_time(time):
    clock = make_clock(time, evals={"a": 10})
    train(clock, time, 1)
    with pytest.raises(KeyError), clock.evaluating("a", 1):
        time.passes(30)
        raise KeyError
    train(clock, time, 9)
    assert clock.rates()["examples_per_s"] == pytest.approx(64)
