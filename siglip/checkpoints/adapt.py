"""The same weights for other image sizes and text lengths, by a named method."""

import dataclasses

import numpy as np

from siglip.checkpoints.errors import CheckpointError
from siglip.checkpoints.files.lazy_array import LazyArray
from siglip.checkpoints.weights import Weights
from siglip.towers import positions

IMAGE, TEXT = "img/pos_embedding", "txt/pos_embedding"


def to_res(weights: Weights, res: int, method: str | None) -> Weights:
    """Position embeddings resized to the patches of images of `res` pixels.

    Args:
      method: of positions.METHODS; None where nothing should have to be resized.

    Raises:
      CheckpointError: there is something to resize and no method; the tower has no squares.
    """
    made = weights.spec
    if made.img is None or IMAGE not in weights.arrays or made.img.get("naflex_grid"):
        raise CheckpointError(f"{weights.source} has no tower for square images: res={res}")
    patch = int(made.img["variant"].partition("/")[2])
    leaf = weights.arrays[IMAGE]
    old, new = round(leaf.shape[1] ** 0.5), res // patch
    if res == made.res:
        return weights
    if new < 1:
        raise CheckpointError(f"res={res} is smaller than a patch of {patch} pixels")
    spec = dataclasses.replace(made, res=res, preset="")
    if old == new:
        return dataclasses.replace(weights, spec=spec)
    if method is None:
        raise CheckpointError(
            f"{weights.source} is for images of {made.res} pixels ({old} x {old} patches), not "
            f"{res} ({new} x {new}); choose how its positions are resized: "
            f"{', '.join(positions.METHODS)}"
        )
    check_method(method, positions.METHODS)

    def read() -> np.ndarray:
        table = leaf.read().reshape(old, old, -1)
        resized = positions.resize_images(table.astype(np.float32), (new, new), method)
        return resized.reshape(1, new * new, -1).astype(leaf.dtype)

    shape = (1, new * new, leaf.shape[2])
    return _with(
        weights, IMAGE, LazyArray(shape, leaf.dtype, f"{leaf.origin} by {method}", read), spec
    )


def to_token_len(weights: Weights, token_len: int, method: str | None) -> Weights:
    """Text positions for texts of another length.

    Args:
      method: of positions.TEXT_METHODS; None where nothing should have to be changed.

    Raises:
      CheckpointError: there is something to change and no method; there is no text tower.
    """
    made = weights.spec
    if made.txt is None:
        raise CheckpointError(f"{weights.source} has no text tower: token_len={token_len}")
    if token_len == made.token_len:
        return weights
    if token_len < 2:
        raise CheckpointError(f"token_len={token_len} is too short for a text")
    if method is None:
        raise CheckpointError(
            f"{weights.source} is for texts of {made.token_len} tokens, not {token_len}; choose "
            f"how its positions are extended: {', '.join(positions.TEXT_METHODS)}"
        )
    check_method(method, positions.TEXT_METHODS)
    leaf = weights.arrays[TEXT]

    def read() -> np.ndarray:
        table = leaf.read()[0].astype(np.float32)
        return positions.resize_text(table, token_len, method)[None].astype(leaf.dtype)

    shape = (1, token_len, leaf.shape[2])
    spec = dataclasses.replace(made, token_len=token_len, preset="")
    return _with(
        weights, TEXT, LazyArray(shape, leaf.dtype, f"{leaf.origin} by {method}", read), spec
    )


def check_method(method: str, methods) -> None:
    if method not in methods:
        raise CheckpointError(f"method {method!r} is none of {', '.join(methods)}")


def _with(weights: Weights, name: str, leaf: LazyArray, spec) -> Weights:
    return dataclasses.replace(weights, arrays={**weights.arrays, name: leaf}, spec=spec)


def cast(weights: Weights, dtype: str) -> Weights:
    """Every array as float32, bfloat16 or float16, rounded to nearest even."""
    import ml_dtypes

    known = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
    if dtype not in known:
        raise CheckpointError(f"dtype {dtype!r} is none of {', '.join(known)}")
    kind = np.dtype(known[dtype])
    leaves = {
        name: leaf
        if leaf.dtype == kind
        else LazyArray(
            leaf.shape,
            kind,
            f"{leaf.origin} as {dtype}",
            lambda leaf=leaf: leaf.read().astype(kind),
        )
        for name, leaf in weights.arrays.items()
    }
    return dataclasses.replace(weights, arrays=leaves)
