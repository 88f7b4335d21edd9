"""Meshes, which axis of an array is split, and the host's rows on the devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from topologies import devices_of, slices

from siglip.sharding import make_mesh, params_sharding, to_device


@pytest.mark.parametrize(
    "sizes, shape", [({}, (8, 1)), ({"fsdp": 4}, (2, 4)), ({"data": 2, "fsdp": -1}, (2, 4))]
)
def test_minus_one_is_the_rest_of_the_devices(sizes, shape):
    assert make_mesh(**sizes).devices.shape == shape


@pytest.mark.parametrize("sizes", [{"data": 3}, {"fsdp": 16}, {"data": 4, "fsdp": 4}, {"data": 0}])
def test_a_mesh_that_does_not_fit_the_devices_is_refused(sizes):
    with pytest.raises(ValueError, match="does not fit 8 devices"):
        make_mesh(**sizes)


def test_a_mesh_over_some_devices_has_those_in_their_order():
    devices = jax.devices()[2:6]
    assert list(make_mesh(devices, fsdp=2).devices.flat) == devices
    with pytest.raises(ValueError, match="does not fit 4 devices"):
        make_mesh(devices, fsdp=8)


@pytest.mark.parametrize("kind", ["v4", "v5e", "v5p", "v6e", "tpu7x"])
def test_every_slice_of_tpus_has_a_mesh_of_every_fsdp(kind):
    for name in slices():
        if name.startswith(f"{kind}:"):
            devices = devices_of(name)
            for fsdp in [2**i for i in range(len(devices).bit_length())]:
                mesh = make_mesh(devices, fsdp=fsdp)
                assert dict(mesh.shape) == {"data": len(devices) // fsdp, "fsdp": fsdp}, name
                assert set(mesh.devices.flat) == set(devices), name


def test_large_parameters_are_split_over_fsdp_along_an_axis_that_divides():
    mesh = make_mesh(fsdp=4)
    params = {
        "kernel": jnp.zeros((128, 512)),
        "odd": jnp.zeros((516, 1001)),
        "in_tiles": jnp.zeros((1152, 4304)),  # 288 rows, 1076 columns
        "none_divides": jnp.zeros((501, 1001)),
        "small": jnp.zeros((8, 8)),
        "scalar": jnp.zeros(()),
    }
    specs = jax.tree.map(lambda s: s.spec, params_sharding(params, mesh))
    assert specs["kernel"] == PartitionSpec(None, "fsdp")
    assert specs["odd"] == PartitionSpec("fsdp", None)
    assert specs["in_tiles"] == PartitionSpec("fsdp", None)
    for name in ("none_divides", "small", "scalar"):
        assert all(axis is None for axis in specs[name]), name
    unsplit = jax.tree.map(lambda s: s.is_fully_replicated, params_sharding(params, make_mesh()))
    assert all(unsplit.values())


def test_layers_stacked_for_a_scan_are_split_like_each_of_them():
    layer = {"kernel": jnp.zeros((128, 512)), "bias": jnp.zeros(512)}
    stacked = jax.tree.map(lambda x: jnp.zeros((1024, *x.shape)), layer)
    encoder = {"encoderblock_0": layer, "encoderblock": stacked}
    specs = jax.tree.map(lambda s: s.spec, params_sharding({"img": encoder}, make_mesh(fsdp=4)))
    specs = specs["img"]
    assert specs["encoderblock_0"]["kernel"] == PartitionSpec(None, "fsdp")
    assert specs["encoderblock"]["kernel"] == PartitionSpec(None, None, "fsdp")
    assert specs["encoderblock"]["bias"] == PartitionSpec(None, None)


@pytest.mark.parametrize("shape", [(8, 1), (4, 2), (1, 8)])
def test_every_device_holds_its_rows(shape):
    mesh = jax.make_mesh(shape, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    batch = {
        "image": np.arange(16 * 2 * 2 * 3, dtype=np.uint8).reshape(16, 2, 2, 3),
        "text": np.arange(48, dtype=np.int32).reshape(16, 3),
        "mask": np.arange(16) % 3 > 0,
    }
    placed = to_device(batch, mesh)
    assert placed.keys() == batch.keys()
    for key, rows in batch.items():
        assert placed[key].dtype == rows.dtype
        np.testing.assert_array_equal(placed[key], rows)
        shards = sorted(placed[key].addressable_shards, key=lambda shard: shard.index[0].start)
        assert [shard.device for shard in shards] == list(mesh.devices.flat)
        for i, shard in enumerate(shards):
            np.testing.assert_array_equal(shard.data, rows[2 * i : 2 * i + 2])
