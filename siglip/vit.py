"""The image tower: a Vision Transformer (arXiv 2010.11929) with SigLIP's attention pooling."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from siglip.transformer import Encoder, MAPHead, check_sizes, decode_variant

POOLS = ("map", "gap", "tok")


class ViT(nn.Module):
    """Patches -> transformer -> one vector, which is the embedding (no projection by default)."""

    patch_size: int
    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    pool: str
    out_dim: int | None
    drop_patches: float
    dtype: jnp.dtype
    scan: bool
    remat: str

    @nn.compact
    def __call__(
        self,
        image: Float[Array, "n res res 3"],
        *,
        rows: Int[Array, " n"] | None = None,
        train: bool = False,
    ) -> Float[Array, "n d"]:
        """`image` in [-1, 1]. With `train` and `drop_patches` it needs an rng named 'dropout'."""
        p = self.patch_size
        if image.shape[1] % p or image.shape[2] % p:
            raise ValueError(f"images of {image.shape[1:3]} do not divide into {p} x {p} patches")
        x = nn.Conv(
            self.width, (p, p), strides=(p, p), padding="VALID", dtype=self.dtype, name="embedding"
        )(image)
        x = x.reshape(len(x), -1, self.width)
        init = nn.initializers.normal(self.width**-0.5)
        pos = self.param("pos_embedding", init, (1, x.shape[1], self.width))
        x = x + pos  # float32, and so is every sum of residuals

        if train and self.drop_patches:
            x = self._keep_some(x, rows)
        if self.pool == "tok":  # without a position of its own: it is not a place in the image
            cls = self.param("cls", nn.initializers.zeros, (1, 1, self.width))
            x = jnp.concatenate([jnp.tile(cls, (len(x), 1, 1)), x], axis=1)

        x = Encoder(
            self.depth,
            self.mlp_dim,
            self.num_heads,
            self.dtype,
            self.scan,
            self.remat,
            name="Transformer",
        )(x)
        if self.pool == "map":
            x = MAPHead(self.mlp_dim, self.num_heads, self.dtype)(x)
        else:
            x = x[:, 0] if self.pool == "tok" else x.mean(axis=1)
        if self.out_dim is not None:
            x = nn.Dense(self.out_dim, dtype=self.dtype, name="head")(x)
        return x

    def _keep_some(self, x: Float[Array, "n l d"], rows) -> Float[Array, "n kept d"]:
        """A random subset of the patches of each image, as FLIP trains (arXiv 2212.00794)."""
        kept = max(1, round(x.shape[1] * (1 - self.drop_patches)))
        rows = jnp.arange(len(x)) if rows is None else rows
        # By row, so that an image keeps its patches whatever part of the batch it is embedded in.
        keys = jax.vmap(jax.random.fold_in, (None, 0))(self.make_rng("dropout"), rows)
        noise = jax.vmap(lambda key: jax.random.uniform(key, x.shape[1:2]))(keys)
        index = jnp.argsort(noise, axis=1)[:, :kept, None]
        return jnp.take_along_axis(x, index, axis=1)


def make_vit(
    dtype: str = "float32",
    scan: bool = False,
    remat: str = "none",
    *,
    variant: str = "B/16",
    width: int | None = None,
    depth: int | None = None,
    mlp_dim: int | None = None,
    num_heads: int | None = None,
    pool: str = "map",
    out_dim: int | None = None,
    drop_patches: float = 0.0,
) -> ViT:
    """An image tower by name.

    Args:
      dtype: of matmuls, 'float32' or 'bfloat16'; parameters and residuals are float32.
      scan, remat: see transformer.Encoder.
      variant: 'S/16', 'B/16', 'So400m/14', ...: a name of transformer.VARIANTS and a patch size.
      width, depth, mlp_dim, num_heads: replace single sizes of the variant.
      pool: 'map' (attention pooling), 'gap' (mean of the tokens), 'tok' (class token).
      out_dim: width of a Dense head; None has none, as SigLIP.
      drop_patches: share of the patches left out in training, chosen anew for every image.

    Raises:
      ValueError: a value that is not one of those.
    """
    sizes, patch_size = decode_variant(variant)
    if patch_size is None:
        raise ValueError(
            f"variant {variant!r} of the image tower needs a patch size: '{variant}/16'"
        )
    if pool not in POOLS:
        raise ValueError(f"pool {pool!r} of the image tower is none of {', '.join(POOLS)}")
    if not 0 <= drop_patches < 1:
        raise ValueError(f"drop_patches must be in [0, 1), not {drop_patches}")
    given = dict(width=width, depth=depth, mlp_dim=mlp_dim, num_heads=num_heads)
    sizes |= {k: v for k, v in given.items() if v is not None}
    check_sizes("image", sizes)
    return ViT(
        patch_size,
        **sizes,
        pool=pool,
        out_dim=out_dim,
        drop_patches=drop_patches,
        dtype=jnp.dtype(dtype),
        scan=scan,
        remat=remat,
    )
