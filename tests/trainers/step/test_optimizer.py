"""The chain against optax, numpy and its own formula."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from base.errors import UserError
from trainers.step import optimizer

ALL = ((".*", 1.0),)
NONE = ((".*", 0.0),)


def make_config(**changes):
    config = {
        "lr": 1e-2,
        "wd": 1e-3,
        "wd_mults": ((".*/kernel", 1.0), ("else", 0.0)),
        "lr_mults": ALL,
        "frozen": ((".*", False),),
        "clip_norm": None,
        "optimizer": {"name": "adamw"},
        "schedule": {"name": "constant"},
    }
    return ConfigDict(config | changes)


def make_params(seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return {
        "img": {"Dense_0": {"kernel": normal(64, 40), "bias": normal(40)}},
        "txt": {"Dense_0": {"kernel": normal(4, 40), "bias": normal(40)}},
        "t": normal(1),
    }


def make_tx(config, params, total_steps=100):
    return optimizer.make_tx(
        config, params, total_steps=total_steps, batch_size=8, examples_per_epoch=80
    )


def run(tx, steps=5, params=None):
    """Parameters after some steps; the gradients differ from step to step."""
    params = make_params() if params is None else params
    state = tx.init(params)
    for step in range(steps):
        updates, state = tx.update(make_params(step + 1), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def assert_equal_trees(a, b, rtol=2e-6, atol=1e-7):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


def kernels_only(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def test_adamw_is_optax_adamw_with_decay_divided_by_lr():
    tx, _ = make_tx(make_config(), make_params())
    peer = optax.adamw(1e-2, b2=0.95, weight_decay=1e-3 / 1e-2, mask=kernels_only)
    assert_equal_trees(run(tx)[0], run(peer)[0])


def test_lion_is_optax_lion_with_decay_divided_by_lr():
    tx, _ = make_tx(make_config(optimizer={"name": "lion"}), make_params())
    peer = optax.lion(1e-2, weight_decay=1e-3 / 1e-2, mask=kernels_only)
    assert_equal_trees(run(tx)[0], run(peer)[0])


def test_clipping_comes_first_and_takes_the_norm_over_all_parameters():
    tx, _ = make_tx(make_config(clip_norm=0.5), make_params())
    peer = optax.chain(
        optax.clip_by_global_norm(0.5),
        optax.adamw(1e-2, b2=0.95, weight_decay=1e-3 / 1e-2, mask=kernels_only),
    )
    assert_equal_trees(run(tx)[0], run(peer)[0])


def test_decay_follows_the_schedule_and_neither_lr_nor_the_lr_multipliers():
    config = make_config(
        lr_mults=(("img/.*", 0.1), ("else", 1.0)), schedule={"name": "linear", "warmup": "4 steps"}
    )
    params = make_params()
    tx, _ = make_tx(config, params)
    state = tx.init(params)
    zero = jax.tree.map(jnp.zeros_like, params)
    for factor in (0, 0.25, 0.5, 0.75, 1.0):
        updates, state = tx.update(zero, state, params)  # Adam's direction of 0 is 0
        for tower in ("img", "txt"):
            kernel = params[tower]["Dense_0"]["kernel"]
            np.testing.assert_allclose(
                updates[tower]["Dense_0"]["kernel"], -factor * 1e-3 * kernel, rtol=1e-6
            )
            assert not np.any(updates[tower]["Dense_0"]["bias"])
        assert not np.any(updates["t"])


def test_lr_multipliers_scale_the_direction():
    tx, _ = make_tx(
        make_config(wd=0.0, lr_mults=(("img/.*", 0.1), ("else", 1.0)), optimizer={"name": "lion"}),
        make_params(),
    )
    updates, _ = tx.update(make_params(1), tx.init(make_params()), make_params())
    np.testing.assert_allclose(np.abs(updates["img"]["Dense_0"]["kernel"]), 1e-3, rtol=1e-6)
    np.testing.assert_allclose(np.abs(updates["txt"]["Dense_0"]["kernel"]), 1e-2, rtol=1e-6)


def bf16(x):
    return np.asarray(np.asarray(x).astype(jnp.bfloat16), np.float64)


def numpy_adafactor(grads, b1=0.9, cap=0.95, rate=0.8, min_dim=32):
    """The last direction of a list of gradients, in float64 but for the bf16 momentum, which
    optax.ema multiplies in bf16 (so does big_vision: its 0.9 is 0.8984)."""
    shape = grads[0].shape
    factored = len(shape) == 2 and min(shape) >= min_dim
    rows, columns, full, momentum = 0.0, 0.0, 0.0, np.zeros(shape)
    for step, grad in enumerate(grads):
        beta = min(cap, 1 - (step + 1.0) ** -rate)
        square = grad.astype(np.float64) ** 2 + 1e-30
        if factored:
            rows = beta * rows + (1 - beta) * square.mean(axis=1)
            columns = beta * columns + (1 - beta) * square.mean(axis=0)
            scaled = grad / np.sqrt(np.outer(rows, columns) / rows.mean())
        else:
            full = beta * full + (1 - beta) * square
            scaled = grad / np.sqrt(full)
        direction = bf16(bf16(b1) * momentum) + (1 - b1) * scaled
        momentum = bf16(direction)
    return direction


# The cap bites where 1 - (step + 1)^-0.8 passes it: 0.5 from step 2, the default 0.95 from step 42.
@pytest.mark.parametrize(
    ("options", "cap", "steps"), [({"beta2_cap": 0.5}, 0.5, 6), ({}, 0.95, 60)]
)
def test_adafactor_is_its_numpy_definition(options, cap, steps):
    config = make_config(lr=1.0, wd=0.0, optimizer={"name": "adafactor"} | options)
    params = make_params()
    tx, _ = make_tx(config, params)
    state, grads = tx.init(params), [make_params(seed) for seed in range(1, steps + 1)]
    for grad in grads:
        updates, state = tx.update(grad, state, params)
    flat = [jax.tree.leaves(grad) for grad in grads]
    for i, update in enumerate(jax.tree.leaves(updates)):
        expected = numpy_adafactor([np.asarray(grad[i]) for grad in flat], cap=cap)
        # A momentum on the border of two bf16 values may be rounded the other way: 2^-8 of it.
        error = np.abs(-update - expected)
        assert np.mean(error > 2e-6) < 0.03
        assert np.all(error <= 2e-6 + 2**-7 * np.abs(expected).max())


def test_adafactor_factors_from_32_and_holds_its_momentum_in_bf16():
    tx, _ = make_tx(make_config(optimizer={"name": "adafactor"}), make_params())
    leaves = jax.tree_util.tree_leaves_with_path(jax.eval_shape(tx.init, make_params()))
    sizes = {jax.tree_util.keystr(path): leaf for path, leaf in leaves}

    def kernel(part, tower):
        keys = [key for key in sizes if f".{part}['{tower}']['Dense_0']['kernel']" in key]
        return sizes[keys[0]]

    assert (kernel("v_row", "img").size, kernel("v_col", "img").size) in [(64, 40), (40, 64)]
    assert kernel("v", "img").shape == (1,)
    assert kernel("v", "txt").shape == (4, 40)  # 4 < 32: not factored
    assert kernel("ema", "img").dtype == jnp.bfloat16


def test_frozen_parameters_have_no_update_no_decay_no_state_and_no_part_in_the_norm():
    params = make_params()
    config = make_config(clip_norm=0.5, frozen=(("img/.*", True), ("else", False)))
    tx, _ = make_tx(config, params)
    after, state = run(tx)
    jax.tree.map(np.testing.assert_array_equal, after["img"], params["img"])
    shapes = {leaf.shape for leaf in jax.tree.leaves(state)}
    assert (64, 40) not in shapes and (4, 40) in shapes

    rest = {key: value for key, value in params.items() if key != "img"}
    alone, _ = make_tx(make_config(clip_norm=0.5), rest)
    state = alone.init(rest)
    for step in range(5):
        grads = {key: value for key, value in make_params(step + 1).items() if key != "img"}
        updates, state = alone.update(grads, state, rest)
        rest = optax.apply_updates(rest, updates)
    assert_equal_trees({key: after[key] for key in rest}, rest, rtol=0, atol=0)


def test_frozen_mask_has_the_tree_of_the_parameters():
    config = make_config(frozen=(("img/.*", True), ("else", False)))
    mask = optimizer.frozen_mask(config, jax.eval_shape(make_params))
    assert mask["img"]["Dense_0"] == {"kernel": True, "bias": True} and mask["t"] is False
    assert jax.tree.structure(mask) == jax.tree.structure(make_params())


def test_the_learning_rate_by_step_is_lr_times_the_schedule():
    config = make_config(schedule={"name": "cosine", "warmup": "10 percent"})
    _, lr = make_tx(config, make_params())
    np.testing.assert_allclose([lr(0), lr(10), lr(55), lr(100)], [0, 1e-2, 5e-3, 0], atol=1e-9)


@pytest.mark.parametrize("name", optimizer.OPTIMIZERS)
def test_the_state_shards_like_the_parameters_and_is_donated(name):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def spec(x):  # rows over the devices where they divide
        rows = x.ndim and x.shape[0] % 8 == 0
        return NamedSharding(mesh, PartitionSpec("data") if rows else PartitionSpec())

    config = make_config(optimizer={"name": name}, clip_norm=1.0)
    params = make_params()
    tx, _ = make_tx(config, jax.eval_shape(make_params))

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    shardings = jax.tree.map(spec, jax.eval_shape(tx.init, params))
    sharded = jax.device_put(params, jax.tree.map(spec, params))
    state = jax.jit(tx.init, out_shardings=shardings)(sharded)
    update = jax.jit(
        step, donate_argnums=(0, 1), out_shardings=(jax.tree.map(spec, params), shardings)
    )
    alone, alone_state = params, tx.init(params)
    for i in range(3):
        alone, alone_state = jax.jit(step)(alone, alone_state, make_params(i + 1))
        old = state
        sharded, state = update(sharded, state, make_params(i + 1))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old) if leaf.size > 100)
    assert_equal_trees(sharded, alone)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"wd_mults": ((".*/kernels", 1.0), ("else", 0.0))}, "wd_mults: rule '.*/kernels' matches"),
        ({"lr_mults": (("img/.*", 1.0),)}, "lr_mults: parameter 't' matches none"),
        ({"lr_mults": NONE}, "use config.frozen"),
        ({"lr_mults": ((".*", "big"),)}, "must be a number >= 0, not 'big'"),
        ({"wd_mults": ((".*", -1.0),)}, "must be a number >= 0, not -1.0"),
        ({"frozen": ((".*", 1.0),)}, "must be True or False, not 1.0"),
        ({"frozen": ((".*", True),)}, "every parameter is frozen"),
        ({"lr": 0.0}, "lr must be a number > 0"),
        ({"wd": float("nan")}, "wd must be a number >= 0, not nan"),
        ({"clip_norm": 0.0}, "clip_norm must be a number > 0"),
        ({"schedule": {"name": "cosine", "warmup": "100 steps"}}, "warmup"),
    ],
)
def test_a_wrong_setting_is_named_on_one_line(changes, part):
    with pytest.raises(UserError) as error:
        make_tx(make_config(**changes), make_params())
    assert part in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).startswith("config.")
