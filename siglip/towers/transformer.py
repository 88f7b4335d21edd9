"""Transformer parts of both towers. Submodules are named as in the released checkpoints."""

import functools
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from siglip.towers.attention import Mask, attention, dot_product_attention, key_mask
from siglip.towers.groups import in_groups, takes_groups
from siglip.towers.remat import HIDDEN, PROJECTED, remat_block
from siglip.towers.shards import gathering

# name: (width, depth, mlp_dim, num_heads). Table 2 of "Scaling Vision Transformers" (2106.04560);
# So400m from 2305.13035, g-opt from SigLIP 2 (2502.14786).
VARIANTS = {
    "mu": (32, 1, 128, 2),
    "Ti": (192, 12, 768, 3),
    "S": (384, 12, 1536, 6),
    "M": (512, 12, 2048, 8),
    "B": (768, 12, 3072, 12),
    "L": (1024, 24, 4096, 16),
    "So400m": (1152, 27, 4304, 16),
    "H": (1280, 32, 5120, 16),
    "g": (1408, 40, 6144, 16),
    "g-opt": (1536, 40, 6144, 16),
    "G": (1664, 48, 8192, 16),
    "G-opt": (1536, 48, 8192, 16),
    "e": (1792, 56, 15360, 16),
}

SIZES = ("width", "depth", "mlp_dim", "num_heads")
ATTENTION = "attention"  # to capture: the weights of a MAP head; 'block:i': the output of a block

Outputs = dict[str, Array | None]  # what a tower gives beside z, see ViT and TextTransformer


def decode_variant(variant: str) -> tuple[dict[str, Any], int | None]:
    """Splits 'B/16' into the sizes of B and the patch size (None in 'B').

    Raises:
      ValueError: unknown name, or a patch size that is not a positive integer.
    """
    name, slash, patch = variant.partition("/")
    if name not in VARIANTS:
        raise ValueError(f"variant {variant!r}: {name!r} is none of {', '.join(VARIANTS)}")
    if slash and not (patch.isdigit() and int(patch)):
        raise ValueError(f"variant {variant!r}: the patch size must be a positive integer")
    return dict(zip(SIZES, VARIANTS[name])), int(patch) if slash else None


def check_sizes(tower: str, sizes: dict[str, int]) -> None:
    """Raises ValueError for sizes that no tower can have; `tower` is its name in the message."""
    for name in SIZES:
        if sizes[name] < (0 if name == "depth" else 1):
            raise ValueError(f"{name} of the {tower} tower must be positive, not {sizes[name]}")
    if sizes["width"] % sizes["num_heads"]:
        raise ValueError(
            f"width {sizes['width']} of the {tower} tower does not divide into "
            f"{sizes['num_heads']} heads"
        )


def check_capture(capture: tuple[str, ...], depth: int, pool: str) -> None:
    """Raises ValueError for a name that is no output of a tower of this depth and pool."""
    for name in capture:
        if name != ATTENTION:
            block_index(name, depth)
        elif pool != "map":
            raise ValueError(
                f"{ATTENTION!r} needs a tower with attention pooling (pool 'map'), not {pool!r}"
            )


def block_index(name: str, depth: int) -> int:
    """The index from 0 of 'block:i', where a negative i counts from the last block.

    Raises:
      ValueError: another name, or the tower has no such block.
    """
    match = re.fullmatch(r"block:(-?\d+)", name)
    if match is None:
        raise ValueError(f"{name!r} is neither {ATTENTION!r} nor a block such as 'block:-2'")
    if not -depth <= int(match[1]) < depth:
        raise ValueError(
            f"{name!r} is not in a tower of {depth} blocks: 0 to {depth - 1}, or -{depth} to -1"
        )
    return int(match[1]) % depth


class MlpBlock(nn.Module):
    """Dense, GELU, Dense: width -> mlp_dim -> width.

    XLA computes GELU anew for every tile of the second matmul, except with `gelu_once`.
    """

    mlp_dim: int
    dtype: jnp.dtype
    gelu_once: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        dense = functools.partial(
            nn.Dense,
            dtype=self.dtype,
            kernel_init=nn.initializers.xavier_uniform(),
            bias_init=nn.initializers.normal(1e-6),
        )
        width = x.shape[-1]
        x = checkpoint_name(dense(self.mlp_dim)(x), HIDDEN)
        x = nn.gelu(x, approximate=True)  # tanh, as in the released models
        return dense(width)(jax.lax.optimization_barrier(x) if self.gelu_once else x)


class EncoderBlock(nn.Module):
    """A pre-LayerNorm block: x -> (x, output), which `nn.scan` carries on and stacks.

    The output is x with `keep_output`, else None, so that a scan stacks nothing. More than `group`
    examples go through it in groups, `remat` inside.
    """

    mlp_dim: int
    num_heads: int
    dtype: jnp.dtype
    attention: str = "xla"
    keep_output: bool = False
    group: int = 0
    remat: str = "none"

    @nn.compact
    def __call__(
        self, x: Float[Array, "n l d"], mask: Mask = None
    ) -> tuple[Float[Array, "n l d"], Float[Array, "n l d"] | None]:
        if takes_groups(x, self.group):
            x = in_groups(EncoderBlock._residuals_of_group, self.group, self.remat)(self, x, mask)
        else:
            x = self._residuals(x, mask)
        return x, x if self.keep_output else None

    def _residuals_of_group(self, x: Float[Array, "n l d"], mask: Mask) -> Float[Array, "n l d"]:
        return self._residuals(x, mask, in_group=True)

    def _residuals(
        self, x: Float[Array, "n l d"], mask: Mask, in_group: bool = False
    ) -> Float[Array, "n l d"]:
        norm = functools.partial(nn.LayerNorm, epsilon=1e-6, dtype=self.dtype)
        y = norm()(x)
        # What a group computes stays on the chip, where copies are cheap and more work is not.
        attend = attention(self.num_heads, self.dtype, self.attention, packs=not in_group)
        x = x + checkpoint_name(attend(y, y, mask=key_mask(mask)), PROJECTED)
        return x + MlpBlock(self.mlp_dim, self.dtype, gelu_once=in_group)(norm()(x))


class Encoder(nn.Module):
    """`depth` blocks and a final LayerNorm.

    With `scan`, one traced block runs over parameters with a leading layer axis (`encoderblock`):
    it compiles in the time of one layer. Without, blocks are `encoderblock_0`, `encoderblock_1`...
    `stack_blocks` and `unstack_blocks` turn one tree into the other. `remat` is what the
    backward pass computes again, see siglip.towers.remat; `group`, see siglip.towers.groups.
    """

    depth: int
    mlp_dim: int
    num_heads: int
    dtype: jnp.dtype
    scan: bool
    remat: str
    attention: str = "xla"
    group: int = 0

    @nn.compact
    def __call__(
        self, x: Float[Array, "n l d"], mask: Mask = None, capture: tuple[str, ...] = ()
    ) -> tuple[Float[Array, "n l d"], dict[str, Float[Array, "n l d"]]]:
        """(tokens after the LayerNorm, output of each block that `capture` names).

        A block's output is the float32 sum of residuals. With `scan` those of all blocks are in
        memory while one is asked for.
        """
        kept = {name: block_index(name, self.depth) for name in capture if name != ATTENTION}
        # In the training step parameters may be shards: 'full' gathers them for the backward pass
        # again, else they are gathered outside of what is recomputed, and kept.
        regather, grouped = self.remat == "full", takes_groups(x, self.group)
        # Gradients of groups are added up in the type of what is gathered outside of their loop.
        gather = functools.partial(gathering, variables=self.variables, in_float32=grouped)
        block = gather(EncoderBlock) if regather else EncoderBlock
        if regather or not grouped:
            block = remat_block(block, self.remat, scan=self.scan)
        if not regather:
            block = gather(block)
        sizes: dict[str, Any] = dict(
            mlp_dim=self.mlp_dim,
            num_heads=self.num_heads,
            dtype=self.dtype,
            attention=self.attention,
            keep_output=bool(kept),
            group=self.group,
            remat=self.remat,
        )
        if self.scan:
            layers = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,  # type: ignore  # flax says int
                length=self.depth,
            )
            x, outputs = layers(name="encoderblock", **sizes)(x, mask)
        else:
            outputs: Any = []
            for i in range(self.depth):
                x, output = block(name=f"encoderblock_{i}", **sizes)(x, mask)
                outputs.append(output)
        tokens = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="encoder_norm")(x)
        return tokens, {name: outputs[i] for name, i in kept.items()}


class MAPHead(nn.Module):
    """Multihead attention pooling (MAP): one learned query attends to all tokens (2106.04560)."""

    mlp_dim: int
    num_heads: int
    dtype: jnp.dtype
    attention: str = "xla"

    @nn.compact
    def __call__(
        self, x: Float[Array, "n l d"], mask: Mask = None, capture: tuple[str, ...] = ()
    ) -> tuple[Float[Array, "n d"], dict[str, Float[Array, "n heads l"]]]:
        """(pooled vector, {'attention': float32 weights that sum to 1} where `capture` names it).

        The weights are computed beside the pooling, which stays the same to the last bit.
        """
        captured = {}

        def attend(query, key, value, mask=None, **unused):
            del unused  # there is no dropout
            if ATTENTION in capture:
                query32, key32 = query.astype(jnp.float32), key.astype(jnp.float32)
                weights = nn.dot_product_attention_weights(query32, key32, mask=mask)
                captured[ATTENTION] = weights[:, :, 0]  # [n, heads, 1, l]: one query
            return dot_product_attention(self.attention, query, key, value, mask)

        n, _, width = x.shape
        probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, width))
        probe = jnp.tile(probe, (n, 1, 1))
        pool = attention(self.num_heads, self.dtype, self.attention, attend)
        x = pool(probe, x, mask=key_mask(mask))
        x = x.astype(jnp.float32)
        y = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype)(x)
        return (x + MlpBlock(self.mlp_dim, self.dtype)(y))[:, 0], captured


def stack_blocks(encoder: dict) -> dict:
    """`encoderblock_i` -> `encoderblock` with a leading layer axis, for `scan`."""
    blocks = {k: v for k, v in encoder.items() if k.startswith("encoderblock_")}
    rest = {k: v for k, v in encoder.items() if k not in blocks}
    layers = [blocks[f"encoderblock_{i}"] for i in range(len(blocks))]
    return {**rest, "encoderblock": jax.tree.map(lambda *xs: jnp.stack(xs), *layers)}


def unstack_blocks(encoder: dict) -> dict:
    """The inverse of `stack_blocks`."""
    stacked = encoder["encoderblock"]
    depth = len(jax.tree.leaves(stacked)[0])
    rest = {k: v for k, v in encoder.items() if k != "encoderblock"}
    layers = {f"encoderblock_{i}": jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(depth)}
    return {**rest, **layers}
