"""The losses over a mesh: one tour of the devices yields the sigmoid loss and all its gradients.

Every device holds n images and n texts of the global batch N = n D. Texts travel with the
accumulator of their gradient, while images, and the gradient of the images, stay (exchange.py). As
dL/dl is elementwise in the logits l = t x.y + b, the visit of a text block gives its share of the
loss and of every gradient at once: three matmuls, nothing is recomputed and nothing is kept. Inside
a device a block is cut into tiles, so memory beyond the inputs is O(n d) plus a tile, whatever D is
(arXiv 2303.15343, section 3.3). Values and gradients are those of definitions.py. A tower without
gradient costs no matmul, and its embeddings are what travels, without an accumulator.

The softmax needs the log-sum-exp of every row and column before its first gradient, so it makes
two tours: one matmul for those, then the same three.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Integer

from siglip.losses.definitions import Loss
from siglip.losses.negatives import kept, least_kept_key
from siglip.losses.pairs import Pairs
from siglip.losses.plan import LossPlan, check_options, make_plan, matmul
from siglip.losses.tiles import Shard, Tile, Wanted, loss_over_mesh


def make_sigmoid_loss(
    mesh: Mesh,
    *,
    exchange: str = "auto",  # 'ring', 'bidirectional' or 'gather'; 'auto' asks a cost model
    dtype: str = "float32",  # of the factors of the matmuls; logits and sums are float32
    tile: int = 0,  # rows of a travelling block whose logits are in memory at a time; 0 chooses
    unroll: int = 1,  # steps of the ring per iteration of its loop; more costs memory
    relative_bias: bool = False,  # logits are t (x.y - b) instead of t x.y + b
    negatives: str = "all",  # of each image: 'all', or `ratio` 'random', 'hard' or 'easy' ones
    ratio: int = 0,  # number of negatives that an image keeps, with negatives other than 'all'
    duplicates: str = "negative",  # pairs of equal text or image: 'negative', 'ignore', 'positive'
) -> Loss:
    """The sigmoid loss for the trainer, over all axes of `mesh`; options as in `sigmoid_loss`."""
    options: dict[str, Any] = dict(exchange=exchange, dtype=dtype, tile=tile, unroll=unroll)
    check_options(**options)
    pairs = Pairs(negatives, ratio, duplicates)
    fn = functools.partial(
        sigmoid_loss, mesh=mesh, pairs=pairs, relative_bias=relative_bias, **options
    )
    return Loss(fn, chance=pairs.prior_loss, needs=pairs.needs)


def make_softmax_loss(
    mesh: Mesh,
    *,
    exchange: str = "auto",  # 'ring', 'bidirectional' or 'gather'; 'auto' asks a cost model
    dtype: str = "float32",  # of the factors of the matmuls; logits and sums are float32
    tile: int = 0,  # rows of a travelling block whose logits are in memory at a time; 0 chooses
    unroll: int = 1,  # steps of the ring per iteration of its loop; more costs memory
    duplicates: str = "negative",  # pairs of equal text or image: 'negative' or 'ignore'
) -> Loss:
    """CLIP's loss for the trainer, over all axes of `mesh`; options as in `softmax_loss`."""
    options: dict[str, Any] = dict(exchange=exchange, dtype=dtype, tile=tile, unroll=unroll)
    check_options(**options)
    pairs = _softmax_pairs(Pairs(duplicates=duplicates))
    fn = functools.partial(softmax_loss, mesh=mesh, pairs=pairs, **options)
    return Loss(fn, chance=math.log, needs=pairs.needs)


def sigmoid_loss(
    zimg: Float[Array, "N d"],
    ztxt: Float[Array, "N d"],
    t: Float[Array, ""],
    b: Float[Array, ""] | None,
    mask: Bool[Array, " N"] | None = None,
    ids: Int[Array, "N k"] | None = None,
    seed: Integer[Array, ""] | int = 0,
    *,
    mesh: Mesh,
    axes: tuple[str, ...] = (),
    exchange: str = "auto",
    dtype: str | None = None,
    tile: int = 0,
    unroll: int = 1,
    relative_bias: bool = False,
    pairs: Pairs = Pairs(),  # noqa: B008
) -> Float[Array, ""]:
    """definitions.sigmoid_loss of global arrays, with exact gradients, in O(n d) memory a device.

    Without differentiation only the loss is computed: one matmul instead of three. Where only one
    side's gradient is asked for, it is two.

    Args:
      zimg, ztxt, t, b, mask: as in the definition. Row i lives on device i // n.
      ids: two rows are duplicates if they agree in a column, and are not negative there. Only read
        where `pairs` asks for it.
      seed: of random negatives.
      mesh: the devices.
      axes: the mesh axes that the batch is sharded over, in order; default all of them.
      exchange: 'ring', 'bidirectional', 'gather', or 'auto', which chooses by a cost model and
        logs its choice (exchange.choose).
      dtype: of the factors of the matmuls; default that of zimg. Logits, sums and accumulators are
        float32 in any case.
      tile: rows of a travelling block whose logits are in memory at a time; 0 chooses.
      unroll: steps of the ring per iteration of its loop. More can overlap more, and costs memory.
      relative_bias: logits are t (x.y - b) instead of t x.y + b.
      pairs: duplicates and selection of negatives, see pairs.py.

    Raises:
      ValueError: N is not a multiple of the number of devices, or shapes or options do not fit.
    """
    b = jnp.asarray(0.0 if b is None else b)
    b = -t * b if relative_bias else b
    options = dict(axes=axes, exchange=exchange, dtype=dtype, tile=tile, unroll=unroll)
    plan = make_plan(zimg, ztxt, ids, mesh=mesh, pairs=pairs, **options)
    seed = jnp.uint32(seed % 2**32) if isinstance(seed, int) else seed
    rows = _rows(plan, mask, ids)
    return loss_over_mesh(_sigmoid, plan, zimg, ztxt, jnp.asarray(t), b, rows, seed)


def softmax_loss(
    zimg: Float[Array, "N d"],
    ztxt: Float[Array, "N d"],
    t: Float[Array, ""],
    b: Float[Array, ""] | None = None,
    mask: Bool[Array, " N"] | None = None,
    ids: Int[Array, "N k"] | None = None,
    *,
    mesh: Mesh,
    axes: tuple[str, ...] = (),
    exchange: str = "auto",
    dtype: str | None = None,
    tile: int = 0,
    unroll: int = 1,
    pairs: Pairs = Pairs(),  # noqa: B008
) -> Float[Array, ""]:
    """definitions.softmax_loss of global arrays, with exact gradients, in O(n d) memory a device.

    Four matmuls with gradients, one without. Arguments and errors as in `sigmoid_loss`; of the
    options of `pairs` only duplicates='ignore' is defined: such pairs are no candidates.
    """
    del b  # cancels in both softmaxes
    _softmax_pairs(pairs)
    options = dict(axes=axes, exchange=exchange, dtype=dtype, tile=tile, unroll=unroll)
    plan = make_plan(zimg, ztxt, ids, mesh=mesh, pairs=pairs, **options)
    rows = _rows(plan, mask, ids)
    zero = jnp.float32(0)
    return loss_over_mesh(_softmax, plan, zimg, ztxt, jnp.asarray(t), zero, rows, jnp.uint32(0))


def _rows(plan: LossPlan, mask, ids) -> dict[str, Array]:
    """The properties of the N rows that the loss needs; they travel with the embeddings."""
    rows = {} if mask is None else {"mask": mask}
    return rows | ({"ids": ids} if plan.pairs.duplicates != "negative" else {})


def _softmax_pairs(pairs: Pairs) -> Pairs:
    if pairs.negatives != "all" or pairs.duplicates == "positive":
        raise ValueError(f"the softmax loss takes duplicates negative or ignore, not {pairs}")
    return pairs


# The losses as one device computes them


def _sigmoid(shard: Shard, y, wanted: Wanted):
    """One device's part of the sigmoid loss: (loss, dx, dy, dt, db)."""
    plan, (n, d) = shard.plan, shard.x.shape
    least = least_kept_key(shard, y)

    def visit(carry, tile: Tile):
        (nll_sum, gs_sum, g_sum), dx = carry
        counted = kept(shard, tile, least)

        def terms(t, b):
            """Each pair's loss, and its derivative by the logit."""
            logits = t * tile.s + b
            signed = logits if tile.positive is None else jnp.where(tile.positive, -logits, logits)
            small = jnp.exp(-jnp.abs(logits))  # never overflows
            nll = jnp.where(signed >= 0, signed, 0) + jnp.log1p(small)  # softplus
            g = jnp.where(signed >= 0, 1, small) / (1 + small)  # sigmoid
            if tile.positive is not None:
                g = jnp.where(tile.positive, -g, g)
            if counted is not None:
                nll, g = jnp.where(counted, nll, 0), jnp.where(counted, g, 0)
            return nll, g

        nll, g = terms(shard.t, shard.b)
        if wanted.nothing:
            return ((nll_sum + nll.sum(), gs_sum, g_sum), dx), None
        g_s = g_1 = g
        if plan.on_gpu:
            # XLA for GPUs would write what the loss, g and its sums share to memory, in float32.
            # Where they do not seem to share anything, it makes one pass that reads s and writes g.
            scalars, copies = (shard.t, shard.b), []
            for _ in range(3):
                scalars = lax.optimization_barrier(scalars)
                copies.append(terms(*scalars))
            (nll, _), (_, g_s), (_, g_1) = copies
        sums = (nll_sum + nll.sum(), gs_sum + (g_s * tile.s).sum(), g_sum + g_1.sum())
        g = g.astype(plan.dtype)
        dx = dx + plan.transposed_matmul(g, tile.y) if wanted.stay else dx
        return (sums, dx), (matmul(g, shard.x) if wanted.travel else None)

    zero = plan.zeros(())
    carry = ((zero,) * 3, plan.zeros((n, d)) if wanted.stay else None)
    accumulators = lambda m: plan.zeros((m, d)) if wanted.travel else None  # noqa: E731
    (sums, dx), dy = shard.tour(visit, carry, y, shard.rows, accumulators)

    # One all-reduce of a few floats. Scaling by t / N comes last: g stays a normal number in bf16.
    loss, dt, db, count = plan.psum(jnp.stack([*sums, shard.count()]))
    count = jnp.maximum(count, 1)
    dx, dy = (None if g is None else g * (shard.t / count) for g in (dx, dy))
    return loss / count, dx, dy, dt / count, db / count


def _softmax(shard: Shard, y, wanted: Wanted):
    """One device's part of the softmax loss: (loss, dx, dy, dt, 0)."""
    plan, (n, d) = shard.plan, shard.x.shape

    # Logits less that of the row's own pair: near 0 where it matters, with all their digits.
    own = shard.t * jnp.sum(shard.x.astype(jnp.float32) * y.astype(jnp.float32), axis=1)
    rows = {**shard.rows, "own": own}
    shard = dataclasses.replace(shard, rows=rows)

    def shifted_logits(tile: Tile, *names: str):
        """Logits less the named properties of their query, for both softmax directions: queries
        that stay, queries that travel."""
        logits = shard.t * tile.s
        if tile.positive is not None:  # the very number that is taken off: its softmax can be 1
            logits = jnp.where(tile.positive, tile.txt["own"], logits)
        if tile.counted is not None:
            logits = jnp.where(tile.counted, logits, -jnp.inf)
        stay, travel = (tile.txt, tile.img) if shard.swap else (tile.img, tile.txt)
        return (logits - sum(side[name] for name in names) for side in (stay, travel))

    def log_sums(row, tile: Tile):
        stay, travel = shifted_logits(tile, "own")
        return jnp.logaddexp(row, jax.nn.logsumexp(stay, axis=0)), jax.nn.logsumexp(travel, axis=1)

    empty = functools.partial(plan.zeros, fill=-jnp.inf)
    row, column = shard.tour(
        log_sums, empty((n,)), y, rows, lambda m: empty((m,)), combine=jnp.logaddexp
    )
    nll = row + column
    nll = jnp.where(rows["mask"], nll, 0) if "mask" in rows else nll

    def visit(carry, tile: Tile):
        gs_sum, dx = carry
        stay, travel = shifted_logits(tile, "own", "lse")
        g = jnp.exp(stay) + jnp.exp(travel)
        if tile.positive is not None:
            positive = tile.positive if tile.counted is None else tile.positive & tile.counted
            g = jnp.where(positive, g - 2, g)
        gs_sum = gs_sum + (g * tile.s).sum()
        g = g.astype(plan.dtype)
        dx = dx + plan.transposed_matmul(g, tile.y) if wanted.stay else dx
        return (gs_sum, dx), (matmul(g, shard.x) if wanted.travel else None)

    dx = dy = None
    gs_sum = plan.zeros(())
    if not wanted.nothing:
        # Rows without candidates have -inf, which would turn exp(-inf - -inf) into a NaN.
        row, column = (jnp.where(jnp.isfinite(lse), lse, 0) for lse in (row, column))
        shard = dataclasses.replace(shard, rows={**rows, "lse": row})
        (gs_sum, dx), dy = shard.tour(
            visit,
            (gs_sum, plan.zeros((n, d)) if wanted.stay else None),
            y,
            {**rows, "lse": column},
            lambda m: plan.zeros((m, d)) if wanted.travel else None,
        )
    loss, dt, count = plan.psum(jnp.stack([nll.sum(), gs_sum, shard.count()]))
    twice = 2 * jnp.maximum(count, 1)
    dx, dy = (None if g is None else g * (shard.t / twice) for g in (dx, dy))
    return loss / twice, dx, dy, dt / twice, jnp.float32(0)
