"""Which checkpoint wins, does it fit, weights only."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_state import DATA, abstract, assert_same, make_state, saved

from base.errors import UserError
from siglip.leaf_names import leaves
from trainers.state import restoring
from trainers.state.checkpointing import Checkpoints
from trainers.state.restoring import restore_params, restore_state
from trainers.state.start import Start, find_start


def test_which_checkpoint_wins(tmp_path):
    own, other, third = (tmp_path / name for name in ("own", "other", "third"))
    saved(other, 10, 20)
    saved(third, 5)
    assert find_start(own) == Start("scratch", None, None)
    assert find_start(own, "", "") == Start("scratch")
    init = Start("init", third / "checkpoints" / "5", 5)
    assert find_start(own, init=third) == init
    resume = Start("resume", other / "checkpoints" / "20", 20)
    assert find_start(own, other, third) == resume
    saved(own, 1)
    assert find_start(own, other, third) == Start("workdir", own / "checkpoints" / "1", 1)
    assert (
        find_start(own, "gone", "gone too").kind == "workdir"
    )  # settled before they are looked at


def test_a_path_may_be_a_workdir_its_checkpoints_or_one_step(tmp_path):
    directory = saved(tmp_path / "other", 10, 20)
    for path, step in ((tmp_path / "other", 20), (directory, 20), (directory / "10", 10)):
        assert find_start(tmp_path / "own", str(path)).path == directory / str(step)
        assert_same(restore_state(path, abstract())[0], make_state(step))


def test_a_path_without_a_checkpoint_says_so(tmp_path):
    with pytest.raises(UserError, match=r"config.resume = '.*/gone': no such directory"):
        find_start(tmp_path / "own", resume=str(tmp_path / "gone"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"config.resume = '.*/empty' holds no checkpoint"):
        find_start(tmp_path / "own", resume=str(tmp_path / "empty"))


def test_what_to_start_from_may_be_a_released_model(tmp_path):
    """initial.py reads it, and says what is wrong with it."""
    assert find_start(tmp_path, init="siglip-b16-224") == Start("init", "siglip-b16-224", None)


def test_resume_gives_the_whole_state_and_the_data_position(tmp_path):
    saved(tmp_path, 10)
    state, data, step = restore_state(tmp_path, abstract(8))
    assert_same(state, make_state(10))
    assert (data["step"], step) == (10, 10)


def test_params_alone_are_read_without_the_rest(tmp_path):
    directory = saved(tmp_path, 10)
    params, notes = restore_params(tmp_path, abstract(4).params)
    assert notes == ()
    assert_same(params, make_state(10).params)
    assert len(params["img"]["kernel"].sharding.device_set) == 4
    fresh, _ = restore_params(
        directory / "10", jax.eval_shape(make_state).params
    )  # no sharding given
    assert_same(fresh, params)


def error_of(act):
    with pytest.raises(UserError) as error:
        act()
    assert "\n" not in str(error.value) and "does not fit the model" in str(error.value)
    return str(error.value)


def test_arrays_that_do_not_fit_are_named(tmp_path):
    saved(tmp_path, 10)
    wanted = make_state(rows=32)
    wanted.params["img"]["bias"] = jnp.ones(3)
    del wanted.params["t"]
    message = error_of(lambda: restore_state(tmp_path, jax.eval_shape(lambda: wanted)))
    assert "1 missing there: params/img/bias float32[3]" in message
    assert "1 unknown to the model: params/t float32[1]" in message
    assert "params/img/kernel is float32[16, 64] there, float32[32, 64] in the model" in message
    assert "opt_state/0/inner_state/mu/img/kernel is bfloat16[16, 64] there" in message
    assert "3 of another shape or dtype" in message


def test_another_dtype_is_refused_not_cast(tmp_path):
    saved(tmp_path, 10)
    half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), abstract().params)
    message = error_of(lambda: restore_params(tmp_path, half))
    assert "2 of another shape or dtype" in message
    assert "params/t is float32[1] there, bfloat16[1] in the model" in message


def test_of_many_arrays_five_are_named_and_the_rest_counted(tmp_path):
    saved(tmp_path, 10)
    many = abstract().params | {f"new{i}": jax.ShapeDtypeStruct((1,), np.float32) for i in range(9)}
    message = error_of(lambda: restore_params(tmp_path, many))
    assert "9 missing there: params/new0 float32[1], " in message
    assert "params/new4 float32[1] and 4 more" in message and "new5" not in message


def test_a_misfit_is_not_damage(tmp_path):
    """Falling back to an older step would not help, and its files are fine."""
    directory = saved(tmp_path, 10, 20)
    checkpoints = Checkpoints(tmp_path, every=10, keep_last=2, keep_every=None)
    error_of(lambda: checkpoints.restore(jax.eval_shape(lambda: make_state(rows=32))))
    assert sorted(path.name for path in directory.iterdir()) == ["10", "20"]
    checkpoints.close()


def test_a_damaged_checkpoint_of_another_run_is_left_alone(tmp_path):
    directory = saved(tmp_path, 10, 20)
    for path in (directory / "20" / "state").rglob("manifest.ocdbt"):
        path.unlink()
    for act in (
        lambda: restore_state(tmp_path, abstract()),
        lambda: restore_params(tmp_path, abstract().params),
    ):
        with pytest.raises(UserError, match=r"20 cannot be read.*give the directory of another"):
            act()
    assert sorted(path.name for path in directory.iterdir()) == ["10", "20"]


# A checkpoint of a run that has more than this one, and leaves that start fresh


def with_more(value):
    """A state with a decoder among its parameters, and two further branches."""
    params = {**make_state(value).params, "decoder": {"kernel": jnp.full((2, 3), value)}}
    tx = optax.scale_by_adam()
    return {
        "step": jnp.int32(value),
        "params": params,
        "opt_state": tx.init(params),
        "averaged": {"img": params["img"]},
        "carried": {"centre": jnp.ones(4)},
    }


def save_tree(workdir, tree):
    checkpoints = Checkpoints(workdir, every=1, keep_last=1, keep_every=None)
    checkpoints.save(10, tree, DATA)
    checkpoints.close()
    return checkpoints.directory / "10"


def test_what_a_checkpoint_has_beyond_the_model_is_left_with_a_note(tmp_path):
    step = save_tree(tmp_path, with_more(10))
    params, notes = restore_params(tmp_path, abstract(4).params)
    assert_same(params, make_state(10).params)
    assert notes == (
        f"{step} also holds averaged (1 arrays), carried (1 arrays), params/decoder (1 arrays), "
        "which were left out",
    )
    message = error_of(
        lambda: restore_params(tmp_path, {**abstract().params, "head": abstract().params["t"]})
    )
    assert "1 missing there: params/head" in message and "decoder" not in message


def started_fresh(workdir, fresh, rows=16):
    """(restored state, the state that a new run would begin with), both on two devices."""
    wanted = abstract(2, jax.eval_shape(lambda: make_state(rows=rows)))

    def init():
        state = make_state(-1.0, rows=rows)
        return jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), state, wanted)

    return restore_state(workdir, wanted, fresh=fresh, init=init)[0], make_state(-1.0, rows=rows)


def test_named_parameters_and_their_optimizer_state_start_fresh(tmp_path):
    saved(tmp_path, 10)
    state, initial = started_fresh(tmp_path, ("img/.*",), rows=32)  # another shape
    assert_same(state.params["img"], initial.params["img"])
    assert_same(state.params["t"], make_state(10).params["t"])
    assert_same(state.opt_state, initial.opt_state)
    assert len(state.params["img"]["kernel"].sharding.device_set) == 2
    state, _ = started_fresh(tmp_path, ("t",))  # of the same shape: fresh too
    assert_same(state.params["img"], make_state(10).params["img"])


def test_what_starts_fresh_may_be_absent_there_or_here(tmp_path):
    other = make_state(10)
    other.params["img"]["extra"] = jnp.ones(3)
    del other.params["t"]
    save_tree(tmp_path, dataclasses.replace(other, opt_state=make_state().opt_state))
    state, initial = started_fresh(tmp_path, ("t", "img/.*"))
    assert_same(state.params, initial.params)
    with pytest.raises(UserError, match="unknown to the model: params/img/extra"):
        started_fresh(tmp_path, ("t",))
    with pytest.raises(UserError, match="missing there: params/t"):
        started_fresh(tmp_path, ("img/.*",))


def test_moving_averages_and_state_of_objectives_may_be_new_or_given_up(tmp_path):
    """As somebody does who adds config.average or a teacher to a run that had none."""
    plain, more = make_state(10), make_state(-1.0)
    more.averaged["img"], more.carried["teacher"] = more.params["img"], {"centre": jnp.ones(4)}
    save_tree(tmp_path / "plain", plain)
    save_tree(tmp_path / "more", more)
    wanted = abstract(2, jax.eval_shape(lambda: more))

    def restored(run, *fresh, wanted=wanted, initial=more):
        init = lambda: jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), initial, wanted)  # noqa: E731
        return restore_state(tmp_path / run, wanted, fresh=fresh, init=init)[0]

    state = restored("plain", "averaged/.*", "carried/teacher/.*")
    assert_same(state.params, plain.params)
    assert_same(state.averaged["img"], plain.params["img"])  # not those of the initial state
    assert_same(state.carried["teacher"], more.carried["teacher"])
    state = restored("more", "averaged/img/kernel", "carried/.*")
    assert_same(state.averaged["img"]["kernel"], state.params["img"]["kernel"])
    trained = make_state(10)
    trained.averaged["img"] = make_state(7).params["img"]
    trained.carried["teacher"] = {"centre": jnp.zeros(4)}
    save_tree(tmp_path / "trained", trained)
    state = restored("trained", "img/.*")  # a fresh parameter brings its average along
    assert_same(state.params["img"], more.params["img"])
    assert_same(state.averaged["img"], more.params["img"])
    assert_same(state.carried, trained.carried)
    with pytest.raises(UserError, match="missing there: carried/teacher/centre"):
        restored("plain", "averaged/.*")
    state = restored("more", "averaged/.*", "carried/.*", wanted=abstract(2), initial=plain)
    assert_same(state.params, more.params)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("img/kernl", "'img/kernl' matches no parameter, .*; the nearest: img/kernel"),
        ("img", "'img' matches no parameter"),
        ("carried/.*", "'carried/\\.\\*' matches no parameter, moving average or state of an obj"),
        ("(", "'\\(' is not a regex"),
    ],
)
def test_a_pattern_of_fresh_parameters_that_matches_none_is_one_line(tmp_path, pattern, message):
    saved(tmp_path, 10)
    with pytest.raises(UserError, match=f"^config.fresh: {message}") as error:
        started_fresh(tmp_path, (pattern,))
    assert "\n" not in str(error.value)


def test_no_pattern_makes_the_number_of_steps_fresh():
    wanted = jax.eval_shape(make_state)
    is_fresh = restoring._is_fresh((".*",), wanted, leaves(wanted))
    fresh = {name: is_fresh(name) for name in leaves(wanted)}
    assert [name for name, yes in fresh.items() if not yes and "count" not in name] == ["step"]
    assert sum("count" in name for name, yes in fresh.items() if not yes) == 1
