"""Mean and largest logit of the positives and of the negatives of a batch, to watch training."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float

from siglip.losses.cycle import ring_order


def logit_stats(
    zimg: Float[Array, "N d"],
    ztxt: Float[Array, "N d"],
    t: Float[Array, ""],
    b: Float[Array, ""],
    mask: Bool[Array, " N"],
    *,
    mesh: Mesh,
    rows: int = 256,
) -> dict[str, Float[Array, ""]]:
    """Statistics of the logits of all pairs of the global batch whose rows are True in `mask`.

    The mean over negatives needs no logits: sum_ij x_i.y_j = (sum_i x_i).(sum_j y_j). Only their
    maximum meets every pair: one matmul, `rows` images at a time, texts round the ring.

    Args:
      rows: images whose logits with a block of texts are in memory at a time.

    Returns:
      pos_logit_mean, pos_logit_max, neg_logit_mean, neg_logit_max (-inf without negatives).
    """
    valid = mask.astype(jnp.float32)
    pairs = jnp.maximum(valid.sum(), 1)
    s_pos = jnp.sum(zimg * ztxt, axis=1)
    s_all = jnp.vdot(valid @ zimg, valid @ ztxt)
    s_neg = (s_all - jnp.vdot(s_pos, valid)) / jnp.maximum(pairs * (pairs - 1), 1)
    return {
        "pos_logit_mean": t * jnp.vdot(s_pos, valid) / pairs + b,
        "pos_logit_max": t * jnp.max(s_pos, where=mask, initial=-jnp.inf) + b,
        "neg_logit_mean": t * s_neg + b,
        "neg_logit_max": t * _max_negative(mesh, rows, zimg, ztxt, mask) + b,
    }


def _max_negative(mesh: Mesh, rows: int, zimg, ztxt, mask) -> Array:
    """The largest cosine of an image with the text of another image, over all devices."""
    axes, devices = tuple(mesh.axis_names), mesh.size
    order = ring_order(mesh, axes)
    to_next = list(zip(order, (*order[1:], order[0])))

    def tour(x, y, mask_x):
        n = len(x)

        def visit(carry, step):
            largest, text = carry
            y, mask_y = text

            def tile(args):
                i, x_i, valid_i = args  # one image against the block, `rows` of them at a time
                s = y @ x_i
                own_pair = (lax.iota(jnp.int32, n) == i) & (step == 0)
                return jnp.max(s, where=mask_y & valid_i & ~own_pair, initial=-jnp.inf)

            maxima = lax.map(tile, (lax.iota(jnp.int32, n), x, mask_x), batch_size=min(rows, n))
            text = jax.tree.map(lambda a: lax.ppermute(a, axes, to_next), text)
            return (jnp.maximum(largest, maxima.max()), text), None

        start = lax.pcast(jnp.float32(-jnp.inf), axes, to="varying")
        (largest, _), _ = lax.scan(visit, (start, (y, mask_x)), jnp.arange(devices))
        return lax.pmax(largest, axes)

    spec = PartitionSpec(axes)
    f = jax.shard_map(tour, mesh=mesh, in_specs=(spec,) * 3, out_specs=PartitionSpec())
    return f(zimg, ztxt, mask)
