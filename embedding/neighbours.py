"""The nearest rows of a large array of embeddings, exactly: every similarity is computed."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from base.errors import UserError
from siglip.sharding import local_mesh, replicated, to_device

QUERIES = 1024  # at a time
_ELEMENTS = 2**25  # similarities in memory at a time, over all devices: 128 MB


class Neighbours(NamedTuple):
    """Scores and rows of each query's neighbours, the nearest first; of equal ones the smaller row
    comes first."""

    scores: Float[np.ndarray, "m k"]
    rows: Int[np.ndarray, "m k"]


def nearest(
    queries: Float[np.ndarray, "m d"], index: Any, k: int, mesh: Mesh | None = None
) -> Neighbours:
    """The k rows of the index that have the largest dot product with each query: the cosine, as
    embeddings are unit norm.

    The index is read once, a chunk at a time, and each device searches its part of the chunk.

    Args:
      index: [n, d], float32 or float16: an array, or what shape and slices of rows make one, as
        Embeddings.arrays gives it.
      mesh: of this process's devices; None: all of them.

    Raises:
      UserError: k is not from 1 to n, the widths differ, or a number is not finite.
    """
    n, d = index.shape
    if queries.ndim != 2 or queries.shape[1] != d:
        raise UserError(f"queries of shape {queries.shape} do not fit an index of width {d}")
    if not 1 <= k <= n:
        raise UserError(f"k={k} nearest neighbours of {n} rows: k must be from 1 to {n}")
    _check_finite(queries, "queries")
    mesh = mesh or local_mesh()
    blocks = _blocks(queries, replicated(mesh))
    chunk = _chunk_rows(n, max(1, min(QUERIES, len(queries))), mesh.size)
    step = _make_step(mesh, k)
    best = [_no_neighbours(len(block), k, mesh) for block in blocks]
    for number, first in enumerate(range(0, n, chunk)):
        rows = np.asarray(index[first : first + chunk])
        _check_finite(rows, f"rows {first} to {first + len(rows) - 1} of the index")
        batch = {"z": _pad(rows, chunk), "real": np.arange(chunk) < len(rows)}
        placed = to_device(batch, mesh)
        # The chunk before is done, so that no more than two are in memory.
        jax.block_until_ready(best)
        best = [step(block, placed, np.int32(number), *old) for block, old in zip(blocks, best)]
    scores, chunks, places = (np.concatenate(parts) for parts in zip(*jax.device_get(best)))
    rows = chunks.astype(np.int64) * chunk + places  # int32 ends at 2 billion rows
    return Neighbours(scores[: len(queries)], rows[: len(queries)])


@functools.lru_cache(maxsize=8)
def _make_step(mesh: Mesh, k: int):
    """A jitted function (queries, chunk, its number, *best so far) -> best of both."""
    split = PartitionSpec(mesh.axis_names)

    def local(
        queries: Float[Array, "m d"], z: Float[Array, "n d"], real: Bool[Array, " n"]
    ) -> tuple[Float[Array, "m k"], Int[Array, "m k"]]:
        # 'highest': bf16 or TF32 passes would tie and swap near neighbours.
        scores = jnp.matmul(queries, z.astype(jnp.float32).T, precision="highest")
        scores = jnp.where(real[None, :], scores, -jnp.inf)
        scores, places = jax.lax.top_k(scores, min(k, len(z)))  # of equal ones the first
        return scores, places + len(z) * jax.lax.axis_index(mesh.axis_names).astype(jnp.int32)

    spread = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(PartitionSpec(), split, split),
        out_specs=PartitionSpec(None, mesh.axis_names),
    )

    def step(queries, chunk, number, scores, chunks, places):
        new_scores, new_places = spread(queries, chunk["z"], chunk["real"])
        new_chunks = jnp.full(new_places.shape, number, jnp.int32)
        # Smaller rows stand first: those of earlier chunks, then device after device.
        scores, order = jax.lax.top_k(jnp.concatenate([scores, new_scores], axis=1), k)
        chunks = jnp.take_along_axis(jnp.concatenate([chunks, new_chunks], axis=1), order, axis=1)
        places = jnp.take_along_axis(jnp.concatenate([places, new_places], axis=1), order, axis=1)
        return scores, chunks, places

    return jax.jit(step, out_shardings=replicated(mesh))


def _no_neighbours(
    m: int, k: int, mesh: Mesh
) -> tuple[Float[Array, "m k"], Int[Array, "m k"], Int[Array, "m k"]]:
    """Scores, chunks and places that any neighbour beats."""
    scores, places = np.full((m, k), -np.inf, np.float32), np.zeros((m, k), np.int32)
    return jax.device_put((scores, places, places), replicated(mesh))


def _blocks(queries: Float[np.ndarray, "m d"], sharding) -> list[Float[Array, "block d"]]:
    size = max(1, min(QUERIES, len(queries)))
    starts = range(0, max(1, len(queries)), size)
    parts = [_pad(np.asarray(queries[i : i + size], np.float32), size) for i in starts]
    return [jax.device_put(part, sharding) for part in parts]


def _chunk_rows(n: int, queries: int, devices: int) -> int:
    """Rows of a chunk, a multiple of the devices."""
    most = max(1, _ELEMENTS // queries // devices)
    return min(most, -(-n // devices)) * devices


def _pad(x: Float[np.ndarray, "n d"], rows: int) -> Float[np.ndarray, "rows d"]:
    return np.pad(x, [(0, rows - len(x)), (0, 0)])


def _check_finite(x: np.ndarray, name: str) -> None:
    if not np.isfinite(x).all():
        raise UserError(f"{name} are not finite: embed them again")
