"""The image tower: a Vision Transformer (arXiv 2010.11929) with SigLIP's attention pooling."""

from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from siglip.towers.groups import check_group
from siglip.towers.positions import at_patches
from siglip.towers.precomputed import Precomputed
from siglip.towers.transformer import (
    Encoder,
    MAPHead,
    Outputs,
    check_capture,
    check_sizes,
    decode_variant,
)

POOLS = ("map", "gap", "tok")
PRECOMPUTED = "precomputed"  # as variant: the embeddings of a frozen tower
IMAGE_FIELDS = ("image", "image_mask", "image_shape")  # of a batch, see images_of


class Patches(NamedTuple):
    """Images of any aspect ratio in patches (NaFlex), in the place of squares.

    Attributes:
      values: the p * p * 3 values of each patch by row, column, channel; uint8, or floats in
        [-1, 1].
      mask: True for a patch of the image; the others are padding and may hold anything.
      shape: rows and columns of patches, which stand row by row. (0, 0) without any.
    """

    values: UInt8[Array, "n l values"] | Float[Array, "n l values"]
    mask: Bool[Array, "n l"]
    shape: Int[Array, "n 2"]


def images_of(batch: Mapping[str, Array]) -> Array | Patches | None:
    """The images of a batch as a tower takes them; None where the batch has no images."""
    if "image_shape" not in batch:
        return batch.get("image")
    return Patches(*(batch[field] for field in IMAGE_FIELDS))


class ViT(nn.Module):
    """Patches -> transformer -> one vector, which is the embedding (no projection by default).

    With `naflex_grid` it takes Patches (SigLIP 2, arXiv 2502.14786, 2.4.2): the table of positions
    is resized to each image's own rows and columns, and nothing attends to padding.
    """

    patch_size: int
    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    pool: str
    out_dim: int | None
    drop_patches: float
    naflex_grid: int | None
    dtype: jnp.dtype
    scan: bool
    remat: str
    attention: str
    group: int

    @nn.compact
    def __call__(
        self,
        image: Float[Array, "n h w 3"] | Patches,
        *,
        rows: Int[Array, " n"] | None = None,
        train: bool = False,
        capture: tuple[str, ...] = (),
    ) -> tuple[Float[Array, "n d"], Outputs]:
        """The embedding before it is normalised, and what leads to it.

        Args:
          image: in [-1, 1].
          rows: place of each image in the batch, which `drop_patches` depends on.
          train: with `drop_patches`, patches are dropped; that needs an rng named 'dropout'.
          capture: what is computed or kept only where it is asked for: 'attention', 'block:i'.

        Returns:
          z [n, out_dim or width], and a dict with
            tokens [n, l, width]: after the last LayerNorm; patches row by row, with pool 'tok' the
              class token first. Where patches are dropped: those that are kept, in random order.
            mask [n, l]: True for a patch of the image; None where all tokens are (square images).
            pooled [n, width]: the tokens in one vector, before the head.
            attention [n, heads, l]: weights of the MAP head, which sum to 1 over l.
            block:i [n, l, width]: output of block i, float32; from the last one if negative.

        Raises:
          ValueError: Patches for a tower of squares or the other way round, another patch size, or
            a name in `capture` that is no output of this tower.
        """
        check_capture(capture, self.depth, self.pool)
        mask = None
        if self.naflex_grid is not None:
            x, mask = self._embed_patches(image)
        else:
            x = self._embed_squares(image)  # float32, and so is every sum of residuals
        if train and self.drop_patches:
            x = self._keep_random_patches(x, rows)
        if self.pool == "tok":  # without a position of its own: it is not a place in the image
            cls = self.param("cls", nn.initializers.zeros, (1, 1, self.width))
            x = jnp.concatenate([jnp.tile(cls, (x.shape[0], 1, 1)), x], axis=1)

        x, captured = Encoder(
            self.depth,
            self.mlp_dim,
            self.num_heads,
            self.dtype,
            self.scan,
            self.remat,
            self.attention,
            self.group,
            name="Transformer",
        )(x, mask, capture)
        out: Outputs = {"tokens": x, "mask": mask, **captured}
        if self.pool == "map":
            head = MAPHead(self.mlp_dim, self.num_heads, self.dtype, self.attention)
            x, captured = head(x, mask, capture)
            out.update(captured)
        elif mask is not None:  # a bad example has no patch at all
            count = jnp.maximum(1, mask.sum(axis=1, keepdims=True))
            x = jnp.where(mask[..., None], x, 0).sum(axis=1) / count
        else:
            x = x[:, 0] if self.pool == "tok" else x.mean(axis=1)
        out["pooled"] = x
        if self.out_dim is not None:
            x = nn.Dense(self.out_dim, dtype=self.dtype, name="head")(x)
        return x, out

    def _embed_squares(self, image: Float[Array, "n h w 3"] | Patches) -> Float[Array, "n l d"]:
        """Tokens with their positions.

        Pixels right of and below the last whole patch are not seen, as in released models of
        384 px and patches of 14.
        """
        if isinstance(image, Patches):
            raise ValueError("this image tower takes squares, not Patches; naflex_grid makes one")
        p = self.patch_size
        if image.ndim != 4 or min(image.shape[1:3]) < p:
            raise ValueError(f"images of {image.shape[1:]} hold no patch of {p} x {p} pixels")
        x = nn.Conv(
            self.width, (p, p), strides=(p, p), padding="VALID", dtype=self.dtype, name="embedding"
        )(image)
        x = x.reshape(x.shape[0], -1, self.width)  # len() has no symbols, see export.py
        init = nn.initializers.normal(self.width**-0.5)
        return x + self.param("pos_embedding", init, (1, x.shape[1], self.width))

    def _embed_patches(
        self, image: Patches | Array
    ) -> tuple[Float[Array, "n l d"], Bool[Array, "n l"]]:
        """Tokens with their positions, and the mask of those that are patches of the image."""
        if not isinstance(image, Patches):
            raise ValueError(f"a NaFlex tower takes Patches, not an array {[*image.shape]}")
        values, mask, shape = image
        p, g = self.patch_size, self.naflex_grid
        if values.shape[-1] != p * p * 3:
            raise ValueError(f"patches of {values.shape[-1]} values are not {p} x {p} x 3")
        values = jnp.where(mask[..., None], values, 0)  # 0 times a NaN would be one
        x = nn.Dense(self.width, dtype=self.dtype, name="embedding")(values)
        init = nn.initializers.normal(self.width**-0.5)
        table = self.param("pos_embedding", init, (g, g, self.width))
        return x + at_patches(table, shape, x.shape[1]), mask

    def _keep_random_patches(self, x: Float[Array, "n l d"], rows) -> Float[Array, "n kept d"]:
        """A random subset of the patches of each image, as FLIP trains (arXiv 2212.00794)."""
        kept = max(1, round(x.shape[1] * (1 - self.drop_patches)))
        rows = jnp.arange(len(x)) if rows is None else rows
        # A key for each row, so that microbatches drop the patches that the whole batch drops.
        keys = jax.vmap(jax.random.fold_in, (None, 0))(self.make_rng("dropout"), rows)
        noise = jax.vmap(lambda key: jax.random.uniform(key, x.shape[1:2]))(keys)
        index = jnp.argsort(noise, axis=1)[:, :kept, None]
        return jnp.take_along_axis(x, index, axis=1)


def make_vit(
    dtype: str = "float32",
    scan: bool = False,
    remat: str = "none",
    attention: str = "xla",
    *,
    variant: str = "B/16",
    width: int | None = None,
    depth: int | None = None,
    mlp_dim: int | None = None,
    num_heads: int | None = None,
    pool: str = "map",
    out_dim: int | None = None,
    drop_patches: float = 0.0,
    naflex_grid: int | None = None,
    group: int = 0,
) -> ViT | Precomputed:
    """An image tower by name.

    Args:
      dtype: of matmuls, 'float32' or 'bfloat16'; parameters and residuals are float32.
      scan, remat: see transformer.Encoder.
      attention: one of attention.IMPLEMENTATIONS.
      variant: 'S/16', 'B/16', 'So400m/14', ...: a name of transformer.VARIANTS and a patch size.
        Or 'precomputed', whose images are embeddings of `width` numbers; nothing else is set there.
      width, depth, mlp_dim, num_heads: replaces that of the variant; None keeps it.
      pool: 'map' (attention pooling), 'gap' (mean of the tokens), 'tok' (class token).
      out_dim: width of a Dense head; None has none, as SigLIP.
      drop_patches: share of the patches left out in training, chosen anew for every image.
      naflex_grid: side of the table of positions of a NaFlex tower, 16 in the released ones; None:
        square images.
      group: images that a block takes at a time in training, a divisor of those of a device; for
        TPU v4, see siglip.towers.groups; 0: all.

    Raises:
      ValueError: an invalid value.
    """
    if variant == PRECOMPUTED:
        if width is None or width < 1:
            raise ValueError("a precomputed image tower needs width, that of its embeddings")
        rest = (depth, mlp_dim, num_heads, pool, out_dim, drop_patches, naflex_grid, group)
        if rest != (None, None, None, "map", None, 0, None, 0):
            raise ValueError("a precomputed image tower has a width and no other setting")
        return Precomputed(width)
    sizes, patch_size = decode_variant(variant)
    if patch_size is None:
        raise ValueError(
            f"variant {variant!r} of the image tower needs a patch size: '{variant}/16'"
        )
    if pool not in POOLS:
        raise ValueError(f"pool {pool!r} of the image tower is none of {', '.join(POOLS)}")
    if not 0 <= drop_patches < 1:
        raise ValueError(f"drop_patches must be in [0, 1), not {drop_patches}")
    if naflex_grid is not None:
        if naflex_grid < 1:
            raise ValueError(f"naflex_grid must be at least 1, not {naflex_grid}")
        if pool == "tok":
            raise ValueError("pool 'tok' goes with square images; a NaFlex tower takes map or gap")
        if drop_patches:
            raise ValueError("drop_patches goes with square images, not with naflex_grid")
    replaced = dict(width=width, depth=depth, mlp_dim=mlp_dim, num_heads=num_heads)
    sizes |= {k: v for k, v in replaced.items() if v is not None}
    check_sizes("image", sizes)
    check_group("image", group)
    return ViT(
        patch_size,
        **sizes,
        pool=pool,
        out_dim=out_dim,
        drop_patches=drop_patches,
        naflex_grid=naflex_grid,
        dtype=jnp.dtype(dtype),
        scan=scan,
        remat=remat,
        attention=attention,
        group=group,
    )
