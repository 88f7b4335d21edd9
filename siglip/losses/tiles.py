"""One device's part of a loss over a mesh: its tiles of pairs, what travels, and the derivative.

`local` is a loss as one device computes it (ring.py has two): local(shard, y, wanted) -> (loss, dx,
dy, dt, db). It calls `Shard.tour`, which shows it the pairs of the rows that stay with the rows of
all devices, a tile at a time. `loss_over_mesh` makes it a differentiable function of global arrays.

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
from jax.sharding import PartitionSpec
from jaxtyping import Array

from siglip.losses.pairs import facing
from siglip.losses.plan import LossPlan


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def loss_over_mesh(local: Callable, plan: LossPlan, zimg, ztxt, t, b, rows, seed):
    """The loss of global arrays.

    Args:
      local: the loss as one device computes it; see the top of this file.
      rows: properties of the N rows that travel with them, such as 'mask' and 'ids': [N, ...].
      seed: uint32, of random negatives.
    """
    return _over_mesh(local, plan, (False,) * 3, zimg, ztxt, t, b, rows, seed)[0]


def _loss_fwd(local: Callable, plan: LossPlan, *args):
    # A frozen tower, or embeddings that are data, need no gradient.
    zimg, ztxt, t, b, rows, seed = jax.tree.map(lambda x: x.value, args, is_leaf=_is_primal)
    wanted = args[0].perturbed, args[1].perturbed, args[2].perturbed or args[3].perturbed
    return _over_mesh(local, plan, wanted, zimg, ztxt, t, b, rows, seed)


def _is_primal(x) -> bool:
    return hasattr(x, "perturbed")


def _loss_bwd(local: Callable, plan: LossPlan, grads, cotangent):
    del local, plan
    if isinstance(cotangent, SymbolicZero):
        return (None,) * 6
    scaled = jax.tree.map(lambda g: g * cotangent.astype(g.dtype), grads)
    return *scaled, None, None


loss_over_mesh.defvjp(_loss_fwd, _loss_bwd, symbolic_zeros=True)


def _over_mesh(local: Callable, plan: LossPlan, wanted, zimg, ztxt, t, b, rows, seed):
    """(loss, (dzimg, dztxt, dt, db)), with None for gradients that are not wanted."""
    by_row, scalar = PartitionSpec(plan.exchange.axes), PartitionSpec()
    wants_img, wants_txt, wants_scalars = wanted
    grads_specs = tuple(
        spec if is_wanted else None
        for spec, is_wanted in zip(
            (by_row, by_row, scalar, scalar), (wants_img, wants_txt, wants_scalars, wants_scalars)
        )
    )

    def per_device(zimg, ztxt, t, b, rows, seed):
        # The side without gradient travels, so that no accumulator has to. Ranks of negatives are
        # of images, though, and their scores must come out of the very same matmul again.
        swap = wants_txt and not wants_img and plan.pairs.negatives == "all"
        stay, travel = (ztxt, zimg) if swap else (zimg, ztxt)
        n = len(stay)
        if plan.pairs.negatives == "random":
            first = lax.axis_index(plan.exchange.axes) * n
            rows = {**rows, "index": first + lax.iota(jnp.int32, n)}
        shard = Shard(plan, stay.astype(plan.dtype), rows, t, b, seed, swap)
        of_stay, of_travel = (wants_txt, wants_img) if swap else (wants_img, wants_txt)
        loss, dstay, dtravel, dt, db = local(
            shard, travel.astype(plan.dtype), Wanted(of_stay, of_travel, wants_scalars)
        )
        dimg, dtxt = (dtravel, dstay) if swap else (dstay, dtravel)
        likes = (zimg, ztxt, t, b)
        return loss, tuple(
            g.astype(like.dtype) if spec is not None else None
            for g, like, spec in zip((dimg, dtxt, dt, db), likes, grads_specs)
        )

    return jax.shard_map(
        per_device,
        mesh=plan.mesh,
        in_specs=(by_row, by_row, scalar, scalar, by_row, scalar),
        out_specs=(scalar, grads_specs),
    )(zimg, ztxt, t, b, rows, seed)


@dataclasses.dataclass(frozen=True)
class Wanted:
    """Which gradients are wanted: of the rows that stay, of those that travel, of t and b."""

    stay: bool
    travel: bool
    scalars: bool

    @property
    def nothing(self) -> bool:
        return not (self.stay or self.travel or self.scalars)


@dataclasses.dataclass(frozen=True)
class Tile:
    """Pairs of c rows that travel with the n that stay.

    Attributes:
      s: cosines [c, n], float32; None where no embeddings travel.
      y: embeddings [c, d] of the rows that travel, or None.
      positive, counted: masks [c, n]; None means that no pair is positive, that all count.
      img, txt: properties of the images and of the texts, shaped to broadcast over the pairs.
    """

    s: Any
    y: Any
    positive: Any
    counted: Any
    img: dict[str, Array]
    txt: dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Shard:
    """What one device holds throughout a loss.

    Attributes:
      x: embeddings [n, d] of the rows that stay.
      rows: properties of these rows, [n, ...] each: 'mask', 'ids', 'index'. Absent if not needed.
      seed: uint32, of random negatives.
      swap: whether x are texts and images travel; usually it is the other way round.
    """

    plan: LossPlan
    x: Array
    rows: dict[str, Array]
    t: Array
    b: Array
    seed: Array
    swap: bool

    def tour(self, visit: Callable, carry, y, rows, accumulators: Callable, *, combine=jnp.add):
        """Calls visit(carry, tile) -> (carry, out) for the pairs of x with the rows of all devices.

        Args:
          y, rows: embeddings (or None) and properties of this device's rows that travel.
          accumulators: accumulators(m) makes what the outs for a block of m rows are written into.
          combine: see exchange.tour.

        Returns:
          The carry after the last visit, and what all devices gathered for y.
        """

        def visit_block(carry, block, own: bool):
            m = len(jax.tree.leaves(block)[0])
            size = min(self.plan.tile_rows, m)

            def visit_rows(start, count, state):
                carry, outs = state
                y, rows = jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, start, count), block)
                carry, out = visit(carry, self._tile(y, rows, start if own else None))
                return carry, jax.tree.map(
                    lambda to, part: lax.dynamic_update_slice_in_dim(to, part, start, 0), outs, out
                )

            state, (whole, rest) = (carry, accumulators(m)), divmod(m, size)
            state = lax.fori_loop(0, whole, lambda i, s: visit_rows(i * size, size, s), state)
            return visit_rows(whole * size, rest, state) if rest else state

        return self.plan.exchange.tour(visit_block, carry, (y, rows), combine=combine)

    def _tile(self, y, rows, start) -> Tile:
        """`start`: the first row's place in this device's own block; None in that of another."""
        n, count = len(self.x), len(jax.tree.leaves((y, rows))[0])
        diagonal = None
        if start is not None:
            diagonal = start + lax.iota(jnp.int32, count)[:, None] == lax.iota(jnp.int32, n)[None]
        txt, img = facing(rows, self.rows)
        txt, img = (img, txt) if self.swap else (txt, img)
        positive, counted = self.plan.pairs.label(img, txt, diagonal)
        s = None if y is None else self.plan.cosines(y, self.x)
        if s is not None and self.plan.pairs.negatives != "all":
            # Ranked in one loop, kept in another: nothing may be fused into either's matmul.
            s = lax.optimization_barrier(s)
        return Tile(s, y, positive, counted, img, txt)

    def count(self) -> Array:
        """The number of real pairs on this device, float32."""
        if "mask" in self.rows:
            return self.rows["mask"].sum(dtype=jnp.float32)
        return self.plan.zeros((), len(self.x))
