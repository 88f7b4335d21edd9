"""Meshes, and which axis of an array is split."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from siglip.sharding import make_mesh, params_sharding


@pytest.mark.parametrize(
    "sizes, shape", [({}, (8, 1)), ({"fsdp": 4}, (2, 4)), ({"data": 2, "fsdp": -1}, (2, 4))]
)
def test_minus_one_is_the_rest_of_the_devices(sizes, shape):
    assert make_mesh(**sizes).devices.shape == shape


@pytest.mark.parametrize("sizes", [{"data": 3}, {"fsdp": 16}, {"data": 4, "fsdp": 4}, {"data": 0}])
def test_a_mesh_that_does_not_fit_the_devices_is_refused(sizes):
    with pytest.raises(ValueError, match="does not fit 8 devices"):
        make_mesh(**sizes)


def test_large_parameters_are_split_over_fsdp_along_the_largest_axis_that_divides():
    mesh = make_mesh(fsdp=4)
    params = {
        "kernel": jnp.zeros((128, 512)),
        "odd": jnp.zeros((516, 1001)),
        "none_divides": jnp.zeros((501, 1001)),
        "small": jnp.zeros((8, 8)),
        "scalar": jnp.zeros(()),
    }
    specs = jax.tree.map(lambda s: s.spec, params_sharding(params, mesh))
    assert specs["kernel"] == PartitionSpec(None, "fsdp")
    assert specs["odd"] == PartitionSpec("fsdp", None)
    for name in ("none_divides", "small", "scalar"):
        assert all(axis is None for axis in specs[name]), name
    unsplit = jax.tree.map(lambda s: s.is_fully_replicated, params_sharding(params, make_mesh()))
    assert all(unsplit.values())
