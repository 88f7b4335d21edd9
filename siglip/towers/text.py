"""The text tower: a bidirectional transformer over padded tokens, pooled at the last one."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from siglip.towers.groups import check_group
from siglip.towers.transformer import (
    Encoder,
    MAPHead,
    Outputs,
    check_capture,
    check_sizes,
    decode_variant,
)

POOLS = ("last", "first", "gap", "max", "map")


class TextTransformer(nn.Module):
    """Tokens -> transformer -> one vector -> Dense head.

    There is no padding mask, as in the released models: texts are padded to the full length, the
    last token is always padding or EOS, and it attends to everything.
    """

    vocab_size: int
    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    pool: str
    out_dim: int | None
    bottleneck: int | None
    dtype: jnp.dtype
    scan: bool
    remat: str
    attention: str
    group: int

    @nn.compact
    def __call__(
        self,
        text: Int[Array, "n l"],
        *,
        train: bool = False,
        capture: tuple[str, ...] = (),
    ) -> tuple[Float[Array, "n d"], Outputs]:
        """The embedding before it is normalised, and what leads to it.

        Args:
          text: token ids, padded to the length the tower was initialised with.
          train: changes nothing in this tower.
          capture: what is computed or kept only where it is asked for: 'attention', 'block:i'.

        Returns:
          z [n, out_dim or width], and a dict with
            tokens [n, l, width]: after the last LayerNorm.
            mask: None, for padding is attended to like every other token.
            pooled [n, width]: the tokens in one vector, before the head.
            attention [n, heads, l]: weights of the MAP head, which sum to 1 over l.
            block:i [n, l, width]: output of block i, float32; from the last one if negative.

        Raises:
          ValueError: a name in `capture` is no output of this tower.
        """
        del train
        check_capture(capture, self.depth, self.pool)
        normal = nn.initializers.normal
        # A table V x K and a projection K x W instead of V x W, for large vocabularies (mSigLIP).
        embed_dim = self.bottleneck or self.width
        # float32: the gradient of the table adds up as many rows as a token occurs in the batch,
        # and padding is in every text; in bfloat16 such a sum stops growing.
        x = nn.Embed(
            self.vocab_size, embed_dim, dtype=jnp.float32, embedding_init=normal(embed_dim**-0.5)
        )(text)
        if self.bottleneck:
            x = nn.Dense(self.width, use_bias=False, dtype=self.dtype, name="embed_projection")(x)
        init = normal(self.width**-0.5)
        pos = self.param("pos_embedding", init, (1, x.shape[1], self.width))
        x = x + pos  # float32, and so is every sum of residuals

        x, captured = Encoder(
            self.depth, self.mlp_dim, self.num_heads, self.dtype, self.scan, self.remat,
            self.attention, self.group, name="Encoder_0",
        )(x, capture=capture)  # fmt: skip
        out: Outputs = {"tokens": x, "mask": None, **captured}
        match self.pool:
            case "last":
                x = x[:, -1]
            case "first":
                x = x[:, 0]
            case "gap":
                x = x.mean(axis=1)
            case "max":
                x = x.max(axis=1)
            case "map":
                head = MAPHead(self.mlp_dim, self.num_heads, self.dtype, self.attention)
                x, captured = head(x, capture=capture)
                out.update(captured)
        out["pooled"] = x
        if self.out_dim is not None:
            x = nn.Dense(self.out_dim, dtype=self.dtype, name="head")(x)
        return x, out


def make_text(
    dtype: str = "float32",
    scan: bool = False,
    remat: str = "none",
    attention: str = "xla",
    *,
    variant: str = "B",
    width: int | None = None,
    depth: int | None = None,
    mlp_dim: int | None = None,
    num_heads: int | None = None,
    vocab_size: int | None = None,
    pool: str = "last",
    out_dim: int | None = None,
    bottleneck: int | None = None,
    group: int = 0,
) -> TextTransformer:
    """A text tower by name.

    Args:
      dtype, scan, remat, attention: as in vit.make_vit.
      variant: a name of transformer.VARIANTS: 'B', 'So400m', ...
      width, depth, mlp_dim, num_heads: replaces that of the variant; None keeps it.
      vocab_size: rows of the token table; the trainer fills in its tokenizer's.
      pool: 'last' token, 'first', 'gap' (mean), 'max', or 'map' (attention pooling).
      out_dim: width of the Dense head; 0 or None has none. make_model fills in the width of the
        image embedding in the place of None.
      bottleneck: K, for a token table of V x K followed by a K x width projection; None has none.
      group: texts that a block takes at a time in training, a divisor of those of a device; for
        TPU v4, see siglip.towers.groups; 0: all.

    Raises:
      ValueError: an invalid value.
    """
    sizes, patch_size = decode_variant(variant)
    if patch_size is not None:
        raise ValueError(f"variant {variant!r} of the text tower must not have a patch size")
    if pool not in POOLS:
        raise ValueError(f"pool {pool!r} of the text tower is none of {', '.join(POOLS)}")
    if vocab_size is None:
        raise ValueError("the text tower needs vocab_size, the number of its tokenizer's ids")
    replaced = dict(width=width, depth=depth, mlp_dim=mlp_dim, num_heads=num_heads)
    sizes |= {k: v for k, v in replaced.items() if v is not None}
    check_sizes("text", sizes)
    check_group("text", group)
    return TextTransformer(
        vocab_size,
        **sizes,
        pool=pool,
        out_dim=out_dim or None,
        bottleneck=bottleneck,
        dtype=jnp.dtype(dtype),
        scan=scan,
        remat=remat,
        attention=attention,
        group=group,
    )
