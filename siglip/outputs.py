"""The outputs of a tower by name: 'embedding', 'tokens', 'block:-2', ..."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from base.words import nearest
from siglip.embed import embed_batch
from siglip.towers.transformer import ATTENTION, check_capture
from siglip.towers.two_towers import TwoTowers
from siglip.towers.vit import Patches, images_of

VECTORS = ("embedding", "unnormalized", "pooled")  # [n, d]; every other output is TokenOutput


class TokenOutput(NamedTuple):
    """An output for each token, of n images or texts; of one, all without the leading axis.

    Image i on its grid: values[i][mask[i]].reshape(*grid[i], d), and the attention of its heads
    values[i][:, mask[i]].reshape(heads, *grid[i]). A class token (pool 'tok') comes before.

    values: of tokens and blocks [n, l, d], of attention [n, heads, l].
    mask: True for a patch of the image (NaFlex fills up to l); for all tokens of squares and texts.
    grid: rows and columns of patches, which stand row by row; None for texts.
    """

    values: Float[Array, "n ..."] | Float[np.ndarray, "n ..."]
    mask: Bool[Array, "n l"] | Bool[np.ndarray, "n l"]
    grid: Int[Array, "n 2"] | Int[np.ndarray, "n 2"] | None


def check_output(output: str, tower: Any, name: str) -> None:
    """Raises ValueError, one line, where the tower has no such output; `name` says which tower."""
    if output in (*VECTORS, "tokens"):
        return
    if _is_captured(output):
        check_capture((output,), tower.depth, tower.pool)
        return
    blocks = [f"block:{i}" for i in range(-tower.depth, tower.depth)]
    pooling = [ATTENTION] if tower.pool == "map" else []
    similar = nearest(output, [*VECTORS, "tokens", *pooling, *blocks])
    raise ValueError(f"{name} has no output {output!r}; {similar}")


def encode(
    module: TwoTowers, params: Any, batch: dict[str, Any], output: str
) -> Float[Array, "n d"] | TokenOutput:
    """The output, float32, for the images or the texts of a batch."""
    if output == "embedding":
        return embed_batch(module, params, batch)
    is_text = "text" in batch
    inputs: Any = batch["text"] if is_text else images_of(batch)
    result: Any = module.apply(
        {"params": params},
        inputs,
        capture=(output,) if _is_captured(output) else (),
        method="encode_text" if is_text else "encode_image",
    )
    _, out = result
    values = out[output].astype(jnp.float32)
    if output in VECTORS:
        return values
    mask = out["mask"]
    if mask is None:
        mask = jnp.ones(out["tokens"].shape[:2], bool)
    return TokenOutput(values, mask, None if is_text else _grid(inputs, module.img))


def _is_captured(output: str) -> bool:
    return output == ATTENTION or output.startswith("block:")


def _grid(images: Array | Patches, tower: Any) -> Int[Array, "n 2"]:
    """Rows and columns of the patches of each image."""
    if isinstance(images, Patches):
        return images.shape
    n, height, width, _ = images.shape
    return jnp.tile(jnp.array([height, width]) // tower.patch_size, (n, 1))
