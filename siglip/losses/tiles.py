"""One device's block of a loss over a mesh: tiles of pairs, what travels, and the derivative.

A loss is a function local(here, y, want) -> (loss, dx, dy, dt, db) of one device, in terms of
`Here.tour`, which shows it the pairs of the rows that stay with those of all devices, a tile at a
time (ring.py has two). `loss_over_mesh` makes a differentiable function of global arrays of it.

The `custom_vjp` lies outside the `shard_map`: inside, the backward rule would have to add up the
cotangents of the replicated t and b itself.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from siglip.losses import exchange as exchanges
from siglip.losses import pairs as pair_rules
from siglip.losses.pairs import Pairs


@dataclasses.dataclass(frozen=True)
class Call:
    """Everything static about one call; hashable, so that jit can tell calls apart."""

    mesh: Mesh
    exchange: exchanges.Exchange
    tile: int
    dtype: Any
    pairs: Pairs

    def zeros(self, shape, fill=0.0, dtype=jnp.float32) -> Array:
        return lax.pcast(jnp.full(shape, fill, dtype), self.exchange.axes, to="varying")

    def psum(self, x):
        return lax.psum(x, self.exchange.axes)

    # XLA has two matmuls for CPUs. YNNPACK's is the faster one (129 against 107 GFLOP/s on two
    # cores), but takes no transposed left factor, and adds d products up in one go: the logits of a
    # trained model (t = 117, d = 512) are then so far off that gradients are wrong by 1.4e-6, by
    # 0.85e-6 with Eigen's. So cosines are made to be Eigen's, gradients YNNPACK's, each by a copy
    # of the smaller factor that XLA may not see through.

    def cosines(self, y, x) -> Array:
        """y @ x.T."""
        if self.on_cpu and y.dtype == jnp.float32:
            return matmul(lax.optimization_barrier(y.T).T, x.T)
        return matmul(y, x.T)

    def transposed_matmul(self, a, b) -> Array:
        """a.T @ b."""
        return matmul(lax.optimization_barrier(a.T) if self.on_cpu else a.T, b)

    @property
    def on_cpu(self) -> bool:
        return self.mesh.devices.flat[0].platform == "cpu"


# The derivative


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def loss_over_mesh(local: Callable, call: Call, zimg, ztxt, t, b, rows, seed):
    """The loss of global arrays; `rows` is what is known of the N rows, and travels with them."""
    return _over_mesh(local, call, (False,) * 3, zimg, ztxt, t, b, rows, seed)[0]


def _loss_fwd(local: Callable, call: Call, *args):
    # Which derivatives are wanted: a frozen tower, or embeddings that are data, have none.
    zimg, ztxt, t, b, rows, seed = jax.tree.map(lambda x: x.value, args, is_leaf=_is_primal)
    wanted = args[0].perturbed, args[1].perturbed, args[2].perturbed or args[3].perturbed
    return _over_mesh(local, call, wanted, zimg, ztxt, t, b, rows, seed)


def _is_primal(x) -> bool:
    return hasattr(x, "perturbed")


def _loss_bwd(local: Callable, call: Call, grads, cotangent):
    del local, call
    if isinstance(cotangent, SymbolicZero):
        return (None,) * 6
    scaled = jax.tree.map(lambda g: g * cotangent.astype(g.dtype), grads)
    return *scaled, None, None


loss_over_mesh.defvjp(_loss_fwd, _loss_bwd, symbolic_zeros=True)


def _over_mesh(local: Callable, call: Call, wanted, zimg, ztxt, t, b, rows, seed):
    """(loss, (dzimg, dztxt, dt, db)), None for what is not wanted."""
    by_row, scalar = PartitionSpec(call.exchange.axes), PartitionSpec()
    want_img, want_txt, want_scalars = wanted
    grads_specs = tuple(
        spec if want else None
        for spec, want in zip(
            (by_row, by_row, scalar, scalar), (want_img, want_txt, want_scalars, want_scalars)
        )
    )

    def per_device(zimg, ztxt, t, b, rows, seed):
        # The side without gradient travels, so that no accumulator has to. Ranks of negatives are
        # of images, though, and their scores must come out of the very same matmul again.
        swap = want_txt and not want_img and call.pairs.negatives == "all"
        stay, go = (ztxt, zimg) if swap else (zimg, ztxt)
        n = len(stay)
        if call.pairs.negatives == "random":
            first = lax.axis_index(call.exchange.axes) * n
            rows = {**rows, "index": first + lax.iota(jnp.int32, n)}
        here = Here(call, stay.astype(call.dtype), rows, t, b, seed, swap)
        want = Want(want_txt, want_img) if swap else Want(want_img, want_txt)
        want = dataclasses.replace(want, scalars=want_scalars)
        loss, dstay, dgo, dt, db = local(here, go.astype(call.dtype), want)
        dimg, dtxt = (dgo, dstay) if swap else (dstay, dgo)
        likes = (zimg, ztxt, t, b)
        return loss, tuple(
            g.astype(like.dtype) if spec is not None else None
            for g, like, spec in zip((dimg, dtxt, dt, db), likes, grads_specs)
        )

    return jax.shard_map(
        per_device,
        mesh=call.mesh,
        in_specs=(by_row, by_row, scalar, scalar, by_row, scalar),
        out_specs=(scalar, grads_specs),
    )(zimg, ztxt, t, b, rows, seed)


@dataclasses.dataclass(frozen=True)
class Want:
    """Which derivatives are wanted: of the rows that stay, of those that travel, of t and b."""

    stay: bool
    go: bool
    scalars: bool = False

    @property
    def nothing(self) -> bool:
        return not (self.stay or self.go or self.scalars)


@dataclasses.dataclass(frozen=True)
class Here:
    """One device: its rows x [n, d] that stay, what is known of them, and the scalars."""

    call: Call
    x: Array
    rows: dict[str, Array]
    t: Array
    b: Array
    seed: Array
    swap: bool  # x are texts, and images travel

    def tour(self, tile: Callable, carry, y, rows, gathered: Callable, *, combine=jnp.add):
        """Calls tile(carry, pairs) -> (carry, out) for the pairs of x with all tiles of all rows.

        gathered(m) makes what the outs of a block of m rows are written into. Returns the carry
        and what all devices gathered for y (exchange.tour).
        """

        def visit(carry, block, own: bool):
            m = len(jax.tree.leaves(block)[0])
            size = min(self.call.tile, m)

            def one(start, count, state):
                carry, outs = state
                y, rows = jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, start, count), block)
                carry, out = tile(carry, self._pairs(y, rows, start if own else None))
                return carry, jax.tree.map(
                    lambda to, part: lax.dynamic_update_slice_in_dim(to, part, start, 0), outs, out
                )

            state, (whole, rest) = (carry, gathered(m)), divmod(m, size)
            state = lax.fori_loop(0, whole, lambda i, state: one(i * size, size, state), state)
            return one(whole * size, rest, state) if rest else state

        return self.call.exchange.tour(visit, carry, (y, rows), combine=combine)

    def _pairs(self, y, rows, start) -> "Tile":
        n, count = len(self.x), len(jax.tree.leaves((y, rows))[0])
        diagonal = None
        if start is not None:
            diagonal = start + lax.iota(jnp.int32, count)[:, None] == lax.iota(jnp.int32, n)[None]
        txt, img = pair_rules.facing(rows, self.rows)
        txt, img = (img, txt) if self.swap else (txt, img)
        positive, counted = self.call.pairs.label(img, txt, diagonal)
        s = None if y is None else self.call.cosines(y, self.x)
        if s is not None and self.call.pairs.negatives != "all":
            # Ranked in one loop, kept in another: nothing may be fused into either's matmul.
            s = lax.optimization_barrier(s)
        return Tile(s, y, positive, counted, img, txt)

    def count(self) -> Array:
        """Pairs that are given, on this device."""
        if "mask" in self.rows:
            return self.rows["mask"].sum(dtype=jnp.float32)
        return self.call.zeros((), len(self.x))


@dataclasses.dataclass(frozen=True)
class Tile:
    """c rows that travel against the n that stay; masks are None for no pair and for all."""

    s: Any  # cosines [c, n], float32
    y: Any  # [c, d]
    positive: Any
    counted: Any
    img: dict[str, Array]
    txt: dict[str, Array]


def matmul(a, b) -> Array:
    # f32 in, f32 throughout (not TF32 or bf16 passes); bf16 in, f32 accumulation.
    precision = "highest" if a.dtype == jnp.float32 else None
    return jnp.matmul(a, b, precision=precision, preferred_element_type=jnp.float32)
