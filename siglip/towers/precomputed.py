"""The image tower of a frozen model whose embeddings were computed once (SigLiT)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from siglip.towers.transformer import Outputs


class Precomputed(nn.Module):
    """Passes embeddings on, which TwoTowers normalises.

    It has no parameters: in a model's tree of parameters there is no `img`.

    Attributes:
      width: of the embeddings.
      out_dim: None, as of a tower without a head.
    """

    width: int
    out_dim: None = None

    def __call__(
        self, image: Float[Array, "n d"], *, rows=None, train: bool = False, capture=()
    ) -> tuple[Float[Array, "n d"], Outputs]:
        """(embeddings, {'pooled': embeddings}); there are no tokens.

        Raises:
          ValueError: `image` is not [n, width], or `capture` asks for anything.
        """
        del rows, train  # nothing is random
        if getattr(image, "ndim", None) != 2 or image.shape[1] != self.width:
            shape = jax.tree.map(jnp.shape, image)
            raise ValueError(f"a precomputed tower takes embeddings [n, {self.width}], not {shape}")
        if capture:
            raise ValueError(f"a precomputed tower has embeddings only, no {capture[0]!r}")
        return image, {"pooled": image}
