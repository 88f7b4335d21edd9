"""A state with all that a real one has: nested names, masked and bf16 moments, scalars."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from trainers.state.checkpointing import Checkpoints
from trainers.step.train_state import TrainState

DATA = {"position": 64, "seed": 3}


TX = optax.chain(
    optax.masked(optax.scale_by_adam(mu_dtype=jnp.bfloat16), {"img": True, "t": False}),
    optax.scale(-1.0),
)


def make_state(value=0.0, rows=16):
    params = {
        "img": {"kernel": jnp.arange(rows * 64.0).reshape(rows, 64) + value},
        "t": jnp.ones(1),
    }
    return TrainState(jnp.int32(0), params, TX.init(params), averaged={}, carried={})


def shardings(devices, tree=None):
    mesh = jax.make_mesh(
        (devices,),
        ("data",),
        axis_types=(jax.sharding.AxisType.Auto,),
        devices=jax.devices()[:devices],
    )

    def one(x):
        return NamedSharding(mesh, PartitionSpec("data") if x.ndim == 2 else PartitionSpec())

    return jax.tree.map(one, tree or jax.eval_shape(make_state))


def abstract(devices=1, tree=None):
    tree = tree or jax.eval_shape(make_state)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        tree,
        shardings(devices, tree),
    )


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert [x.dtype for x in jax.tree.leaves(a)] == [x.dtype for x in jax.tree.leaves(b)]


def saved(workdir, *steps, every=10, keep_last=2, keep_every=None):
    """A run with these steps on disk, closed; the state of step k is make_state(k)."""
    checkpoints = Checkpoints(workdir, every=every, keep_last=keep_last, keep_every=keep_every)
    for step in steps:
        assert checkpoints.save(step, make_state(step), DATA | {"step": step})
    checkpoints.close()
    return checkpoints.directory


def on_disk(directory):
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal())
