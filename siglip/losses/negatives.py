"""Selecting an image's negatives over the global batch (arXiv 2303.15343, section 4.8).

Exact, wherever the negatives are, in O(n) memory: the score of a negative is mapped to an unsigned
integer of the same order (pairs.Pairs.key), and the key of the `ratio`-th greatest is found four
bits at a time, by eight counts over all negatives: eight tours with one matmul each (none for
random ones, whose score is a hash of seed, image and text).
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int, UInt32

from siglip.losses.tiles import Here, Tile

DIGITS, BITS = 8, 4  # of a key


def least_kept(here: Here, y):
    """The key that an image's negatives must reach to be kept [n]; None where all are."""
    call, rule = here.call, here.call.pairs
    if rule.negatives == "all":
        return None
    travels = None if rule.negatives == "random" else y  # a hash needs no embeddings

    def digit(i, least):
        bounds = digit_bounds(least, i)

        def count(counts, pairs: Tile):
            keys = rule.key(pairs.s, pairs.img, pairs.txt, here.seed)
            candidates = jnp.ones(keys.shape, bool) if pairs.counted is None else pairs.counted
            if pairs.positive is not None:
                candidates = candidates & ~pairs.positive
            return counts + count_reaching(keys, candidates, bounds), None

        counts = call.zeros(bounds.shape, 0, jnp.int32)
        counts, _ = here.tour(count, counts, travels, here.rows, lambda m: None)
        return next_least(least, counts, bounds, rule.ratio)

    start = call.zeros((len(here.x),), 0, jnp.uint32)
    return lax.fori_loop(0, DIGITS, digit, start)


def kept(here: Here, pairs: Tile, least):
    """Which pairs of a tile count, the selection of negatives included; None for all."""
    if least is None:
        return pairs.counted
    keep = here.call.pairs.key(pairs.s, pairs.img, pairs.txt, here.seed) >= least[None, :]
    keep = keep if pairs.positive is None else keep | pairs.positive
    return keep if pairs.counted is None else keep & pairs.counted


def digit_bounds(least: UInt32[Array, " r"], digit: int | Array) -> UInt32[Array, "r 15"]:
    """What the least kept key is at least, for each value 1.. of its digit (0: the leading one)."""
    shift = jnp.uint32(32 - BITS) - jnp.uint32(BITS) * jnp.asarray(digit, jnp.uint32)
    values = jnp.arange(1, 2**BITS, dtype=jnp.uint32)
    return least[:, None] | (values << shift)[None]


def count_reaching(
    keys: UInt32[Array, "c r"], wanted: Bool[Array, "c r"], bounds: UInt32[Array, "r 15"]
) -> Int[Array, "r 15"]:
    """How many of the wanted keys of a column reach each of its bounds."""
    # One at a time, by a loop that no compiler undoes: no array of 15 times the size of a tile.
    counts = lax.map(
        lambda bound: jnp.sum((keys >= bound[None]) & wanted, axis=0, dtype=jnp.int32), bounds.T
    )
    return counts.T


def next_least(
    least: UInt32[Array, " r"],
    counts: Int[Array, "r 15"],
    bounds: UInt32[Array, "r 15"],
    ratio: int,
) -> UInt32[Array, " r"]:
    """The greatest bound that `ratio` keys reach. With fewer keys in a row, all reach the 0."""
    best = jnp.max(jnp.where(counts >= ratio, bounds, jnp.uint32(0)), axis=1)
    return jnp.maximum(least, best)
