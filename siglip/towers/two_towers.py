"""Both towers, the learned temperature t and the bias b."""

from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from siglip.towers.attention import resolve
from siglip.towers.remat import REMAT
from siglip.towers.text import make_text
from siglip.towers.transformer import Outputs
from siglip.towers.vit import Patches, make_vit

TOWERS = ("img", "txt")
PARTS = (*TOWERS, "t", "b")  # the subtrees of the model's parameters


class TwoTowers(nn.Module):
    """Images and texts -> unit-norm embeddings in one space.

    Parameters are named as in the released checkpoints: `img/...`, `txt/...`, `t` [1], which is
    the LOG of the temperature, and `b` [1] where the loss has a bias.
    """

    img: nn.Module
    txt: nn.Module
    t_init: float
    b_init: float | None

    @nn.compact
    def __call__(
        self,
        image: UInt8[Array, "n h w 3"] | Float[Array, "n ..."] | Patches | None = None,
        text: Int[Array, "m l"] | None = None,
        *,
        rows: Int[Array, " n"] | None = None,
        train: bool = False,
    ) -> tuple[Array | None, Array | None, dict[str, Any]]:
        """Embeds images, texts or both.

        Args:
          image: uint8, or floats in [-1, 1]; Patches for a NaFlex tower, embeddings [n, d] for a
            precomputed one; None for no image embeddings.
          text: token ids; None for no text embeddings.
          rows: place of each example in the batch, which what is random depends on; default
            0, 1, 2, ...
          train: random patch dropping is on. It needs an rng named 'dropout'.

        Returns:
          zimg [n, d], ztxt [n, d], float32, unit norm (None where nothing was given), and
          {'t': temperature exp(t'), 'b': bias or None, 'img': what encode_image gives beside zimg,
          'txt': likewise}; t and b are float32 scalars, 'img' and 'txt' {} where nothing was given.
        """
        t_prime = self.param("t", nn.initializers.constant(np.log(self.t_init)), (1,))
        b = None
        if self.b_init is not None:
            b = self.param("b", nn.initializers.constant(self.b_init), (1,))[0]
        zimg, ztxt, img, txt = None, None, {}, {}
        if image is not None:
            zimg, img = self.encode_image(image, rows=rows, train=train)
        if text is not None:
            ztxt, txt = self.encode_text(text, rows=rows, train=train)
        return zimg, ztxt, {"t": jnp.exp(t_prime[0]), "b": b, "img": img, "txt": txt}

    def encode_image(
        self, image, *, rows=None, train: bool = False, capture: tuple[str, ...] = ()
    ) -> tuple[Float[Array, "n d"], Outputs]:
        """The image tower alone, which needs the parameters of `img` and no others:

            zimg, out = model.apply({"params": {"img": img}}, image, method="encode_image")

        Args:
          image, rows, train: see __call__.
          capture: outputs that are computed or kept only where they are asked for, see ViT.

        Returns:
          zimg [n, d], and the outputs of ViT: tokens, mask, pooled, those of `capture`, and
          unnormalized [n, d], which zimg is the direction of. Under jit what is not used of them
          costs nothing.
        """
        z, out = self.img(to_model_range(image), rows=rows, train=train, capture=capture)
        return _unit(z), {**out, "unnormalized": z}

    def encode_text(
        self, text, *, rows=None, train: bool = False, capture: tuple[str, ...] = ()
    ) -> tuple[Float[Array, "n d"], Outputs]:
        """The text tower alone, which needs the parameters of `txt` and no others; like
        encode_image, with the outputs of TextTransformer."""
        del rows  # nothing in the text tower is random
        z, out = self.txt(text, train=train, capture=capture)
        return _unit(z), {**out, "unnormalized": z}


def to_model_range(image: Array | Patches) -> Array | Patches:
    """Images in [-1, 1]: uint8 [0, 255] becomes float32, floats are returned as they are."""
    if isinstance(image, Patches):
        return image._replace(values=to_model_range(image.values))
    return image.astype(jnp.float32) / 127.5 - 1 if image.dtype == jnp.uint8 else image


def _unit(z: Float[Array, "n d"]) -> Float[Array, "n d"]:
    # float32 whatever the towers' dtype is: t = 100 turns an error of 1e-3 into 0.1 of a logit.
    # The square root of a sum that is 0 has no gradient, hence the epsilon inside.
    z = z.astype(jnp.float32)
    return z / (jnp.sqrt(jnp.sum(z * z, axis=-1, keepdims=True) + 1e-24) + 1e-8)


def make_model(
    devices: Sequence[Any] | None = None,
    *,
    img: dict,
    txt: dict,
    t_init: float = 10.0,
    b_init: float | Literal["auto"] | None = -10.0,
    dtype: str = "float32",
    scan: bool = False,
    remat: str = "none",
    attention: str = "auto",
) -> TwoTowers:
    """A model from the blocks of a config.

    Args:
      devices: those that it will run on, which decide how attention is computed; default: the
        local ones.
      img, txt: keyword arguments of vit.make_vit and text.make_text. The width of the text head,
        txt['out_dim'], is by default that of the image embedding; 0: no head, for a text tower
        that is as wide as the image embedding.
      t_init: initial temperature (the parameter starts at its log).
      b_init: initial bias; None for a model without one (CLIP's softmax). The trainer puts the
        prior of its batch, log(p / (1 - p)) with p = 1 / N, in the place of 'auto'.
      dtype: of matmuls in towers and head. Parameters, residuals, embeddings and logits are
        float32.
      scan: one traced block for all layers, which compiles in the time of one; the parameter tree
        has a leading layer axis then (transformer.Encoder).
      remat: what the backward pass computes again to save memory: 'none', 'elementwise' (all but
        matmuls), 'mlp' (also the MLP's hidden layer), 'dense' (all but attention), 'full'; see
        siglip.towers.remat.
      attention: 'auto' is cuDNN's kernel on NVIDIA GPUs from Ampere on, for what it takes, and
        XLA elsewhere; 'xla' is XLA everywhere; 'fused' is cuDNN's kernel or, in the training step
        on TPUs, one of our own.

    Raises:
      ValueError: the towers' embeddings differ in width, or a value is invalid.
    """
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype {dtype!r} is none of float32, bfloat16")
    if remat not in REMAT:
        raise ValueError(f"remat {remat!r} is none of {', '.join(REMAT)}")
    if b_init == "auto":
        raise ValueError("b_init 'auto' depends on the batch: pairs.log_odds(batch_size)")
    if t_init <= 0:
        raise ValueError(f"t_init is the temperature, which must be positive, not {t_init}")
    implementation = resolve(attention, devices)
    vit = make_vit(dtype, scan, remat, implementation, **img)
    zimg_dim = vit.out_dim or vit.width
    head = txt.get("out_dim")
    out_dim = zimg_dim if head is None else head
    text = make_text(dtype, scan, remat, implementation, **{**txt, "out_dim": out_dim})
    ztxt_dim = text.out_dim or text.width
    if ztxt_dim != zimg_dim:
        raise ValueError(f"embedding widths differ: image {zimg_dim}, text {ztxt_dim}")
    return TwoTowers(vit, text, float(t_init), b_init)
