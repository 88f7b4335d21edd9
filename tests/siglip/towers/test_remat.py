"""What blocks keep for the backward pass, in bytes; that results stay is in test_towers.py."""

import jax
import jax.numpy as jnp
import pytest

from siglip.towers.remat import REMAT
from siglip.towers.transformer import Encoder

TOKENS, WIDTH, HEADS = (5, 130), 32, 4  # sizes that no parameter has


def kept(remat: str, scan: bool, depth: int, attention: str = "xla") -> int:
    """Bytes of activations between forward and backward pass."""
    encoder = Encoder(
        depth, 4 * WIDTH, HEADS, jnp.dtype(jnp.bfloat16), scan, remat, attention=attention
    )
    x = jax.ShapeDtypeStruct((*TOKENS, WIDTH), jnp.float32)
    params = jax.eval_shape(encoder.init, jax.random.key(0), x)

    def backward(params, x):
        return jax.vjp(lambda *inputs: encoder.apply(*inputs)[0], params, x)[1]

    residuals = jax.tree.leaves(jax.eval_shape(backward, params, x))
    return sum(r.size * r.dtype.itemsize for r in residuals if set(TOKENS) <= set(r.shape))


@pytest.mark.parametrize("attention", ["xla", "tpu"])
@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize(
    "remat, size", [("elementwise", 22), ("mlp", 12), ("dense", 6), ("full", 4)]
)
def test_blocks_keep_outputs_of_matmuls_and_nothing_else(scan, remat, size, attention):
    """A layer's bytes per token and unit of width, as the table in remat.py says."""
    layer = (kept(remat, scan, 4, attention) - kept(remat, scan, 2, attention)) / 2
    # In bfloat16, and for each query the float32 number that their sum is divided by.
    weights = (2 * TOKENS[1] + 4) * HEADS / WIDTH if attention == "tpu" and remat != "full" else 0
    assert layer == (size + weights) * 5 * 130 * WIDTH


@pytest.mark.parametrize("scan", [False, True])
def test_policies_are_in_the_order_of_what_they_keep(scan):
    sizes = [kept(remat, scan, 2) for remat in REMAT]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(REMAT)
