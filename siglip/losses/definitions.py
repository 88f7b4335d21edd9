"""The losses as definitions: what every faster version must equal, value and gradients."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from siglip.losses.facts import check_needs


@dataclasses.dataclass(frozen=True)
class Loss:
    """A loss of the embeddings of a whole batch; calling it calls `fn`.

    Attributes:
      fn: fn(zimg, ztxt, t, b, mask, **facts) -> scalar, per pair, on global arrays.
      chance: chance(n) is the loss on n pairs of a model that knows only the prior, that one of n
        texts is the image's; None where nobody knows it.
      needs: the facts of a batch that `fn` asks for (facts.FACTS).

    Raises:
      ValueError: `needs` names something that is no fact.
    """

    fn: Callable[..., Float[Array, ""]]
    chance: Callable[[int], float] | None = None
    needs: tuple[str, ...] = ()

    def __post_init__(self):
        check_needs("a loss", self.needs)

    def __call__(self, zimg, ztxt, t, b, mask=None, **facts) -> Float[Array, ""]:
        return self.fn(zimg, ztxt, t, b, mask, **facts)


def sigmoid_loss(
    zimg: Float[Array, "n d"],
    ztxt: Float[Array, "n d"],
    t: Float[Array, ""],
    b: Float[Array, ""] | None,
    mask: Bool[Array, " n"] | None = None,
    z: Int[Array, "n n"] | None = None,
) -> Float[Array, ""]:
    """Pairwise sigmoid loss, the sum over all n x n pairs divided by n (arXiv 2303.15343, Alg. 1).

    Args:
      zimg, ztxt: unit-norm embeddings; row i of both is a pair.
      t: temperature, t = exp(t_prime), > 0. It is never clamped.
      b: bias; None is 0.
      mask: False rows take part in no pair, and n counts the True rows.
      z: +1 for positive pairs, -1 for negative ones, 0 for those that take no part; by default
        pairs (i, i) are positive and all others negative (pairs.labels makes other choices).
    """
    logits = t * jnp.matmul(zimg, ztxt.T, precision="highest") + (0.0 if b is None else b)
    z = 2 * jnp.eye(len(zimg)) - 1 if z is None else z
    nll = jnp.where(z == 0, 0, jax.nn.softplus(-z * logits))
    if mask is None:
        return jnp.sum(nll) / len(zimg)
    return jnp.sum(nll, where=mask[:, None] & mask[None, :]) / jnp.maximum(mask.sum(), 1)


def softmax_loss(
    zimg: Float[Array, "n d"],
    ztxt: Float[Array, "n d"],
    t: Float[Array, ""],
    b: Float[Array, ""] | None = None,
    mask: Bool[Array, " n"] | None = None,
    z: Int[Array, "n n"] | None = None,
) -> Float[Array, ""]:
    """CLIP's loss, the mean of image-to-text and text-to-image cross-entropy over the batch.

    A bias cancels in both softmaxes, so `b` is accepted and has no effect. Rows that `mask` calls
    False are neither queries nor candidates; pairs where `z` is 0 are no candidates of each other.
    The temperature is never clamped.
    """
    del b
    logits = t * jnp.matmul(zimg, ztxt.T, precision="highest")
    if mask is None:
        mask = jnp.ones(len(zimg), bool)
    candidates = mask[:, None] & mask[None, :]
    candidates = candidates if z is None else candidates & (z != 0)
    logits = jnp.where(candidates, logits, -jnp.inf)
    positive = jnp.where(mask, jnp.diagonal(logits), 0.0)

    def cross_entropy(axis: int) -> Array:
        # The inner where keeps a row of -inf (a masked query) from turning into a NaN gradient.
        rows = jnp.where(jnp.expand_dims(mask, axis), logits, 0.0)
        return jnp.sum(jax.nn.logsumexp(rows, axis=axis) - positive, where=mask)

    return (cross_entropy(1) + cross_entropy(0)) / (2 * jnp.maximum(mask.sum(), 1))
