"""An array that has not been read yet."""

import dataclasses
from collections.abc import Callable

import numpy as np


@dataclasses.dataclass(frozen=True)
class LazyArray:
    """Shape and type of an array in a file, which `read` brings into memory.

    Attributes:
      dtype: as in the file; bfloat16 is ml_dtypes.bfloat16.
      origin: file and name, for messages: 'model.safetensors: vision_model.head.probe'.
      read: gives the array, anew at each call; CheckpointError where the file is damaged.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    origin: str
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def of_array(array: np.ndarray, origin: str = "memory") -> LazyArray:
    """The LazyArray of an array in memory."""
    return LazyArray(tuple(array.shape), array.dtype, origin, lambda: array)
