"""Safetensors files, one array in memory at a time.

A file is a little-endian u64, that many bytes of JSON {name: {dtype, shape, data_offsets}}, and the
arrays without gaps (github.com/huggingface/safetensors). The library itself is not used, because
* it maps files into memory: if a mapped file shrinks, or its disk fails, the process is killed;
* it writes only arrays that are all in memory at once;
* of two arrays of one name it takes the last, it admits shapes that numpy cannot hold, and its
  errors name neither the bytes that are missing nor what a file is that is no safetensors file.
Tests hold the bytes equal to the library's, and refuse every damaged file that it refuses.
"""

import json
import math
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from siglip.checkpoints.errors import CheckpointError
from siglip.checkpoints.files.array_file import (
    ArrayFile,
    as_array,
    check_name,
    is_possible,
    new_file,
    reason,
    what_it_is,
    write_array,
)
from siglip.checkpoints.files.lazy_array import LazyArray

# In the library's order of types within a file.
DTYPES = {
    "I64": np.dtype("<i8"),
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "I32": np.dtype("<i4"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype("<f2"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
MAX_HEADER = 100_000_000  # bytes; the library's limit too
INDEX = "model.safetensors.index.json"


def read(path: str | os.PathLike) -> dict[str, LazyArray]:
    """The arrays of a file, in the order of their positions in it. Only the header is read.

    Raises:
      CheckpointError: there is no such file, it is not safetensors, is not as long as its header
        says, or holds a type other than DTYPES.
    """
    source = ArrayFile(path)
    header, begin = _header(source)
    if not _is_texts(header.pop("__metadata__", {})):
        raise CheckpointError(f"{source.path} has a damaged header (metadata that are not texts)")
    entries = sorted(_entry(source, name, fields) for name, fields in header.items())
    end = 0
    for entry in entries:
        if entry.begin != end or entry.end - entry.begin != entry.nbytes:
            raise CheckpointError(
                f"{source.path}: array {entry.name!r} is said to lie at bytes {entry.begin} to "
                f"{entry.end}, but {entry.nbytes} bytes from {end} on are due; the file is damaged"
            )
        end = entry.end
    if begin + end > source.size:
        raise _truncated(source, begin + end)
    if begin + end < source.size:
        raise CheckpointError(
            f"{source.path} goes on behind its last array: its header promises {begin + end} "
            f"bytes, {source.size} are there; copy it again"
        )
    return {entry.name: _lazy_array(source, entry, begin + entry.begin) for entry in entries}


def read_folder(folder: str | os.PathLike) -> dict[str, LazyArray]:
    """The arrays of model.safetensors, else those that model.safetensors.index.json names.

    Raises:
      CheckpointError: there is neither, a file is missing or damaged, lacks an array that the
        index says it has, or would lie outside the folder.
    """
    folder = os.fspath(folder)
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read as a folder: {reason(error)}") from error
    if "model.safetensors" in names:
        return read(os.path.join(folder, "model.safetensors"))
    if INDEX in names:
        return _read_shards(folder)
    pickle = next((name for name in names if re.fullmatch(r"pytorch_model.*\.bin", name)), None)
    if pickle:
        raise CheckpointError(
            f"{folder} holds {pickle!r}, a pickle, which may run any code and is never "
            "read; convert it to model.safetensors"
        )
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    there = f"there are {names[:10]}{more}" if names else "it is empty"
    raise CheckpointError(f"{folder} holds neither model.safetensors nor {INDEX}; {there}")


def write(
    path: str | os.PathLike, arrays: Mapping[str, LazyArray], metadata: dict[str, str]
) -> None:
    """Replaces the file in one move. The same arrays and metadata give the same bytes, which are
    those of the library where there is at most one entry of metadata (it has no order for more).

    Raises:
      CheckpointError: the file cannot be written, or an array has a type other than DTYPES, or a
        name that does not print.
    """
    codes = {dtype: code for code, dtype in DTYPES.items()}
    rank = {code: i for i, code in enumerate(DTYPES)}
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    rows = []
    for name, array in arrays.items():
        code = codes.get(array.dtype.newbyteorder("<"))
        if code is None:
            raise CheckpointError(
                f"{array.origin}: {array.dtype} has no place in {path}; convert it to one of "
                f"{', '.join(DTYPES)}"
            )
        check_name(path, name)
        if name in header or name == "__metadata__":
            raise CheckpointError(f"{path}: no array can have the name {name!r}; rename it")
        rows.append((rank[code], name, code, array))
    rows.sort(key=lambda row: row[:2])
    end = 0
    for _, name, code, array in rows:
        begin, end = end, end + array.nbytes
        header[name] = {"dtype": code, "shape": list(array.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with new_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for *_, array in rows:
            write_array(file, array)


class _Entry(NamedTuple):
    begin: int  # from the end of the header, in bytes
    end: int
    name: str
    code: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.code].itemsize


def _header(source: "ArrayFile") -> tuple[dict[str, Any], int]:
    """The parsed JSON, and the position of its end in the file."""
    with source.open() as file:
        head = file.read(256)
        length = int.from_bytes(head[:8], "little")
        if head[8:9] != b"{" or length > MAX_HEADER:
            raise CheckpointError(
                f"{source.path} is {what_it_is(head) or 'no safetensors file; copy it again'}"
            )
        if 8 + length > source.size:
            raise _truncated(source, 8 + length)
        file.seek(8)
        text = file.read(length)
    return parse_json(source.path, text), 8 + length


def _truncated(source: "ArrayFile", promised: int) -> CheckpointError:
    return CheckpointError(
        f"{source.path} is truncated: its header promises {promised} bytes, {source.size} are "
        "there; copy it again"
    )


def _entry(source: "ArrayFile", name: str, fields: Any) -> _Entry:
    check_name(source.path, name)
    where = f"{source.path}: array {name!r}"
    fields = fields if isinstance(fields, dict) else {}
    code, shape = fields.get("dtype"), fields.get("shape")
    offsets = fields.get("data_offsets")
    if not (isinstance(code, str) and _is_sizes(shape) and _is_sizes(offsets, 2)):
        raise CheckpointError(f"{where} has a damaged entry in the header; copy the file again")
    if code not in DTYPES:
        raise CheckpointError(
            f"{where} has the type {code!r}, which is not read; convert it to one of "
            f"{', '.join(DTYPES)}"
        )
    if not is_possible(shape, DTYPES[code]):
        raise CheckpointError(f"{where} has an impossible shape; the file is damaged")
    return _Entry(offsets[0], offsets[1], name, code, tuple(shape))


def _is_sizes(value: Any, length: int | None = None) -> bool:
    """Whether it is a list of integers from 0 on, which bools are not."""
    return (
        isinstance(value, list)
        and length in (None, len(value))
        and all(type(v) is int and v >= 0 for v in value)
    )


def _is_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(v, str) for v in value.values())


def _lazy_array(source: "ArrayFile", entry: _Entry, begin: int) -> LazyArray:
    dtype = DTYPES[entry.code]
    origin = f"{source.name}: {entry.name}"

    def read_array() -> np.ndarray:
        flat = np.empty(entry.nbytes, np.uint8)
        with source.open() as file:
            file.seek(begin)
            if file.readinto(flat.data) < flat.size:
                raise CheckpointError(f"{source.path} ended while {entry.name!r} was read")
        return as_array(origin, flat, dtype, entry.shape)

    return LazyArray(entry.shape, dtype, origin, read_array)


def _read_shards(folder: str) -> dict[str, LazyArray]:
    source = ArrayFile(os.path.join(folder, INDEX))
    if source.size > MAX_HEADER:
        raise CheckpointError(f"{source.path} has {source.size} bytes, too many for an index")
    with source.open() as file:
        text = file.read()
    if text[:1] != b"{" and (what := what_it_is(text)):
        raise CheckpointError(f"{source.path} is {what}")
    files = parse_json(source.path, text).get("weight_map")
    if not isinstance(files, dict) or not _is_texts(files):
        raise CheckpointError(f"{source.path} has no weight_map from arrays to files")
    for file in set(files.values()):
        # The name is checked, not the target: in a download cache, shards are links to elsewhere.
        if not file.isprintable() or set("\\:") & set(file) or {"", ".."} & {*file.split("/")}:
            raise CheckpointError(
                f"{source.path} names the file {file!r}, which would lie outside {folder}; nothing "
                "is read from there"
            )
    shards = {}
    for file in dict.fromkeys(files.values()):
        path = os.path.join(folder, file)
        if not os.path.exists(path):
            raise CheckpointError(f"{path} is missing, but {INDEX} names it; copy it too")
        shards[file] = read(path)
    for name, file in files.items():
        if name not in shards[file]:
            raise CheckpointError(
                f"{os.path.join(folder, file)} has no array {name!r}, but {INDEX} says so; the two "
                "are of different models or versions"
            )
    return {name: shards[file][name] for name, file in files.items()}


def parse_json(path: str, text: bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
      CheckpointError: it is none, or has a key twice.
    """
    try:
        parsed = json.loads(text.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} has a damaged header ({error}); copy it again") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{path} has a damaged header (no JSON object); copy it again")
    return parsed


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise ValueError(f"{twice!r} is there twice")
    return fields
