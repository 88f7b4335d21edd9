"""The device mesh, and which array lies where on it.

Two axes: the batch is split over both, `data` and `fsdp`; parameters and optimizer state are
split over `fsdp` and replicated over `data`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from base.errors import UserError
from siglip.leaf_names import path_name

AXES = ("data", "fsdp")
SMALL = 2**14  # elements; smaller parameters cost more to gather than to keep
BLOCKS = "encoderblock"  # name of the stacked layers of a scan, and beginning of that of each layer


def make_mesh(devices: Sequence[Any] | None = None, *, data: int = -1, fsdp: int = 1) -> Mesh:
    """A mesh over devices; one of the sizes may be -1 ("the rest").

    Args:
      devices: those of a machine that need not be this one; default all devices of all processes.
      data: number of groups of devices, each with a whole copy of the parameters; -1: the rest.
      fsdp: devices that share one copy of parameters and optimizer state; -1: the rest.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    devices, sizes = jax.devices() if devices is None else list(devices), [data, fsdp]
    if -1 in sizes:
        sizes[sizes.index(-1)] = len(devices) // max(1, int(-np.prod(sizes)))
    if min(sizes) < 1 or np.prod(sizes) != len(devices):
        raise ValueError(
            f"mesh data={data} x fsdp={fsdp} does not fit {len(devices)} devices "
            f"(one of the two may be -1: the rest)"
        )
    # Splitting an axis of the machine is the only way to most sizes of fsdp on a TPU slice; other
    # devices have no such axes.
    placed = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def local_mesh() -> Mesh:
    """A mesh over this process's devices; programs on it never wait for another process."""
    devices = jax.local_devices()
    axis_types = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh((len(devices), 1), AXES, axis_types=axis_types, devices=devices)


def check_batch_size(name: str, batch_size: int, mesh: Mesh) -> None:
    """Checks that the devices of the mesh divide a batch; `name` is what a message calls its size.

    Raises:
      UserError: they do not. The message has the nearest size that fits.
    """
    if batch_size < 1 or batch_size % mesh.size:
        near = max(1, round(batch_size / mesh.size)) * mesh.size
        raise UserError(
            f"{name}={batch_size} does not divide over {mesh.size} devices; the nearest that does "
            f"is {near}"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy of the array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis split over all devices."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def params_sharding(abstract_params, mesh: Mesh):
    """A NamedSharding for each array of a tree: one axis of the large ones is split over `fsdp`.

    It is the one, of those that `fsdp` divides, whose parts have the most factors of two, as parts
    that fill the tiles of a TPU are summed with half the traffic (towers/shards.py); of several the
    largest. Layers stacked for a scan are split as each layer is, for they are gathered one by one.
    Works for optimizer state too, whose arrays have the shapes of parameters or are small.
    """
    fsdp = mesh.shape["fsdp"]

    def one(path, x) -> NamedSharding:
        stacked = int(BLOCKS in path_name(path).split("/") and len(x.shape) > 0)
        spec: list[str | None] = [None] * len(x.shape)
        divisible = [i for i in range(stacked, len(x.shape)) if x.shape[i] % fsdp == 0]
        if fsdp > 1 and divisible and np.prod(x.shape[stacked:]) >= SMALL:
            parts = {i: x.shape[i] // fsdp for i in divisible}
            spec[max(parts, key=lambda i: (parts[i] & -parts[i], parts[i]))] = "fsdp"
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(one, abstract_params)


def to_device(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Global arrays from every process's rows, split by rows over all devices of the mesh.

    It returns while the copy is under way.
    """
    rows = batch_sharding(mesh)
    return {k: jax.make_array_from_process_local_data(rows, v) for k, v in batch.items()}


def in_shard_map() -> bool:
    """Whether arrays are one device's own, as the training step's are.

    Elsewhere, as in evaluators, an array stands for those of all devices.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return bool(mesh.axis_names) and set(mesh.manual_axes) == set(mesh.axis_names)
