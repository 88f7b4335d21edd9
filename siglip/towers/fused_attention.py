"""Attention of short sequences as one Pallas kernel for TPUs: no logits and no weights in memory.

All keys of an example fit into VMEM at once, so that softmax needs no running maximum, and the
backward pass has whole columns of weights at hand: its residuals are query, key and value alone.
Inside, logits are [keys, queries]: what is summed over keys is summed over rows, which is cheap,
and what belongs to a query is a row of numbers.

A head of 64 dimensions is half a register wide. Heads are not cut out; those that share registers
are computed on the same columns, with the columns of other heads set to 0 in one factor. The
matrix unit, 128 wide, takes as long either way.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float

from siglip.chips import Chip

LANES = 128
MAX_LENGTH = 1024
VMEM = 14 * 2**20  # bytes; a v4 has 16 MiB
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)  # finite: where nothing is True all weights equal


class Sizes(NamedTuple):
    """What a kernel is made for.

    Attributes:
      length: tokens in a row of the arrays, which has `examples` examples of the same length.
      examples: see above. A query attends to the keys of its own example.
      head_dim: columns of a head.
      columns: columns that are computed together, which whole heads fill, a multiple of LANES.
      masked: whether there is a mask of keys.
    """

    length: int
    examples: int
    head_dim: int
    columns: int
    masked: bool

    @property
    def queries(self) -> int:
        """Rows of queries, padded: they become columns."""
        return _up(self.length, LANES)

    @property
    def tile(self) -> int:
        """Queries that are computed at a time."""
        return _tile(self.length)

    @property
    def keys(self) -> int:
        """Rows of keys, padded."""
        return _up(self.length, 16)


def fused_attention(
    query: Float[Array, "n l h d"],
    key: Float[Array, "n l h d"],
    value: Float[Array, "n l h d"],
    mask: Bool[Array, "n 1 1 l"] | None = None,
    *,
    interpret: Any = False,
) -> Float[Array, "n l h d"]:
    """softmax(query key^T / sqrt(d)) value, as jax.nn.dot_product_attention, on a TPU.

    Takes bfloat16 and float32 (multiplied as such). It is not partitioned: call it on a device's
    own block, within shard_map.

    Args:
      mask: True for keys to attend to. Where nothing is True all weights are equal.
      interpret: runs on any machine, slowly, for tests.

    Raises:
      ValueError: the shapes are not those of a short self-attention.
    """
    n, length, heads, dim = query.shape
    if not query.shape == key.shape == value.shape or not 0 < length <= MAX_LENGTH:
        raise ValueError(
            f"fused attention is for at most {MAX_LENGTH} tokens that attend to each other, not "
            f"for shapes {query.shape}, {key.shape}, {value.shape}"
        )
    rows = max(1, LANES // length) if n else 1  # short texts share a row
    rest = -n % rows
    lanes = math.lcm(dim, LANES)
    padded = 0
    if (heads * dim) % lanes or _bytes(length, lanes, query.dtype) > VMEM:
        padded, lanes = _up(dim, LANES) - dim, _up(dim, LANES)

    def packed(x):
        if rest or padded:
            x = jnp.pad(x, ((0, rest), (0, 0), (0, 0), (0, padded)))
        return x.reshape((n + rest) // rows, rows * length, heads * (dim + padded))

    sizes = Sizes(rows * length, rows, dim + padded, lanes, mask is not None)
    bias = None
    if mask is not None:
        bias = jnp.where(mask[:, 0, 0], 0.0, MASKED)
        bias = jnp.pad(bias, ((0, rest), (0, 0))).reshape(-1, 1, rows * length)
    scale = 1 / math.sqrt(dim)
    out: Array = _attention(
        sizes, scale, interpret, packed(query), packed(key), packed(value), bias
    )
    return out.reshape(n + rest, length, heads, dim + padded)[:n, ..., :dim]


def _up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple


def _bytes(length: int, columns: int, dtype: Any) -> int:
    """VMEM of the backward pass: two blocks of each of its seven arrays, and a dozen of logits."""
    blocks = 14 * _up(length, LANES) * columns * jnp.dtype(dtype).itemsize
    return blocks + 12 * _up(length, 16) * _tile(length) * 4


def _tile(length: int) -> int:
    padded = _up(length, LANES)
    return LANES if padded > 512 or padded % 256 else 256


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attention(sizes, scale, interpret, query, key, value, bias):
    return _call(_forward, 1, sizes, scale, interpret, (query, key, value), bias)[0]


def _attention_fwd(sizes, scale, interpret, query, key, value, bias):
    out = _attention(sizes, scale, interpret, query, key, value, bias)
    return out, (query, key, value, bias)


def _attention_bwd(sizes, scale, interpret, residuals, grad):
    *qkv, bias = residuals
    grads = _call(_backward, 3, sizes, scale, interpret, (*qkv, grad), bias)
    return *grads, None if bias is None else jnp.zeros_like(bias)


_attention.defvjp(_attention_fwd, _attention_bwd)


def _call(kernel, outputs, sizes, scale, interpret, arrays, bias):
    n, length, width = arrays[0].shape
    dtype = arrays[0].dtype
    columns = _columns(sizes, width, dtype)
    block = pl.BlockSpec((None, sizes.queries, columns), lambda i, j: (i, 0, j))
    row = pl.BlockSpec((None, 1, sizes.queries), lambda i, j: (i, 0, 0))
    out = jax.ShapeDtypeStruct(
        (n, length, width), dtype, manual_axis_type=jax.typeof(arrays[0]).manual_axis_type
    )
    return pl.pallas_call(
        functools.partial(kernel, sizes, scale),
        grid=(n, width // columns),
        in_specs=[block] * len(arrays) + [row] * sizes.masked,
        out_specs=[block] * outputs,
        out_shape=[out] * outputs,
        interpret=interpret,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        name="attention" + kernel.__name__,
    )(*arrays, *([bias] if sizes.masked else []))


def _columns(sizes: Sizes, width: int, dtype: Any) -> int:
    """Columns of a block: as many as fit, for a step of the grid costs a third of a microsecond."""
    groups = width // sizes.columns
    fits = [
        g
        for g in range(1, groups + 1)
        if groups % g == 0 and _bytes(sizes.length, g * sizes.columns, dtype) <= VMEM
    ]
    return max(fits, default=1) * sizes.columns


# Inside the kernel: arrays in VMEM. Logits, weights and their gradients are [keys, queries].


def _forward(sizes, scale, q_ref, k_ref, v_ref, *refs):
    *bias_ref, out_ref = refs
    dtype, bias = out_ref.dtype, _bias(sizes, *bias_ref)

    def group(columns):
        k, v = (_load(ref, 0, sizes.keys, columns, sizes) for ref in (k_ref, v_ref))

        def tile(start, carry):
            q, after = _scaled(_load(q_ref, start, sizes.tile, columns, sizes), scale, dtype)
            out = _Sums(0)
            for window, mine in _heads(sizes):
                e, total = _exp(k[:, window] * mine, q[:, window], after, bias)
                # [columns, queries]: of the two factors the small one is transposed.
                out.add(window, _dot(v[:, window] * mine, e, (0, 0), dtype) / total)
            out_ref[pl.ds(start, sizes.tile), columns] = out.joined().T.astype(dtype)
            return carry

        _tiles(sizes, tile, 0)

    _groups(sizes, out_ref, group)


def _backward(sizes, scale, q_ref, k_ref, v_ref, g_ref, *refs):
    *bias_ref, dq_ref, dk_ref, dv_ref = refs
    dtype, bias = dq_ref.dtype, _bias(sizes, *bias_ref)

    def group(columns):
        k, v = (_load(ref, 0, sizes.keys, columns, sizes) for ref in (k_ref, v_ref))

        def tile(start, sums):
            q, after = _scaled(_load(q_ref, start, sizes.tile, columns, sizes), scale, dtype)
            g = _load(g_ref, start, sizes.tile, columns, sizes).astype(dtype)
            dq, dk, dv = _Sums(0), _Sums(1), _Sums(1)
            for window, mine in _heads(sizes):
                km = k[:, window] * mine
                e, total = _exp(km, q[:, window], after, bias)
                p = e * (1 / total)
                dp = _dot(v[:, window] * mine, g[:, window], (1, 1), dtype)
                pdp = p * dp
                ds = pdp - p * jnp.sum(pdp, axis=0, keepdims=True)
                if sizes.masked:  # what a mask replaced has no gradient, also where all is masked
                    assert bias is not None
                    ds = jnp.where(bias < 0, 0.0, ds)
                dv.add(window, _dot(p, g[:, window], (1, 0), dtype) * mine)
                dk.add(window, _dot(ds, q[:, window], (1, 0), dtype) * (mine * after))
                dq.add(window, _dot(km, ds, (0, 0), dtype) * scale)
            dq_ref[pl.ds(start, sizes.tile), columns] = dq.joined().T.astype(dtype)
            return sums[0] + dk.joined(), sums[1] + dv.joined()

        dk, dv = _tiles(sizes, tile, (jnp.zeros_like(k), jnp.zeros_like(v)))
        dk_ref[: sizes.keys, columns] = dk.astype(dtype)
        dv_ref[: sizes.keys, columns] = dv.astype(dtype)

    _groups(sizes, dq_ref, group)


def _groups(sizes: Sizes, ref, group) -> None:
    """Runs `group` on each set of columns of a block that whole heads fill."""

    def step(i, carry):
        group(pl.ds(pl.multiple_of(i * sizes.columns, LANES), sizes.columns))
        return carry

    jax.lax.fori_loop(0, ref.shape[1] // sizes.columns, step, 0)


def _tiles(sizes: Sizes, tile, carry):
    """Carries what `tile` returns from one tile of queries to the next."""
    if sizes.queries == sizes.tile:
        return tile(0, carry)

    def step(i, carry):
        return tile(pl.multiple_of(i * sizes.tile, LANES), carry)

    return jax.lax.fori_loop(0, sizes.queries // sizes.tile, step, carry)


def _heads(sizes: Sizes) -> Iterator[tuple[slice, Any]]:
    """For each head: whole registers of columns, and [1, columns] that is 1 for its own, 0 else."""
    for first in range(0, sizes.columns, sizes.head_dim):
        end = first + sizes.head_dim
        window = slice(first // LANES * LANES, _up(end, LANES))
        shape = 1, window.stop - window.start
        column = window.start + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        yield window, jnp.where((column >= first) & (column < end), 1.0, 0.0)


def _load(ref, start, size: int, columns, sizes: Sizes) -> Array:
    """float32 rows of a block; those behind the array hold anything, and become 0."""
    x = ref[pl.ds(start, size), columns].astype(jnp.float32)
    if sizes.queries == sizes.length:
        return x
    row = start + jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    return jnp.where(row < sizes.length, x, 0.0)


def _scaled(q: Array, scale: float, dtype: Any) -> tuple[Array, float]:
    """(queries times a part of scale, the rest of it): all of it where that rounds nothing."""
    exact = math.frexp(scale)[0] == 0.5
    return ((q * scale).astype(dtype), 1.0) if exact else (q.astype(dtype), scale)


def _bias(sizes: Sizes, ref=None) -> Array | None:
    """What is added to logits [keys, queries]: 0, MASKED, or -inf for keys that are not there."""
    if ref is None and sizes.examples == 1 and sizes.keys == sizes.length:
        return None
    shape = sizes.keys, sizes.tile
    key, query = (jax.lax.broadcasted_iota(jnp.int32, shape, i) for i in (0, 1))
    here = key < sizes.length
    if sizes.examples > 1:
        size = sizes.length // sizes.examples
        for first in range(size, sizes.length, size):
            here &= (key >= first) == (query >= first)
    bias = 0.0
    if ref is not None:
        column = jnp.broadcast_to(ref[:], (LANES, sizes.queries)).T[: sizes.keys]
        bias = jnp.concatenate([column] * (shape[1] // LANES), axis=1)
    return jnp.where(here, bias, -jnp.inf)


def _exp(k, q, after: float, bias) -> tuple[Array, Array]:
    """(exp(logits - their maximum) [keys, queries], its sum over keys [1, queries])."""
    s = _dot(k, q, (1, 1), q.dtype)
    if after != 1:
        s = s * after
    if bias is not None:
        s = s + bias
    e = jnp.exp(s - jnp.max(s, axis=0, keepdims=True))
    return e, jnp.sum(e, axis=0, keepdims=True)


def _dot(a, b, axes: tuple[int, int], dtype: Any) -> Array:
    """float32 product of a and b over one axis of each, multiplied in dtype."""
    return jax.lax.dot_general(
        a.astype(dtype),
        b.astype(dtype),
        (((axes[0],), (axes[1],)), ((), ())),
        precision="highest" if dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


class _Sums:
    """Sums, for each register of columns, of what the heads in it give. Columns are on `axis`."""

    def __init__(self, axis: int):
        self.axis = axis
        self.chunks: dict[int, Array] = {}

    def add(self, window: slice, x: Array) -> None:
        for i in range(x.shape[self.axis] // LANES):
            lanes = slice(i * LANES, (i + 1) * LANES)
            chunk = x[lanes] if self.axis == 0 else x[:, lanes]
            place = window.start + lanes.start
            self.chunks[place] = self.chunks[place] + chunk if place in self.chunks else chunk

    def joined(self) -> Array:
        return jnp.concatenate([self.chunks[i] for i in sorted(self.chunks)], axis=self.axis)


class Work(NamedTuple):
    """What the kernels of one attention do, forward and backward, by hand: XLA counts no kernels.

    Attributes:
      flops: of the matrix unit, whose sides everything is padded to.
      bytes: to and from HBM.
      vector: operations of the vector unit on numbers, all but the exponentials.
      exponentials: computed, those of padding included.
      seconds: an estimate, in which the slowest of the four overlaps with all others.
    """

    flops: int
    bytes: int
    vector: int
    exponentials: int
    seconds: float


def work(
    chip: Chip, n: int, length: int, heads: int, head_dim: int, *, itemsize: int = 2, cores: int = 1
) -> Work:
    """The work of attention, forward and backward, on one device.

    Args:
      chip: a TPU. itemsize: bytes of a number in q, k, v.
      cores: of the device that share the work: 2 on v4 and v5p, else 1.
    """
    unit = 256 if chip.flops / cores / (chip.clock or 1) > 2**18 else LANES  # of the matrix unit
    rows = max(1, LANES // length)
    n, length = -(-n // rows), rows * length
    keys, queries = _up(length, 16), _up(length, LANES)
    flops = 0
    for i in range(heads):
        window = _up((i + 1) * head_dim, LANES) - i * head_dim // LANES * LANES
        # Logits twice, gradients of weights, of keys and of values; output, gradient of queries.
        flops += 5 * keys * _up(window, unit) * _up(queries, unit)
        flops += 2 * window * _up(keys, unit) * _up(queries, unit)
    flops *= 2 * n
    logits = n * heads * keys * queries
    size = (4 + 7) * n * _up(length, 32 // itemsize) * heads * head_dim * itemsize
    # Forward: bias, maximum, difference, its factor, sum, cast. Backward: those, the share, twice
    # a product and a sum of gradients, a difference, a cast.
    vector, exponentials = (6 + 12) * logits, 2 * logits
    lanes = 8 * LANES * cores * (chip.clock or math.inf)  # numbers per second and slot
    seconds = max(
        flops / chip.flops, size / chip.bandwidth, vector / (4 * lanes), exponentials / lanes
    )
    return Work(flops, size, vector, exponentials, seconds)
