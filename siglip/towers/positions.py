"""Position embeddings of another size: more or fewer patches, longer or shorter texts.

Which resize is meant is part of the model: code bases differ by the order of the embedding's own
standard deviation. So a method always has a name:

  bilinear-corners    big_vision when it loads a checkpoint (scipy.ndimage.zoom, order=1): the
                      corner patches stay where they are
  bilinear            open_clip when it loads big_vision's npz; no antialias, as all above it and
                      bicubic
  bilinear-antialias  NaFlex, jax.image.resize(..., 'linear')
  bicubic             Hugging Face's interpolate_pos_encoding
  bicubic-antialias   open_clip when it loads its own checkpoints (resize_pos_embed)
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int

from base.words import nearest

# A method is a matrix along one axis, from `before` places to `after` places.
Weights = Callable[[int, int], Float64[np.ndarray, "after before"]]


def _corners(before: int, after: int) -> Float64[np.ndarray, "after before"]:
    """Weights that leave the first and the last place where they are; one place is the first.

    scipy itself gives zeros in the last row and column for some sizes (32 -> 16, 64 -> 24), where
    rounding puts the last place just outside. This code does not copy that.
    """
    at = np.arange(after) * ((before - 1) / max(after - 1, 1))
    return _tent(np.arange(before) - at[:, None])


def _half_pixel(taps: range, kernel: Callable[[np.ndarray], np.ndarray]) -> Weights:
    """Weights between the centres of places that have an extent (torch's align_corners=False).

    A tap beyond the edge counts as the place at the edge.
    """

    def weights(before: int, after: int) -> Float64[np.ndarray, "after before"]:
        at = _centres(before, after)
        matrix = np.zeros((after, before))
        for tap in taps:
            place = np.floor(at).astype(int) + tap
            edge = np.clip(place, 0, before - 1)
            np.add.at(matrix, (np.arange(after), edge), kernel(place - at))
        return matrix

    return weights


def _antialias(kernel: Callable[[np.ndarray], np.ndarray]) -> Weights:
    """Weights of a kernel widened by the factor of shrinking, which sum to 1 in each row."""

    def weights(before: int, after: int) -> Float64[np.ndarray, "after before"]:
        distance = np.arange(before) - _centres(before, after)[:, None]
        matrix = kernel(distance / max(before / after, 1.0))
        return matrix / matrix.sum(axis=1, keepdims=True)

    return weights


def _centres(before: int, after: int) -> Float64[np.ndarray, " after"]:
    return (np.arange(after) + 0.5) * (before / after) - 0.5


def _tent(x: np.ndarray) -> np.ndarray:
    return np.maximum(0.0, 1.0 - np.abs(x))


def _cubic(a: float) -> Callable[[np.ndarray], np.ndarray]:
    """Keys' kernel (1981). torch takes a = -0.75; with antialias -0.5, as PIL and JAX do."""

    def kernel(x: np.ndarray) -> np.ndarray:
        x = np.abs(x)
        near = ((a + 2) * x - (a + 3)) * x * x + 1
        far = ((x - 5) * x + 8) * x * a - 4 * a
        return np.where(x <= 1, near, np.where(x < 2, far, 0.0))

    return kernel


METHODS: dict[str, Weights] = {
    "bilinear-corners": _corners,
    "bilinear": _half_pixel(range(0, 2), _tent),
    "bilinear-antialias": _antialias(_tent),
    "bicubic": _half_pixel(range(-1, 3), _cubic(-0.75)),
    "bicubic-antialias": _antialias(_cubic(-0.5)),
}


def resize_images(
    table: Float[np.ndarray, "h w c"], size: tuple[int, int], method: str
) -> Float[np.ndarray, "h2 w2 c"]:
    """Position embeddings of h x w patches, resized to a grid of `size` (rows, columns).

    `method` is a name of METHODS. A table that has the size already is returned as it is, bit for
    bit; otherwise float32, computed in float64.

    Raises:
      ValueError: unknown method, a size that is not positive, or a table of another rank.
    """
    weights = METHODS[_check_name("method of resizing position embeddings", method, METHODS)]
    _check(table, 3, "[rows, columns, width]", size)
    if table.shape[:2] == tuple(size):
        return table
    along_y, along_x = weights(table.shape[0], size[0]), weights(table.shape[1], size[1])
    rows = np.tensordot(along_y, table.astype(np.float64), axes=1)
    return np.einsum("xw,ywc->yxc", along_x, rows, optimize=True).astype(np.float32)


def _linear(table: Float[np.ndarray, "l c"], length: int) -> Float[np.ndarray, "l2 c"]:
    matrix = METHODS["bilinear"](len(table), length)
    return (matrix @ table.astype(np.float64)).astype(np.float32)


def _keep(table: Float[np.ndarray, "l c"], length: int) -> Float[np.ndarray, "l2 c"]:
    last = len(table) - 1
    old = np.minimum(np.arange(length), max(last - 1, 0))
    old[-1] = last
    return table[old]


TEXT_METHODS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "linear": _linear,
    "keep": _keep,
}


def resize_text(
    table: Float[np.ndarray, "l c"], length: int, method: str
) -> Float[np.ndarray, "l2 c"]:
    """Position embeddings of l text positions, resized to `length`.

    `method` is a name of TEXT_METHODS:

      linear  stretches them all, as open_clip does (resize_text_pos_embed). A word is then read
              at a position it was not trained at.
      keep    leaves positions 0 to l - 2 where they are, as words start at 0 and follow each other
              without gaps. The last one is not like its neighbours, for a SigLIP text tower pools
              there: it moves to the new last place. What lies between is filled up in most texts,
              and gets copies of position l - 2. Shorter: the first length - 1, and the last.

    The same length returns the table as it is, bit for bit.

    Raises:
      ValueError: unknown method, a length that is not positive, or a table of another rank.
    """
    resize = TEXT_METHODS[_check_name("method of resizing text positions", method, TEXT_METHODS)]
    _check(table, 2, "[length, width]", (length,))
    return table if len(table) == length else resize(table, length)


def at_patches(
    table: Float[Array, "g g w"], shape: Int[Array, "n 2"], length: Any
) -> Float[Array, "n length w"]:
    """NaFlex: the table resized to each image's own grid, read at its patches in row-major order.

    It equals 'bilinear-antialias' for each image, but runs on the device, where shapes are data:
    one compiled program takes every aspect ratio. big_vision's (scale_and_translate under vmap) has
    at most 64 patches per side and is NaN beyond; this one has no limit.

    Args:
      table: of a square grid, 16 x 16 in the released models.
      shape: (rows, columns) of each image's patches; (0, 0) for an image that is all padding.
      length: tokens of each image, an int or the symbolic dimension of an export.

    Returns:
      float32; zeros after the last of the rows * columns patches.

    Raises:
      ValueError: the table is not of a square grid.
    """
    if table.ndim != 3 or table.shape[0] != table.shape[1]:
        raise ValueError(f"NaFlex's position embeddings must be [g, g, width], not {table.shape}")
    rows, columns = shape[:, :1], shape[:, 1:]
    token = jnp.arange(length, dtype=shape.dtype)[None]
    y, x = token // jnp.maximum(columns, 1), token % jnp.maximum(columns, 1)
    side = table.shape[0]
    # One pair of weights for each token: a batch of small matrices for each image would need the
    # largest number of rows and columns, which is the number of tokens for a single row of them.
    along_y = _weights_at(y, rows, side)[..., :, None]
    along_x = _weights_at(x, columns, side)[..., None, :]
    weights = jnp.where((y < rows)[..., None, None], along_y * along_x, 0.0)
    table = table.reshape(side * side, -1).astype(jnp.float32)
    weights = weights.reshape(*weights.shape[:2], side * side)
    # Like jax.image.resize: a matmul's default precision would round the table.
    return jnp.matmul(weights, table, precision="highest")


def _weights_at(
    place: Int[Array, "n l"], after: Int[Array, "n 1"], before: int
) -> Float[Array, "n l before"]:
    """Rows of METHODS['bilinear-antialias'](before, after). Finite for any `place`."""
    after = jnp.maximum(after, 1)
    # A place past the end would be out of reach of every weight: 0 / 0, where jax_debug_nans stops.
    place = jnp.minimum(place, after - 1).astype(jnp.float32)
    scale = before / after.astype(jnp.float32)
    taps = jnp.arange(before, dtype=jnp.float32)[None, None]
    distance = ((place + 0.5) * scale - 0.5)[..., None] - taps
    weights = jnp.maximum(0.0, 1.0 - jnp.abs(distance) / jnp.maximum(scale, 1.0)[..., None])
    return weights / weights.sum(axis=-1, keepdims=True)


def _check_name(what: str, name: str, names: dict) -> str:
    if name not in names:
        raise ValueError(f"{what} {name!r} is unknown; {nearest(str(name), names)}")
    return name


def _check(table: np.ndarray, rank: int, axes: str, size: tuple[int, ...]) -> None:
    if table.ndim != rank or not table.size:
        raise ValueError(f"position embeddings must be {axes}, not of shape {table.shape}")
    if min(size) < 1:
        raise ValueError(f"position embeddings cannot be resized to {size}: sizes are positive")
