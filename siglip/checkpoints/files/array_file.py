"""Common parts of .npz and safetensors files: files that are not trusted, arrays as bytes."""

import contextlib
import io
import math
import os
import re
import stat
from collections.abc import Iterator
from typing import IO

import numpy as np

from base import whole_file
from siglip.checkpoints.errors import CheckpointError
from siglip.checkpoints.files.lazy_array import LazyArray

MAX_AXES = 32
PIECE = 1 << 20  # elements that are copied at once when an array must be copied to be written


class ArrayFile:
    """A file that is opened anew for each array, so that threads share no position.

    Raises:
      CheckpointError: it cannot be read, or is not a regular file.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        self.name = os.path.basename(self.path)
        try:
            status = os.stat(self.path)
        except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
            raise CheckpointError(f"{self.path!r} cannot be read: {reason(error)}") from error
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{self.path} is a folder or a device; name a file")
        self.size, self._changed = status.st_size, status.st_mtime_ns

    @contextlib.contextmanager
    def open(self) -> Iterator[io.BufferedReader]:
        """The file from its beginning.

        Raises:
          CheckpointError: it cannot be read, or has changed since this ArrayFile was made.
        """
        try:
            with open(self.path, "rb") as file:
                status = os.fstat(file.fileno())
                if (status.st_size, status.st_mtime_ns) != (self.size, self._changed):
                    raise CheckpointError(
                        f"{self.path} has changed while it was read; read it anew"
                    )
                yield file
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {reason(error)}") from error


def reason(error: Exception) -> str:
    """The words of an OSError, without its number and path."""
    return getattr(error, "strerror", None) or str(error)


_KINDS = {
    rb"": "empty; copy it again",
    rb"version https://git-lfs.*": "a Git LFS pointer, not the weights; run `git lfs pull`",
    rb"\s*<(!doctype|html|head|\?xml).*": "a web page, not the weights; download it again, and see "
    "whether the address needs a login",
    rb"\x80[\x02-\x05].*": "a pickle, which may run any code and is never read; convert it to "
    "safetensors",
    rb"PK\x03\x04.*": "a zip archive: an .npz under a wrong name, or a PyTorch pickle, which may "
    "run any code and is never read; convert that to safetensors",
    rb"\x93NUMPY.*": "one .npy array, not a file of named arrays",
}


def what_it_is(head: bytes) -> str:
    """The kind of a file that begins with these bytes and what to do with it; '' if unknown.

    Only for files that could not be read: a valid safetensors file may begin like a pickle.
    """
    for pattern, what in _KINDS.items():
        if re.fullmatch(pattern, head, re.DOTALL | re.IGNORECASE):
            return what
    return ""


def check_name(path: str | os.PathLike, name: str) -> None:
    """
    Raises:
      CheckpointError: the name has line breaks or escape codes, which would reach the terminal.
    """
    if not name.isprintable():
        raise CheckpointError(f"{path} has an array {name!r}, a name that does not print")


def is_possible(shape: tuple[int, ...] | list[int], dtype: np.dtype) -> bool:
    """Whether numpy can hold such an array; its limit counts axes of length 0 as 1."""
    return (
        len(shape) <= MAX_AXES
        and min(shape, default=0) >= 0
        and math.prod(max(n, 1) for n in shape) * dtype.itemsize < 2**63
    )


def as_array(origin: str, flat: np.ndarray, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """The array whose bytes are `flat`, uint8 [n]; not a copy.

    Raises:
      CheckpointError: a bool is neither 0 nor 1, of which numpy makes undefined results.
    """
    if dtype == np.bool_ and flat.max(initial=0) > 1:
        raise CheckpointError(f"{origin} is damaged: its type is bool, but it has other bytes")
    return flat.view(dtype).reshape(shape)


def write_array(file: io.BufferedIOBase | IO[bytes], lazy: LazyArray) -> None:
    """Reads an array and writes it in C order and little-endian, in pieces where it must be copied.

    Raises:
      CheckpointError: the array has not the shape and type that it was announced with.
    """
    array = lazy.read()
    if (array.shape, array.dtype) != (lazy.shape, lazy.dtype):
        raise CheckpointError(
            f"{lazy.origin} was said to be {lazy.dtype}{list(lazy.shape)}, but is "
            f"{array.dtype}{list(array.shape)}"
        )
    parts = np.nditer(
        array,
        flags=["external_loop", "buffered", "zerosize_ok"],
        op_dtypes=[array.dtype.newbyteorder("<")],
        order="C",
        casting="equiv",
        buffersize=PIECE,
    )
    for part in parts:
        file.write(np.ascontiguousarray(part).view(np.uint8).data)


@contextlib.contextmanager
def new_file(path: str | os.PathLike) -> Iterator[IO[bytes]]:
    """An open file that becomes `path` at the end of the block, or disappears after an error.

    Raises:
      CheckpointError: it cannot be written.
    """
    try:
        with whole_file.create(path) as file:
            yield file
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {reason(error)}") from error
