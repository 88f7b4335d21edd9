"""The border between host and devices: the only file of this folder that knows jax."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def to_device(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Global arrays from every process's rows, split by rows over all devices of the mesh.

    It returns while the copy is under way.
    """
    rows = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    return {k: jax.make_array_from_process_local_data(rows, v) for k, v in batch.items()}
