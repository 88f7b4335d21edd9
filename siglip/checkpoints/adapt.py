"""Weights adapted to other image sizes, text lengths and types."""

import dataclasses
from collections.abc import Collection

import ml_dtypes
import numpy as np

from siglip.checkpoints.errors import CheckpointError
from siglip.checkpoints.files.lazy_array import LazyArray
from siglip.checkpoints.weights import Weights
from siglip.towers import positions

IMAGE, TEXT = "img/pos_embedding", "txt/pos_embedding"


def to_res(weights: Weights, res: int, method: str | None) -> Weights:
    """The weights with position embeddings for images of `res` pixels.

    Args:
      method: one of positions.METHODS; None refuses to resize.

    Raises:
      CheckpointError: a resize needs a method, or the tower does not take square images.
    """
    contract = weights.spec
    if contract.img is None or IMAGE not in weights.arrays or contract.img.get("naflex_grid"):
        raise CheckpointError(f"{weights.source} has no tower for square images: res={res}")
    patch = int(contract.img["variant"].partition("/")[2])
    table = weights.arrays[IMAGE]
    old, new = round(table.shape[1] ** 0.5), res // patch
    if res == contract.res:
        return weights
    if new < 1:
        raise CheckpointError(f"res={res} is smaller than a patch of {patch} pixels")
    spec = dataclasses.replace(contract, res=res, preset="")
    if old == new:
        return dataclasses.replace(weights, spec=spec)
    if method is None:
        raise CheckpointError(
            f"{weights.source} is for images of {contract.res} pixels ({old} x {old} patches), not "
            f"{res} ({new} x {new}); choose how its positions are resized: "
            f"{', '.join(positions.METHODS)}"
        )
    check_method(method, positions.METHODS)

    def read() -> np.ndarray:
        grid = table.read().reshape(old, old, -1).astype(np.float32)
        resized = positions.resize_images(grid, (new, new), method)
        return resized.reshape(1, new * new, -1).astype(table.dtype)

    shape = (1, new * new, table.shape[2])
    resized = LazyArray(shape, table.dtype, f"{table.origin} by {method}", read)
    return dataclasses.replace(weights, arrays={**weights.arrays, IMAGE: resized}, spec=spec)


def to_token_len(weights: Weights, token_len: int, method: str | None) -> Weights:
    """The weights with position embeddings for texts of `token_len` tokens.

    Args:
      method: one of positions.TEXT_METHODS; None refuses to change them.

    Raises:
      CheckpointError: a change needs a method, or there is no text tower.
    """
    contract = weights.spec
    if contract.txt is None:
        raise CheckpointError(f"{weights.source} has no text tower: token_len={token_len}")
    if token_len == contract.token_len:
        return weights
    if token_len < 2:
        raise CheckpointError(f"token_len={token_len} is too short for a text")
    if method is None:
        raise CheckpointError(
            f"{weights.source} is for texts of {contract.token_len} tokens, not {token_len}; "
            f"choose how its positions are extended: {', '.join(positions.TEXT_METHODS)}"
        )
    check_method(method, positions.TEXT_METHODS)
    table = weights.arrays[TEXT]

    def read() -> np.ndarray:
        rows = table.read()[0].astype(np.float32)
        return positions.resize_text(rows, token_len, method)[None].astype(table.dtype)

    shape = (1, token_len, table.shape[2])
    resized = LazyArray(shape, table.dtype, f"{table.origin} by {method}", read)
    spec = dataclasses.replace(contract, token_len=token_len, preset="")
    return dataclasses.replace(weights, arrays={**weights.arrays, TEXT: resized}, spec=spec)


def check_method(method: str, methods: Collection[str]) -> None:
    """
    Raises:
      CheckpointError: there is no such method.
    """
    if method not in methods:
        raise CheckpointError(f"method {method!r} is none of {', '.join(methods)}")


def cast(weights: Weights, dtype: str) -> Weights:
    """The weights with every array as float32, bfloat16 or float16, rounded to nearest even.

    Raises:
      CheckpointError: dtype is none of these.
    """
    dtypes = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
    if dtype not in dtypes:
        raise CheckpointError(f"dtype {dtype!r} is none of {', '.join(dtypes)}")
    kind = np.dtype(dtypes[dtype])
    arrays = {
        name: array
        if array.dtype == kind
        else LazyArray(
            array.shape,
            kind,
            f"{array.origin} as {dtype}",
            lambda array=array: array.read().astype(kind),
        )
        for name, array in weights.arrays.items()
    }
    return dataclasses.replace(weights, arrays=arrays)
