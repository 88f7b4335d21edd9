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

from siglip.sharding import in_shard_map
from siglip.towers.remat import ATTENDED, KEY, QUERY, VALUE, WEIGHTS

OPTIONS = ("auto", "xla", "fused")  # of make_model
# 'xla': the definition. 'tpu': the same in operations arranged for TPUs. 'cudnn', 'fused': kernels,
# of NVIDIA and of fused_attention.py.
IMPLEMENTATIONS = ("xla", "tpu", "cudnn", "fused")

LANES = 128  # of a TPU's registers

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


def attention(
    num_heads: int, dtype: Any, implementation: str, attention_fn=None, *, packs: bool = True
) -> nn.Module:
    """Multi-head attention with the parameters query, key, value [W, H, W/H] and out.

    Args:
      implementation: one of IMPLEMENTATIONS, which takes what it can; the rest is left to XLA.
      attention_fn: in the place of dot_product_attention with that implementation.
      packs: whether 'tpu' may take heads in packs, which spares copies but not matmuls.
    """

    def attend(query, key, value, mask=None, **unused):
        # There is no dropout, and only NaFlex patches have a mask: padding of texts is attended to.
        del unused
        return dot_product_attention(implementation, query, key, value, mask, packs=packs)

    packing = packs and implementation == "tpu" and attention_fn is None
    return (_Packing if packing else nn.MultiHeadDotProductAttention)(
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
    *,
    packs: bool = True,
) -> Float[Array, "n l h d"]:
    """softmax(query key^T / sqrt(d)) value over the keys of the mask."""
    kernel = implementation == "fused" and in_shard_map() and fits_fused(query, key)
    if (
        implementation in ("tpu", "fused")
        and not kernel
        and fits_tpu(query.shape, key.shape, query.dtype)
    ):
        return _tpu_attention(query, key, value, mask, packs)
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


def fits_fused(query: Float[Array, "n l h d"], key: Float[Array, "n m h d"]) -> bool:
    """Whether the kernel for TPUs takes these shapes: short self-attention."""
    from siglip.towers.fused_attention import MAX_LENGTH

    return query.shape == key.shape and query.shape[1] <= MAX_LENGTH


def fits_tpu(query: Sequence[int], key: Sequence[int], dtype: Any) -> bool:
    """Whether the operations arranged for TPUs are the faster ones, by XLA's estimate.

    Not for less than a register's 128 lanes of tokens, where XLA lays examples along the lanes.

    Args:
      query, key: shapes [n, l, h, d].
    """
    return tuple(query) == tuple(key) and query[1] >= LANES and dtype == jnp.bfloat16


# Attention for TPUs, where XLA makes slow programs of the definition: it writes the logits in
# float32 and lays examples along the lanes of some operations on them, with a copy of the whole
# array before and after. Here logits never leave the matmul that yields them: their maximum is
# computed by one matmul, their exponentials by another, which are written in bfloat16 and kept for
# the backward pass. Two heads of 64 lie side by side along the 128 lanes of a register (a "pack"),
# as the projections yield them; a matmul for one of them sees zeros in the place of the other, and
# takes no longer, as the matrix unit has 128 rows. See docs/log.md, 2026-11-30, for figures and for
# what else was tried.

MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)  # as jax.nn.dot_product_attention

Packed = Float[Array, "n l p c"]  # p packs of heads, whose c numbers stand head by head


class _Packing(nn.MultiHeadDotProductAttention):
    """Attention with the same parameters, whose projections yield packs if _tpu_attention does.

    From arrays with heads of their own XLA copies each, and its gradient, into another layout.
    """

    @nn.compact
    def __call__(self, inputs_q: Array, inputs_k: Array, *, mask: KeyMask = None) -> Array:  # type: ignore
        heads = (self.num_heads, inputs_q.shape[2] // self.num_heads)
        shapes = ((*x.shape[:2], *heads) for x in (inputs_q, inputs_k))
        pack = _heads_in_pack(*heads)
        if self.is_initializing() or pack == 1 or not fits_tpu(*shapes, self.dtype):  # type: ignore
            return super().__call__(inputs_q, inputs_k, mask=mask)

        def packed(x, name):
            kernel, bias = parameters[name]["kernel"], parameters[name]["bias"]
            kernel = kernel.reshape(-1, heads[0] // pack, LANES)
            return jnp.einsum("nlw,wpc->nlpc", x, kernel) + bias.reshape(1, 1, *kernel.shape[1:])

        parameters: Any = jax.tree.map(lambda x: x.astype(self.dtype), self.variables["params"])
        query, key = packed(inputs_q, "query"), packed(inputs_k, "key")
        value = packed(inputs_k, "value")
        out: Any = _packed_attention(pack, query, key, value, mask)
        kernel = parameters["out"]["kernel"].reshape(*out.shape[2:], -1)
        return jnp.einsum("nlpc,pcw->nlw", out, kernel) + parameters["out"]["bias"].reshape(
            1, 1, -1
        )


def _heads_in_pack(heads: int, dim: int) -> int:
    return 2 if 2 * dim == LANES and heads % 2 == 0 else 1


def _tpu_attention(query, key, value, mask, packs=True):
    n, length, heads, dim = query.shape
    pack = _heads_in_pack(heads, dim) if packs else 1
    packed = (x.reshape(n, length, heads // pack, pack * dim) for x in (query, key, value))
    out: Any = _packed_attention(pack, *packed, mask)
    return out.reshape(query.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _packed_attention(pack, query, key, value, mask):
    return _tpu_forward(pack, query, key, value, mask)[0]


def _tpu_forward(pack, query, key, value, mask):
    query, key, value = (_held(pack, x) for x in (query, key, value))
    scale = 1 / math.sqrt(query.shape[-1] // pack)
    peaks = [_logits(q, key, mask).max(axis=-1, keepdims=True) for q in _each(pack, query)]
    # The barrier keeps XLA from computing the logits once, which it would have to write.
    query, key, peaks = jax.lax.optimization_barrier((query, key, peaks))
    logits = (_logits(q, key, mask) for q in _each(pack, query))
    weights = [
        _squares(jnp.exp((x - p) * scale).astype(query.dtype)) for x, p in zip(logits, peaks)
    ]
    # Weights add up to 1 as they are multiplied, in bfloat16.
    shares = [1 / jnp.sum(w, axis=-1, keepdims=True, dtype=jnp.float32) for w in weights]
    outs = [_matmul("npqk,nkpc->nqpc", w, value) * _swapped(s) for w, s in zip(weights, shares)]
    out = checkpoint_name(_yielded(outs, query.dtype), ATTENDED)
    # Names of what remat may keep. They are given behind all that the forward pass computes:
    # jax.checkpoint rounds what is kept again (reduce_precision), in a pass of its own over the
    # weights, unless nothing else reads it.
    weights, shares = checkpoint_name((weights, shares), WEIGHTS)
    return out, (*_named(query, key, value), mask, out, weights, shares)


def _tpu_backward(pack, residuals, grad):
    query, key, value, mask, out, weights, shares = residuals
    dtype, scale = query.dtype, 1 / math.sqrt(query.shape[-1] // pack)
    grad = _held(pack, grad) if pack > 1 else grad
    product = grad.astype(jnp.float32) * out.astype(jnp.float32)
    dqueries, dkeys, dvalues = [], [], []
    for w, share, own, g in zip(weights, shares, _each(pack, product), _each(pack, grad)):
        along = _swapped(jnp.sum(own, axis=-1, keepdims=True))
        dweights = _matmul("nqpc,nkpc->npqk", g, value) - along
        if mask is not None:  # what a mask replaced has no gradient, also where all is masked
            dweights = jnp.where(mask, dweights, 0)
        dlogits = _squares((w.astype(jnp.float32) * (dweights * (share * scale))).astype(dtype))
        shared = (grad * _swapped(share)).astype(dtype)
        dqueries.append(_matmul("npqk,nkpc->nqpc", dlogits, key))
        dkeys.append(_matmul("npqk,nqpc->nkpc", dlogits, query))
        dvalues.append(_matmul("npqk,nqpc->nkpc", w, shared))
    return *(_yielded(x, dtype) for x in (dqueries, dkeys, dvalues)), None


_packed_attention.defvjp(_tpu_forward, _tpu_backward)


def _matmul(spec: str, a: Array, b: Array) -> Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _logits(query, key, mask):
    logits = _matmul("nqpc,nkpc->npqk", query, key)
    return logits if mask is None else jnp.where(mask, logits, MASKED)


def _each(pack: int, x: Packed) -> list[Packed]:
    """x for each head of a pack, with zeros in the place of the other one."""
    if pack == 1:
        return [x]
    first = _first(x)
    return [jnp.where(first, x, 0), jnp.where(first, 0, x)]


def _yielded(parts: list[Packed], dtype: Any) -> Packed:
    """The numbers of each head of a pack out of its own array.

    A single head's are not held in a layout: jit would return them in it, as if they were in rows.
    """
    if len(parts) == 1:
        return parts[0].astype(dtype)
    return _held(len(parts), jnp.where(_first(parts[0]), *parts).astype(dtype))


def _first(x: Packed) -> Bool[Array, " c"]:
    """Which numbers of a pack of two are the first head's."""
    return jnp.arange(x.shape[-1]) < x.shape[-1] // 2


def _swapped(x: Float[Array, "n a b 1"]) -> Float[Array, "n b a 1"]:
    return jnp.swapaxes(x, 1, 2)


def _held(pack: int, x: Packed) -> Packed:
    """Laid out as the matmuls want it: packs in rows, single heads in columns."""
    return with_layout_constraint(x, Layout((0, 2, 1, 3) if pack > 1 else (0, 2, 3, 1)))


def _squares(x: Float[Array, "n p q k"]) -> Float[Array, "n p q k"]:
    """Laid out as [n, p, k, q], where sums over keys are cheap."""
    return with_layout_constraint(x, Layout((0, 1, 3, 2)))
