"""The selection of each image's negatives over the global batch (arXiv 2303.15343, section 4.8).

Exact, wherever the negatives are, in O(n) memory: the score of a negative is mapped to an unsigned
integer of the same order (pairs.Pairs.key), and the key of the `ratio`-th greatest is found four
bits at a time, by eight counts over all negatives: eight tours with one matmul each (none for
random ones, whose score is a hash of seed, image and text).
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int, UInt32

from siglip.losses.tiles import Shard, Tile

DIGITS, BITS = 8, 4  # of a key


def least_kept_key(shard: Shard, y) -> UInt32[Array, " n"] | None:
    """The key that an image's negatives must reach to be kept; None where all are kept."""
    plan, pairs = shard.plan, shard.plan.pairs
    if pairs.negatives == "all":
        return None
    travelling = None if pairs.negatives == "random" else y  # a hash needs no embeddings

    def digit(i, least):
        bounds = digit_bounds(least, i)

        def count(counts, tile: Tile):
            keys = pairs.key(tile.s, tile.img, tile.txt, shard.seed)
            candidates = jnp.ones(keys.shape, bool) if tile.counted is None else tile.counted
            if tile.positive is not None:
                candidates = candidates & ~tile.positive
            return counts + count_reaching(keys, candidates, bounds), None

        counts = plan.zeros(bounds.shape, 0, jnp.int32)
        counts, _ = shard.tour(count, counts, travelling, shard.rows, lambda m: None)
        return next_least(least, counts, bounds, pairs.ratio)

    start = plan.zeros((len(shard.x),), 0, jnp.uint32)
    return lax.fori_loop(0, DIGITS, digit, start)


def kept(shard: Shard, tile: Tile, least):
    """Mask of the pairs of a tile that count, the selection of negatives included; None for all."""
    if least is None:
        return tile.counted
    keep = shard.plan.pairs.key(tile.s, tile.img, tile.txt, shard.seed) >= least[None, :]
    keep = keep if tile.positive is None else keep | tile.positive
    return keep if tile.counted is None else keep & tile.counted


def digit_bounds(least: UInt32[Array, " r"], digit: int | Array) -> UInt32[Array, "r 15"]:
    """Lower bounds of the least kept key, for each value 1 to 15 of its digit (0: the leading)."""
    shift = jnp.uint32(32 - BITS) - jnp.uint32(BITS) * jnp.asarray(digit, jnp.uint32)
    values = jnp.arange(1, 2**BITS, dtype=jnp.uint32)
    return least[:, None] | (values << shift)[None]


def count_reaching(
    keys: UInt32[Array, "c r"], candidates: Bool[Array, "c r"], bounds: UInt32[Array, "r 15"]
) -> Int[Array, "r 15"]:
    """The number of candidates of each column whose key reaches each of its bounds."""
    # One at a time, by a loop that no compiler undoes: no array of 15 times the size of a tile.
    counts = lax.map(
        lambda bound: jnp.sum((keys >= bound[None]) & candidates, axis=0, dtype=jnp.int32), bounds.T
    )
    return counts.T


def next_least(
    least: UInt32[Array, " r"],
    counts: Int[Array, "r 15"],
    bounds: UInt32[Array, "r 15"],
    ratio: int,
) -> UInt32[Array, " r"]:
    """The greatest bound that `ratio` keys reach; 0, which all reach, where there are fewer."""
    best = jnp.max(jnp.where(counts >= ratio, bounds, jnp.uint32(0)), axis=1)
    return jnp.maximum(least, best)
