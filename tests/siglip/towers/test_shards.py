"""Parameters split over `fsdp`: gathered, and their gradients reduced, as autodiff would do it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from siglip.sharding import make_mesh
from siglip.towers.shards import Known, Shard, gather, make_shards


def on_devices(f, mesh, axis, ndim):
    """f(shard, rows of this device) where the first argument is split along `axis` over fsdp."""
    spec = [None] * ndim
    spec[axis] = "fsdp"
    spec = PartitionSpec(*spec)
    specs = (spec, PartitionSpec(mesh.axis_names))
    return jax.jit(jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=spec, check_vma=False))


def gradient(dtype, axis, ndim, gathered):
    """The gradient of a sum over rows of a function of the whole array, in shards."""

    def of(shard, x):
        def loss(shard):
            whole = gathered(shard).astype(jnp.float32)
            return jnp.sum(jnp.sin(whole) * x.sum() + whole * x[0])

        return jax.lax.psum(jax.grad(loss)(shard), "data")

    return of


@pytest.mark.parametrize(
    "shape, axis", [((64, 3), 0), ((3, 64), 1), ((2, 24, 5), 1), ((12, 2, 4), -1), ((20,), 0)]
)
def test_the_gradient_of_a_gather_is_that_of_autodiff(shape, axis):
    mesh = make_mesh(data=2, fsdp=4)
    rng = np.random.default_rng(0)
    param, x = (rng.normal(size=s).astype(np.float32) for s in (shape, (8,)))
    axis %= len(shape)

    def plainly(shard):
        return jax.lax.all_gather(shard, "fsdp", axis=axis, tiled=True)

    def gathered(shard):
        return Shard(shard, axis - len(shape), jnp.float32).whole()

    got, want = (
        on_devices(gradient(jnp.float32, axis, len(shape), f), mesh, axis, len(shape))(param, x)
        for f in (gathered, plainly)
    )
    assert got.sharding == want.sharding
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    by_hand = jax.grad(lambda p: sum(jnp.sum(jnp.sin(p) * x[i] + p * x[i]) for i in range(8)))(
        param
    )
    np.testing.assert_allclose(got, by_hand, rtol=1e-5, atol=1e-5)


def test_sums_over_devices_are_in_float32_where_parameters_are_used_in_bfloat16():
    mesh = make_mesh(data=1, fsdp=8)
    shares = np.array([256, 1, 1, 1, 1, 1, 1, 1], np.float32)  # bfloat16 has no 257

    def of(shard, x):
        def loss(shard):
            whole = Shard(shard, -1, jnp.bfloat16).whole()
            assert whole.dtype == jnp.bfloat16
            return jnp.sum(whole * x[0].astype(jnp.bfloat16))

        return jax.grad(loss)(shard)

    got = on_devices(of, mesh, 0, 1)(np.ones(16, np.float32), shares)
    np.testing.assert_array_equal(got, np.full(16, 263, np.float32))


def test_kernels_are_sent_in_the_type_of_matmuls_and_all_else_in_float32():
    params = {
        "Dense_0": {"kernel": jnp.ones((4, 8)), "bias": jnp.ones(8)},
        "table": jnp.ones((8, 4)),
    }
    specs = {
        "Dense_0": {"kernel": PartitionSpec(None, "fsdp"), "bias": PartitionSpec(None)},
        "table": PartitionSpec("fsdp", None),
    }
    shards = make_shards(params, specs, jnp.bfloat16)
    kernel, table = shards["Dense_0"]["kernel"], shards["table"]
    assert (kernel.axis, kernel.dtype) == (-1, jnp.bfloat16)
    assert (table.axis, table.dtype) == (-2, jnp.float32)
    assert shards["Dense_0"]["bias"] is params["Dense_0"]["bias"]


def test_shards_stand_behind_whole_arrays_until_these_are_changed():
    mesh = make_mesh(data=1, fsdp=8)

    def of(shard, x):
        tree = {"a": Shard(shard, -1, jnp.bfloat16), "b": x}
        known = Known()
        whole = known.whole(tree)
        assert whole["a"].shape == (16,) and whole["a"].dtype == jnp.float32
        assert whole["b"] is x
        assert known.shards(whole)["a"] is tree["a"]
        assert known.shards({"c": {"d": whole["a"]}})["c"]["d"] is tree["a"]
        changed = jax.tree.map(lambda p: 2 * p, whole)
        assert known.shards(changed)["a"] is changed["a"]
        assert gather(tree)["a"].dtype == jnp.bfloat16
        return shard

    on_devices(of, mesh, 0, 1)(np.ones(16, np.float32), np.ones(8, np.float32))
