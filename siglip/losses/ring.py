"""The losses over a mesh: one tour of the devices yields the sigmoid loss and all its gradients.

Every device holds n images and n texts of the global batch N = n D. Texts travel with the
accumulator of their gradient, while images, and the gradient of the images, stay (exchange.py). As
dL/dl is elementwise in the logits l = t x.y + b, the visit of a text block gives its share of the
loss and of every gradient at once: three matmuls, nothing is recomputed and nothing is kept. Inside
a device a block is cut into tiles, so memory beyond the inputs is O(n d) plus a tile, whatever D is
(arXiv 2303.15343, section 3.3; `losses` has the definitions). A tower without gradient costs no
matmul, and its embeddings are what travels, without an accumulator.

The softmax needs the log-sum-exp of every row and column before its first gradient, so it makes
two tours: one matmul for those, then the same three.
"""

import dataclasses
import functools
import logging
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from siglip.losses import exchange as exchanges
from siglip.losses import pairs as pair_rules
from siglip.losses.definitions import Loss
from siglip.losses.negatives import kept, least_kept
from siglip.losses.pairs import Pairs
from siglip.losses.tiles import Call, Here, Tile, Want, loss_over_mesh, matmul

DTYPES = ("float32", "bfloat16")


def make_sigmoid_loss(
    mesh: Mesh,
    *,
    exchange: str = "auto",
    dtype: str = "float32",
    tile: int = 0,
    unroll: int = 1,
    relative_bias: bool = False,
    negatives: str = "all",
    ratio: int = 0,
    duplicates: str = "negative",
) -> Loss:
    """The loss for the trainer, over all axes of `mesh`; options as in `sigmoid_loss`."""
    options: dict[str, Any] = dict(exchange=exchange, dtype=dtype, tile=tile, unroll=unroll)
    _check_options(**options)
    pairs = Pairs(negatives, ratio, duplicates)
    fn = functools.partial(
        sigmoid_loss, mesh=mesh, pairs=pairs, relative_bias=relative_bias, **options
    )
    return Loss(fn, chance=pairs.prior_loss, needs=pairs.needs)


def make_softmax_loss(
    mesh: Mesh,
    *,
    exchange: str = "auto",
    dtype: str = "float32",
    tile: int = 0,
    unroll: int = 1,
    duplicates: str = "negative",
) -> Loss:
    """CLIP's loss for the trainer, over all axes of `mesh`; options as in `softmax_loss`."""
    options: dict[str, Any] = dict(exchange=exchange, dtype=dtype, tile=tile, unroll=unroll)
    _check_options(**options)
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
    seed: Int[Array, ""] | int = 0,
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
    """`losses.sigmoid_loss` of global arrays, with exact gradients, in O(n d) memory per device.

    Without differentiation only the loss is computed (one matmul instead of three), and where one
    side's gradient is not asked for, two matmuls.

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
      pairs: duplicates and selection of negatives, see `pairs`.

    Raises:
      ValueError: N is not a multiple of the number of devices, or shapes or options do not fit.
    """
    b = jnp.asarray(0.0 if b is None else b)
    b = -t * b if relative_bias else b
    call = _plan(zimg, ztxt, mesh, axes, exchange, dtype, tile, unroll, pairs, ids)
    seed = jnp.uint32(seed % 2**32) if isinstance(seed, int) else seed
    rows = _rows(call, mask, ids)
    return loss_over_mesh(_sigmoid, call, zimg, ztxt, jnp.asarray(t), b, rows, seed)


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
    """`losses.softmax_loss` of global arrays, with exact gradients, in O(n d) memory per device.

    Four matmuls with gradients, one without. Arguments and errors as in `sigmoid_loss`; of the
    options of `pairs` only duplicates='ignore' is defined: such pairs are no candidates.
    """
    del b  # cancels in both softmaxes
    _softmax_pairs(pairs)
    call = _plan(zimg, ztxt, mesh, axes, exchange, dtype, tile, unroll, pairs, ids)
    rows = _rows(call, mask, ids)
    zero = jnp.float32(0)
    return loss_over_mesh(_softmax, call, zimg, ztxt, jnp.asarray(t), zero, rows, jnp.uint32(0))


# The losses, as one device sees them


def _sigmoid(here: Here, y, want: Want):
    """One device's part of the sigmoid loss: (loss, dx, dy, dt, db)."""
    call, (n, d) = here.call, here.x.shape
    least = least_kept(here, y)

    def tile(carry, pairs: Tile):
        (nll_sum, gs_sum, g_sum), dx = carry
        logits = here.t * pairs.s + here.b
        signed = logits if pairs.positive is None else jnp.where(pairs.positive, -logits, logits)
        small = jnp.exp(-jnp.abs(logits))  # never overflows
        nll = jnp.where(signed >= 0, signed, 0) + jnp.log1p(small)  # softplus
        g = jnp.where(signed >= 0, 1, small) / (1 + small)  # sigmoid
        if pairs.positive is not None:
            g = jnp.where(pairs.positive, -g, g)
        counted = kept(here, pairs, least)
        if counted is not None:
            nll, g = jnp.where(counted, nll, 0), jnp.where(counted, g, 0)
        if want.nothing:
            return ((nll_sum + nll.sum(), gs_sum, g_sum), dx), None
        sums = (nll_sum + nll.sum(), gs_sum + (g * pairs.s).sum(), g_sum + g.sum())
        g = g.astype(call.dtype)
        dx = dx + call.transposed_matmul(g, pairs.y) if want.stay else dx
        return (sums, dx), (matmul(g, here.x) if want.go else None)

    zero = call.zeros(())
    carry = ((zero,) * 3, call.zeros((n, d)) if want.stay else None)
    gathered = lambda m: call.zeros((m, d)) if want.go else None  # noqa: E731
    (sums, dx), dy = here.tour(tile, carry, y, here.rows, gathered)

    # One all-reduce of a few floats. Scaling by t / N comes last: g stays a normal number in bf16.
    loss, dt, db, pairs = call.psum(jnp.stack([*sums, here.count()]))
    pairs = jnp.maximum(pairs, 1)
    dx, dy = (None if g is None else g * (here.t / pairs) for g in (dx, dy))
    return loss / pairs, dx, dy, dt / pairs, db / pairs


def _softmax(here: Here, y, want: Want):
    """One device's part of the softmax loss: (loss, dx, dy, dt, 0)."""
    call, (n, d) = here.call, here.x.shape

    # Logits less that of the row's own pair: near 0 where it matters, with all their digits.
    own = here.t * jnp.sum(here.x.astype(jnp.float32) * y.astype(jnp.float32), axis=1)
    rows = {**here.rows, "own": own}
    here = dataclasses.replace(here, rows=rows)

    def logits_less(pairs: Tile, *names: str):
        """Of the direction whose queries stay, and of that whose queries travel."""
        logits = here.t * pairs.s
        if pairs.positive is not None:  # the very number that is taken off: its softmax can be 1
            logits = jnp.where(pairs.positive, pairs.txt["own"], logits)
        if pairs.counted is not None:
            logits = jnp.where(pairs.counted, logits, -jnp.inf)
        stay, go = (pairs.txt, pairs.img) if here.swap else (pairs.img, pairs.txt)
        return (logits - sum(side[name] for name in names) for side in (stay, go))

    def log_sums(row, pairs: Tile):
        stay, go = logits_less(pairs, "own")
        return jnp.logaddexp(row, jax.nn.logsumexp(stay, axis=0)), jax.nn.logsumexp(go, axis=1)

    nothing = functools.partial(call.zeros, fill=-jnp.inf)
    row, column = here.tour(
        log_sums, nothing((n,)), y, rows, lambda m: nothing((m,)), combine=jnp.logaddexp
    )
    nll = row + column
    nll = jnp.where(rows["mask"], nll, 0) if "mask" in rows else nll

    def tile(carry, pairs: Tile):
        gs_sum, dx = carry
        to_stay, to_go = logits_less(pairs, "own", "lse")
        g = jnp.exp(to_stay) + jnp.exp(to_go)
        if pairs.positive is not None:
            wanted = pairs.positive if pairs.counted is None else pairs.positive & pairs.counted
            g = jnp.where(wanted, g - 2, g)
        gs_sum = gs_sum + (g * pairs.s).sum()
        g = g.astype(call.dtype)
        dx = dx + call.transposed_matmul(g, pairs.y) if want.stay else dx
        return (gs_sum, dx), (matmul(g, here.x) if want.go else None)

    dx = dy = None
    gs_sum = call.zeros(())
    if not want.nothing:
        # Rows without candidates have -inf, which would turn exp(-inf - -inf) into a NaN.
        row, column = (jnp.where(jnp.isfinite(lse), lse, 0) for lse in (row, column))
        here = dataclasses.replace(here, rows={**rows, "lse": row})
        (gs_sum, dx), dy = here.tour(
            tile,
            (gs_sum, call.zeros((n, d)) if want.stay else None),
            y,
            {**rows, "lse": column},
            lambda m: call.zeros((m, d)) if want.go else None,
        )
    loss, dt, pairs = call.psum(jnp.stack([nll.sum(), gs_sum, here.count()]))
    twice = 2 * jnp.maximum(pairs, 1)
    dx, dy = (None if g is None else g * (here.t / twice) for g in (dx, dy))
    return loss / twice, dx, dy, dt / twice, jnp.float32(0)


# What is static


def _plan(zimg, ztxt, mesh, axes, exchange, dtype, tile, unroll, pairs, ids) -> Call:
    axes = tuple(axes) or tuple(mesh.axis_names)
    if missing := [axis for axis in axes if axis not in mesh.shape]:
        raise ValueError(f"the mesh has the axes {', '.join(mesh.shape)}, not {missing[0]!r}")
    devices = math.prod(mesh.shape[axis] for axis in axes)
    dtype = jnp.dtype(zimg.dtype if dtype is None else dtype)
    _check_options(exchange, dtype.name, tile, unroll)
    if zimg.shape != ztxt.shape or zimg.ndim != 2:
        raise ValueError(f"zimg {zimg.shape} and ztxt {ztxt.shape} must be two arrays [N, d]")
    if len(zimg) % devices:
        raise ValueError(f"{len(zimg)} pairs do not divide over {devices} devices of axes {axes}")
    pair_rules.check_ids(pairs, ids)
    n, d = len(zimg) // devices, zimg.shape[1]
    if exchange == "auto":
        choice = exchanges.choose(mesh, n=n, d=d, devices=devices, itemsize=dtype.itemsize)
        logging.getLogger(__name__).info("exchange %s (%s)", choice.name, choice.why)
        exchange = choice.name
    tile = tile or _default_tile(n, mesh.devices.flat[0].platform)
    return Call(mesh, exchanges.Exchange(exchange, axes, devices, unroll), tile, dtype, pairs)


def _check_options(exchange: str, dtype: str, tile: int, unroll: int) -> None:
    if exchange not in ("auto", *exchanges.EXCHANGES):
        options = ", ".join(("auto", *exchanges.EXCHANGES))
        raise ValueError(f"exchange {exchange!r} is none of {options}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} of the loss is none of {', '.join(DTYPES)}")
    if tile < 0:
        raise ValueError(f"tile must be a number of rows, or 0 to choose, not {tile}")
    if unroll < 1:
        raise ValueError(f"unroll must be at least 1, not {unroll}")


def _softmax_pairs(pairs: Pairs) -> Pairs:
    if pairs.negatives != "all" or pairs.duplicates == "positive":
        raise ValueError(f"the softmax loss takes duplicates negative or ignore, not {pairs}")
    return pairs


def _default_tile(n: int, platform: str) -> int:
    # On a CPU about a megabyte of f32 logits, which stays in a cache. On an accelerator a gigabyte:
    # large matmuls. Not so few rows that matmuls starve.
    return max(256, (2**18 if platform == "cpu" else 2**28) // n)


def _rows(call: Call, mask, ids) -> dict[str, Array]:
    """What is known of the N rows, and needed: it travels with the embeddings."""
    rows = {} if mask is None else {"mask": mask}
    return rows | ({"ids": ids} if call.pairs.duplicates != "negative" else {})
