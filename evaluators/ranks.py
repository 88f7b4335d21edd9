"""The rank of each query's nearest match, without sorting anything.

rank = candidates strictly nearer + equally near ones with a smaller index. So ties are decided by
the order of the candidates, and a hit among the first k is `rank < k`, for any k.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from siglip.sharding import batch_sharding, replicated

_ELEMENTS = 2**25  # similarities in memory at a time, over all devices: 128 MB


def best_match_ranks(
    sims: Float[Array, "n m"] | Float[np.ndarray, "n m"],
    query_group: Int[Array, " n"] | Int[np.ndarray, " n"],
    candidate_group: Int[Array, " m"] | Int[np.ndarray, " m"],
) -> Int[Array, " n"] | Int[np.ndarray, " n"]:
    """Number of candidates ahead of the nearest one that matches, for each query.

    Args:
      sims: similarity, larger is nearer; finite. NumPy or JAX, and so is the result.
      query_group, candidate_group: a candidate matches a query of its own group. Of several
        matches the nearest counts. A query without a match has rank m, which is never a hit.
    """
    xp = sims.__array_namespace__()
    matches = query_group[:, None] == candidate_group[None, :]
    nearest = xp.max(xp.where(matches, sims, -xp.inf), axis=1, keepdims=True)
    first = xp.argmax(matches & (sims == nearest), axis=1)[:, None]
    index = xp.arange(sims.shape[1])[None, :]
    return xp.sum((sims > nearest) | ((sims == nearest) & (index < first)), axis=1)


class Ranker:
    """`best_match_ranks` of embeddings, in chunks of queries over all devices of all processes."""

    def __init__(self, mesh: Mesh):
        self._mesh = mesh
        self._chunk_ranks = jax.jit(_chunk_ranks, out_shardings=replicated(mesh))

    def __call__(
        self,
        queries: Float[np.ndarray, "n d"],
        candidates: Float[np.ndarray, "m d"],
        query_group: Int[np.ndarray, " n"],
        candidate_group: Int[np.ndarray, " m"],
    ) -> Int[np.ndarray, " n"]:
        """Ranks by dot product. Arguments and result are the same on every process."""
        everywhere = replicated(self._mesh)
        fixed = [_put(x, everywhere) for x in (candidates, candidate_group.astype(np.int32))]
        devices = self._mesh.size
        chunk = min(len(queries), max(1, _ELEMENTS // len(candidates)))
        chunk = -(-chunk // devices) * devices
        ranks = []
        for start in range(0, len(queries), chunk):
            rows = slice(start, start + chunk)
            part = [_pad(x[rows], chunk) for x in (queries, query_group.astype(np.int32))]
            part = [_put(x, batch_sharding(self._mesh)) for x in part]
            ranks.append(np.asarray(self._chunk_ranks(*part, *fixed)))
        return np.concatenate(ranks)[: len(queries)]


def _chunk_ranks(
    queries: Float[Array, "n d"],
    query_group: Int[Array, " n"],
    candidates: Float[Array, "m d"],
    candidate_group: Int[Array, " m"],
) -> Int[Array, " n"] | Int[np.ndarray, " n"]:
    # 'highest': bf16 or TF32 passes would tie and swap near neighbours. One matmul gives a query's
    # similarities to all candidates, so equal candidates tie exactly.
    sims = jnp.matmul(queries, candidates.T, precision="highest")
    return best_match_ranks(sims, query_group, candidate_group)


def _pad(x: np.ndarray, rows: int) -> np.ndarray:
    return np.pad(x, [(0, rows - len(x))] + [(0, 0)] * (x.ndim - 1))


def _put(x: np.ndarray, sharding) -> Array:
    # Each process holds all of x and gives its devices their part.
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])
