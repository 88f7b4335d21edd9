"""Rows of the host become one array over all devices."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from siglip.sharding import to_device


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
