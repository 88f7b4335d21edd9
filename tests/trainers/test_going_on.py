"""Runs that go on: with a longer total, with a teacher and carried state, with something new."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import Tiny, assert_same_state, events, losses, saved, steps_with

import main as program
from base.errors import UserError
from siglip import objectives
from siglip.objectives.objective import Objective, Rows

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return Tiny(tmp_path_factory.mktemp("tiny"))


def logged(workdir, key):
    return [event[key] for event in events(workdir) if key in event]


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
    assert "2, for which this cosine schedule has other learning rates; pass --config." in err
    assert err.count("\n") == 1
    assert tiny.main(tmp_path / "w", *longer, "--config.stretch_schedule") == program.DONE
    assert steps_with(tmp_path / "w", "loss") == [1, 2, 3, 4]
    assert tiny.main(tmp_path / "of_four", *longer) == program.DONE
    rates, of_four = (logged(tmp_path / run, "lr") for run in ("w", "of_four"))
    assert rates[2:] == of_four[2:] and rates[:2] != of_four[:2]


def test_a_resumed_run_may_have_new_parameters(tiny, long, tmp_path, capsys):
    """The text tower is wider: its parameters start anew, the image tower's go on."""
    wider = {"model__txt__mlp_dim": 48, "total": "7 steps", **CONSTANT}
    with pytest.raises(UserError, match="does not fit the model"):
        tiny.train(tmp_path / "w", resume=long, **wider)
    tiny.train(tmp_path / "w", resume=long, fresh="(txt/.*,)", lr=0.0001, **wider)
    assert steps_with(tmp_path / "w", "loss") == [7]
    with pytest.raises(UserError, match=r"config\.fresh says what of config\.resume"):
        tiny.train(tmp_path / "other", fresh="(txt/.*,)", **wider)


def make_teacher(model, mesh) -> Objective:
    """A moving average of the image tower teaches noisy embeddings; the centre is carried."""
    width = model.img.width

    def rows(params, averaged, carried, part, key) -> Rows:
        def noise(row):
            return 0.1 * jax.random.normal(jax.random.fold_in(key, row), (width,))

        mask = part.batch["mask"][:, None]
        target = jax.nn.softmax(part.img(averaged)[0] - carried["centre"][None])
        student = jax.nn.log_softmax(
            part.img(params)[0] + jax.vmap(noise)(part.batch["row"]), axis=-1
        )
        return Rows(
            total=-jnp.sum(target * student, where=mask), stats=jnp.sum(target, axis=0, where=mask)
        )

    def carry(carried, stats, count):
        return {"centre": 0.5 * carried["centre"] + 0.5 * stats / count}

    return Objective(rows, start=lambda: {"centre": jnp.zeros(width)}, carry=carry)


TEACHER = {
    **CONSTANT,
    "objectives__teacher__name": "teacher",
    "average__what": "('img',)",
    "average__decay": "0.5",
    "input__microbatch": "8",
}


@pytest.fixture
def with_teacher(monkeypatch):
    monkeypatch.setitem(objectives.OBJECTIVES, "teacher", make_teacher)


def test_a_run_with_a_teacher_and_carried_state_goes_on_bit_for_bit(tiny, with_teacher, tmp_path):
    run, killed = tmp_path / "run", tmp_path / "killed"
    tiny.train(run, total="6 steps", **TEACHER)
    shutil.copytree(run, killed)
    shutil.rmtree(killed / "checkpoints" / "6")  # as if the power had failed after step 5
    tiny.train(killed, total="6 steps", **TEACHER)
    assert_same_state(saved(run, 6), saved(killed, 6))
    early, late = (saved(run, step)["carried/teacher/centre"] for step in (4, 6))
    assert np.all(early > 0) and np.any(early != late)
    assert "averaged/img/embedding/kernel" in saved(run, 6)


def test_a_resumed_run_may_begin_with_a_teacher(tiny, long, with_teacher, tmp_path):
    options = {**TEACHER, "resume": long, "total": "8 steps"}
    with pytest.raises(UserError, match="missing there: averaged/img") as error:
        tiny.train(tmp_path / "refused", **options)
    hint = """--config.fresh="('averaged/.*','carried/teacher.*',)\""""
    assert str(error.value).endswith(hint)
    tiny.train(tmp_path / "w", fresh="('averaged/.*','carried/teacher.*',)", **options)
    assert steps_with(tmp_path / "w", "loss") == [7, 8]
    assert "carried/teacher/centre" in saved(tmp_path / "w", 8)
