"""The sigmoid loss over a mesh: one tour of the ring yields the loss and all its gradients.

Every device holds n images and n texts of the global batch N = n D. Texts travel round the ring
with the accumulator of their gradient, while images, and the gradient of the images, stay. As
dL/dl is elementwise in the logits l = t x.y + b, the visit of a text block gives its share of the
loss and of every gradient at once: three matmuls, nothing is recomputed and nothing is kept. After
D hops each accumulator is home. Inside a device a block is cut into row tiles, so memory beyond
the inputs is O(n d) plus a tile, whatever D is (arXiv 2303.15343, section 3.3; losses.sigmoid_loss
is the definition).

The `custom_vjp` lies outside the `shard_map`: inside, the backward rule would have to add up the
cotangents of the replicated t and b itself.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float

from siglip.losses import Loss


def make_sigmoid_loss(mesh: Mesh, *, tile: int = 0, unroll: int = 1) -> Loss:
    """The loss for the trainer, over all axes of `mesh`."""
    return functools.partial(sigmoid_loss, mesh=mesh, tile=tile, unroll=unroll)


def sigmoid_loss(
    zimg: Float[Array, "N d"],
    ztxt: Float[Array, "N d"],
    t: Float[Array, ""],
    b: Float[Array, ""] | None,
    mask: Bool[Array, " N"] | None = None,
    *,
    mesh: Mesh,
    axes: tuple[str, ...] = (),
    tile: int = 0,
    unroll: int = 1,
) -> Float[Array, ""]:
    """`losses.sigmoid_loss` of global arrays, with exact gradients, in O(n d) memory per device.

    Without differentiation only the loss is computed (one matmul instead of three).

    Args:
      zimg, ztxt, t, b, mask: as in the definition. Row i lives on device i // n.
      mesh: the devices.
      axes: the mesh axes that the batch is sharded over, in order; default all of them.
      tile: rows of a block that are in memory at a time; 0 chooses.
      unroll: steps of the ring per iteration of its loop. More can overlap more, and costs memory.

    Raises:
      ValueError: N is not a multiple of the number of devices, or shapes do not fit.
    """
    axes = tuple(axes) or tuple(mesh.axis_names)
    devices = 1
    for axis in axes:
        devices *= mesh.shape[axis]
    if zimg.shape != ztxt.shape or zimg.ndim != 2:
        raise ValueError(f"zimg {zimg.shape} and ztxt {ztxt.shape} must be two arrays [N, d]")
    if len(zimg) % devices:
        raise ValueError(f"{len(zimg)} pairs do not divide over {devices} devices of axes {axes}")
    n = len(zimg) // devices
    ring = _Ring(mesh, axes, devices, min(n, tile or _default_tile(n)), unroll)
    return _loss(ring, zimg, ztxt, jnp.asarray(t), jnp.asarray(0.0 if b is None else b), mask)


def _default_tile(n: int) -> int:
    # About a megabyte of f32 logits, which stays in a cache; not so few rows that matmuls starve.
    return max(256, 2**18 // n)


@dataclasses.dataclass(frozen=True)
class _Ring:
    """Everything static about one call; hashable, so that jit can tell calls apart."""

    mesh: Mesh
    axes: tuple[str, ...]
    devices: int
    tile: int
    unroll: int

    def hop(self, tree):
        """Sends this device's arrays to the next device."""
        to_next = [(i, (i + 1) % self.devices) for i in range(self.devices)]
        return jax.tree.map(lambda x: lax.ppermute(x, self.axes, to_next), tree)

    def zeros(self, shape) -> Array:
        return lax.pcast(jnp.zeros(shape, jnp.float32), self.axes, to="varying")

    def shard_map(self, f, *, grads: bool):
        rows, scalar = PartitionSpec(self.axes), PartitionSpec()
        out_specs = (scalar, (rows, rows, scalar, scalar)) if grads else scalar
        in_specs = (rows, rows, scalar, scalar, rows)
        return jax.shard_map(f, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(ring: _Ring, zimg, ztxt, t, b, mask):
    value = functools.partial(_tour, ring, grads=False)
    return ring.shard_map(value, grads=False)(zimg, ztxt, t, b, mask)


def _loss_fwd(ring: _Ring, zimg, ztxt, t, b, mask):
    value_and_grads = functools.partial(_tour, ring, grads=True)
    return ring.shard_map(value_and_grads, grads=True)(zimg, ztxt, t, b, mask)


def _loss_bwd(ring: _Ring, grads, cotangent):
    del ring
    return *(g * cotangent.astype(g.dtype) for g in grads), None


_loss.defvjp(_loss_fwd, _loss_bwd)


def _tour(ring: _Ring, x, y, t, b, mask, *, grads: bool):
    """One device's part: its images x [n, d] meet all N texts. t and b are replicated."""
    block = functools.partial(_block, ring, x, mask, t, b, grads=grads)
    text = (y, mask)

    # Step 0, the only block with positives. Each hop is issued before the matmuls that hide it.
    arriving = ring.hop(text) if ring.devices > 1 else text
    sums, dx, dy = block(text, ring.zeros(3), ring.zeros(x.shape) if grads else None, own=True)

    def visit(carry, last: bool = False):
        text, sums, dx, dy = carry
        arriving = text if last else ring.hop(text)  # the last block has nowhere left to go
        dy = ring.hop(dy)  # None, an empty tree, without gradients
        sums, dx, here = block(text, sums, dx, own=False)
        return arriving, sums, dx, (dy + here if grads else None)

    carry = (arriving, sums, dx, dy)
    if ring.devices > 2:
        carry, _ = lax.scan(
            lambda carry, _: (visit(carry), None),
            carry,
            length=ring.devices - 2,
            unroll=min(ring.unroll, ring.devices - 2),
        )
    if ring.devices > 1:
        carry = visit(carry, last=True)
    _, sums, dx, dy = carry
    if ring.devices > 1:
        dy = ring.hop(dy)  # the D-th hop: the accumulator is home

    # One all-reduce of a few floats. Scaling by t / N comes last: g stays a normal number in bf16.
    pairs = jnp.float32(len(x)) if mask is None else mask.sum(dtype=jnp.float32)
    pairs = lax.pcast(pairs, ring.axes, to="varying") if mask is None else pairs
    loss, db, dt, pairs = lax.psum(jnp.concatenate([sums, pairs[None]]), ring.axes)
    pairs = jnp.maximum(pairs, 1)
    if not grads:
        return loss / pairs
    dx, dy = (g * (t / pairs) for g in (dx, dy))
    dt, db = dt / pairs, db / pairs
    grads_out = (dx.astype(x.dtype), dy.astype(y.dtype), dt.astype(t.dtype), db.astype(b.dtype))
    return loss / pairs, grads_out


def _block(ring: _Ring, x, mask_x, t, b, text, sums, dx, *, own: bool, grads: bool):
    """Adds the pairs of the images x [n, d] and one block of texts, tile by tile.

    Returns:
      sums of loss, of g = dL/dl and of g s, each times N; dx + g y; and g^T x, this block's part
      of the text gradient (None without gradients).
    """
    y, mask_y = text
    n = len(x)

    def add(start, rows, carry):
        sums, dx, dy = carry
        x_rows = lax.dynamic_slice_in_dim(x, start, rows)
        s = _matmul(x_rows, y.T)
        logits = t * s + b
        signed, g = logits, jax.nn.sigmoid(logits)
        if own:
            positive = (start + lax.iota(jnp.int32, rows))[:, None] == lax.iota(jnp.int32, n)[None]
            signed = jnp.where(positive, -logits, logits)
            g = jnp.where(positive, -jax.nn.sigmoid(-logits), g)
        nll = jax.nn.softplus(signed)
        if mask_x is not None:
            valid = lax.dynamic_slice_in_dim(mask_x, start, rows)[:, None] & mask_y[None]
            nll, g = jnp.where(valid, nll, 0.0), jnp.where(valid, g, 0.0)
        if not grads:
            return (
                sums + jnp.stack([nll.sum(), jnp.zeros_like(sums[0]), jnp.zeros_like(sums[0])]),
                dx,
                dy,
            )
        sums = sums + jnp.stack([nll.sum(), g.sum(), (g * s).sum()])
        g = g.astype(x.dtype)
        dx_rows = lax.dynamic_slice_in_dim(dx, start, rows) + _matmul(g, y)
        dx = lax.dynamic_update_slice_in_dim(dx, dx_rows, start, 0)
        return sums, dx, dy + _matmul(g.T, x_rows)

    carry = (sums, dx, ring.zeros(y.shape) if grads else None)
    whole, rest = divmod(n, ring.tile)
    carry = lax.fori_loop(0, whole, lambda i, c: add(i * ring.tile, ring.tile, c), carry)
    return add(whole * ring.tile, rest, carry) if rest else carry


def _matmul(a, b) -> Array:
    # f32 in, f32 throughout (not TF32 or bf16 passes); bf16 in, f32 accumulation.
    precision = "highest" if a.dtype == jnp.float32 else None
    return jnp.matmul(a, b, precision=precision, preferred_element_type=jnp.float32)
