"""Of a tree on disk only the arrays that are asked for are read."""

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from siglip.checkpoints.files import orbax_tree
from siglip.leaf_names import leaves

STATE = {
    "step": np.int32(7),
    "params": {"img": {"kernel": np.arange(6, dtype=np.float32)}, "head": np.ones(3, np.float32)},
    "averaged": {"img": {"kernel": np.full(6, 2, np.float32)}},
    "opt_state": [np.zeros(6, np.float32)],
}
WANTED = {"params": {"img": {"kernel": jax.ShapeDtypeStruct((6,), np.float32)}}}
NAME = "params/img/kernel"


@pytest.fixture
def step(tmp_path):
    """A step in which every other array is damaged; each array has a folder of its own."""
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False)
    ocp.Checkpointer(handler).save(tmp_path / "7" / "state", STATE)
    folders = {path.name: path for path in (tmp_path / "7" / "state").iterdir() if path.is_dir()}
    del folders[NAME.replace("/", ".")]
    damaged = [
        file
        for folder in folders.values()
        for file in folder.rglob("*")
        if file.is_file() and file.name not in (".zarray", "zarr.json")
    ]
    for file in damaged:
        file.write_bytes(b"no data")
    assert len(damaged) == len(leaves(STATE)) - 1
    return tmp_path / "7"


@pytest.mark.parametrize(
    "read",
    [
        lambda step: leaves(orbax_tree.to_host(step, WANTED)),
        lambda step: leaves(orbax_tree.to_devices(step, WANTED, partial=True)),
        lambda step: orbax_tree.some_to_devices(step, leaves(WANTED)),
    ],
    ids=["to_host", "to_devices", "some_to_devices"],
)
def test_damage_in_arrays_that_nobody_asks_for_does_no_harm(step, read):
    assert set(orbax_tree.saved(step)) == set(leaves(STATE))
    arrays = read(step)
    assert list(arrays) == [NAME]
    np.testing.assert_array_equal(arrays[NAME], np.arange(6, dtype=np.float32))


def test_damage_in_an_array_that_is_asked_for_is_told(step):
    wanted = {"averaged": {"img": {"kernel": jax.ShapeDtypeStruct((6,), np.float32)}}}
    with pytest.raises(orbax_tree.DamagedCheckpoint, match="cannot be read"):
        orbax_tree.to_host(step, wanted)
