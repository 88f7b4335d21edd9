"""Attention of the towers, in the implementation that suits the devices.

The definition is `jax.nn.dot_product_attention`; every implementation returns its numbers, but for
rounding.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Bool, Float

from siglip.towers.remat import ATTENDED, KEY, QUERY, VALUE, WEIGHTS

OPTIONS = ("auto", "xla", "fused")  # of make_model
# 'xla': the definition. 'tpu': the same in operations arranged for TPUs. 'cudnn', 'fused': kernels,
# of NVIDIA and of fused_attention.py.
IMPLEMENTATIONS = ("xla", "tpu", "cudnn", "fused")

Mask = Bool[Array, "n l"] | None  # True: a token to attend to; None: every token
KeyMask = Bool[Array, "n 1 1 m"] | None


def resolve(option: str, devices: Sequence[Any] | None = None) -> str:
    """The implementation that an option of make_model stands for.

    Args:
      devices: those that the program will run on; default: the local ones.

    Raises:
      ValueError: an unknown option, or 'fused' for devices that have no such kernel.
    """
    if option not in OPTIONS:
        raise ValueError(f"attention {option!r} is none of {', '.join(OPTIONS)}")
    device = (jax.local_devices() if devices is None else devices)[0]
    if device.platform == "tpu":
        return "tpu" if option == "auto" else option
    if option != "xla" and has_cudnn(device):
        return "cudnn"
    if option == "fused":
        raise ValueError(
            "attention 'fused' has kernels for TPUs, and with cuDNN for NVIDIA GPUs from Ampere "
            f"on, not for {device.device_kind}; 'auto' takes what there is"
        )
    return "xla"


def has_cudnn(device: Any) -> bool:
    """Whether this is an NVIDIA GPU of the Ampere generation or newer, and cuDNN is installed."""
    kind, capability = device.device_kind, getattr(device, "compute_capability", None)
    if not kind.startswith("NVIDIA") or capability is None or float(capability) < 8.0:
        return False
    x = jax.ShapeDtypeStruct((1, 2, 1, 8), jnp.bfloat16)
    attend = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    try:  # JAX asks for the version as soon as it traces; without a GPU cuDNN may be absent
        jax.eval_shape(attend, x, x, x)
    except RuntimeError:
        return False
    return True


def attention(num_heads: int, dtype: Any, implementation: str, attention_fn=None) -> nn.Module:
    """Multi-head attention with the parameters query, key, value [W, H, W/H] and out.

    Args:
      implementation: one of IMPLEMENTATIONS, which takes what it can; the rest is left to XLA.
      attention_fn: in the place of dot_product_attention with that implementation.
    """

    def attend(query, key, value, mask=None, **unused):
        # There is no dropout, and only NaFlex patches have a mask: padding of texts is attended to.
        del unused
        return dot_product_attention(implementation, query, key, value, mask)

    return nn.MultiHeadDotProductAttention(
        num_heads=num_heads,
        dtype=dtype,
        kernel_init=nn.initializers.xavier_uniform(),
        attention_fn=attention_fn or attend,
        name="MultiHeadDotProductAttention_0",
    )


def key_mask(mask: Mask) -> KeyMask:
    """The mask of the keys, alike for every head and query.

    Where nothing is True (a bad example) all weights are equal and the values finite: attention
    puts a large negative number in the place of masked logits, not -inf.
    """
    return None if mask is None else mask[:, None, None, :]


def dot_product_attention(
    implementation: str,
    query: Float[Array, "n l h d"],
    key: Float[Array, "n m h d"],
    value: Float[Array, "n m h d"],
    mask: KeyMask = None,
) -> Float[Array, "n l h d"]:
    """softmax(query key^T / sqrt(d)) value over the keys of the mask."""
    kernel = implementation == "fused" and in_shard_map() and fits_fused(query, key)
    if implementation in ("tpu", "fused") and not kernel and fits_tpu(query, key):
        return _tpu_attention(query, key, value, mask)
    query, key, value = _named(query, key, value)
    if kernel:
        from siglip.towers.fused_attention import fused_attention

        out = fused_attention(query, key, value, mask)
    else:
        cudnn = implementation == "cudnn" and mask is None and fits_cudnn(query, key)
        out = jax.nn.dot_product_attention(
            query, key, value, mask=mask, implementation="cudnn" if cudnn else None
        )
    return checkpoint_name(out, ATTENDED)


def _named(query, key, value):
    return map(checkpoint_name, (query, key, value), (QUERY, KEY, VALUE))


def fits_cudnn(query: Float[Array, "n l h d"], key: Float[Array, "n m h d"]) -> bool:
    """Whether cuDNN's fused attention takes these shapes, forward and backward.

    It takes neither float32 nor the single query of a pooling head; XLA computes those.
    """
    lengths, head_dim = (query.shape[1], key.shape[1]), query.shape[3]
    sizes = all(n % 2 == 0 for n in lengths) and head_dim % 8 == 0 and head_dim <= 128
    return sizes and query.dtype == jnp.bfloat16


def in_shard_map() -> bool:
    """Whether arrays are one device's own: the kernel for TPUs works on nothing else.

    The training step's are. Elsewhere, as in evaluators, XLA computes attention.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return bool(mesh.axis_names) and set(mesh.manual_axes) == set(mesh.axis_names)


def fits_fused(query: Float[Array, "n l h d"], key: Float[Array, "n m h d"]) -> bool:
    """Whether the kernel for TPUs takes these shapes: short self-attention."""
    from siglip.towers.fused_attention import MAX_LENGTH

    return query.shape == key.shape and query.shape[1] <= MAX_LENGTH


def fits_tpu(query: Float[Array, "n l h d"], key: Float[Array, "n m h d"]) -> bool:
    """Whether the operations arranged for TPUs are the faster ones, by XLA's estimate.

    Not for less than a register's 128 lanes of tokens, where XLA lays examples along the lanes.
    """
    long = query.shape == key.shape and query.shape[1] >= 128
    return long and query.dtype == jnp.bfloat16


# Attention for TPUs, where XLA makes slow programs of the definition: it writes the logits in
# float32 and lays examples along the lanes of some operations on them, with a copy of the whole
# array before and after. Here logits never leave the matmul that yields them: their maximum is
# computed by one matmul, their exponentials by another, which are written in bfloat16 and kept for
# the backward pass. See docs/log.md, 2026-11-30, for what else was tried.

MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)  # as jax.nn.dot_product_attention


@jax.custom_vjp
def _tpu_attention(query, key, value, mask):
    return _tpu_forward(query, key, value, mask)[0]


def _tpu_forward(query, key, value, mask):
    query, key, value = _rows(query), _rows(key), _rows(value)
    scale = 1 / math.sqrt(query.shape[-1])
    peak = jnp.max(_logits(query, key, mask), axis=-1, keepdims=True)
    # The barrier keeps XLA from computing the logits once, which it would have to write.
    query, key, peak = jax.lax.optimization_barrier((query, key, peak))
    weights = _squares(jnp.exp((_logits(query, key, mask) - peak) * scale).astype(query.dtype))
    # Weights add up to 1 as they are multiplied, in bfloat16.
    share = 1 / jnp.sum(weights, axis=-1, keepdims=True, dtype=jnp.float32)
    out = _matmul("nhqk,nkhd->nqhd", weights, value) * _swapped(share)
    out = checkpoint_name(out.astype(query.dtype), ATTENDED)
    # Names of what remat may keep. They are given behind all that the forward pass computes:
    # jax.checkpoint rounds what is kept again (reduce_precision), in a pass of its own over the
    # weights, unless nothing else reads it.
    weights, share = checkpoint_name(weights, WEIGHTS), checkpoint_name(share, WEIGHTS)
    return out, (*_named(query, key, value), mask, out, weights, share)


def _tpu_backward(residuals, grad):
    query, key, value, mask, out, weights, share = residuals
    dtype, scale = query.dtype, 1 / math.sqrt(query.shape[-1])
    along = jnp.sum(grad.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    dweights = _matmul("nqhd,nkhd->nhqk", grad, value) - _swapped(along)
    if mask is not None:  # what a mask replaced has no gradient, also where everything is masked
        dweights = jnp.where(mask, dweights, 0)
    dlogits = _squares((weights.astype(jnp.float32) * (dweights * (share * scale))).astype(dtype))
    dquery = _matmul("nhqk,nkhd->nqhd", dlogits, key).astype(dtype)
    dkey = _matmul("nhqk,nqhd->nkhd", dlogits, query).astype(dtype)
    shared = (grad * _swapped(share)).astype(dtype)
    dvalue = _matmul("nhqk,nqhd->nkhd", weights, shared).astype(dtype)
    return dquery, dkey, dvalue, None


_tpu_attention.defvjp(_tpu_forward, _tpu_backward)


def _matmul(spec: str, a: Array, b: Array) -> Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _logits(query, key, mask):
    logits = _matmul("nqhd,nkhd->nhqk", query, key)
    return logits if mask is None else jnp.where(mask, logits, MASKED)


def _swapped(x: Float[Array, "n a b 1"]) -> Float[Array, "n b a 1"]:
    return jnp.swapaxes(x, 1, 2)


def _rows(x: Float[Array, "n l h d"]) -> Float[Array, "n l h d"]:
    """Laid out as [n, h, d, l], which is how the matmuls want it."""
    return with_layout_constraint(x, Layout((0, 2, 3, 1)))


def _squares(x: Float[Array, "n h q k"]) -> Float[Array, "n h q k"]:
    """Laid out as [n, h, k, q], where sums over keys are cheap."""
    return with_layout_constraint(x, Layout((0, 1, 3, 2)))
