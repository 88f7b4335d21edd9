"""Numpy's .npz archives, one array in memory at a time, nothing ever unpickled.

zipfile reads the directory and numpy.lib.format the headers of arrays. Arrays are unpacked here,
and not by numpy.load, which allocates whatever a header claims, before it looks at the size of the
file; nor by ZipFile.open, which copies an array twice, and needs one archive for all threads.
"""

import io
import os
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterable
from typing import NamedTuple

import ml_dtypes
import numpy as np

from siglip.checkpoints.errors import CheckpointError
from siglip.checkpoints.files.array_file import (
    ArrayFile,
    as_array,
    check_name,
    is_possible,
    new_file,
    what_it_is,
    write_array,
)
from siglip.checkpoints.files.lazy_array import LazyArray

NUMBERS = {np.dtype(code) for code in "?bhilqBHILQefd"}  # bool, integers, floats
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
MAX_HEADER = 10_000  # bytes of the text before an array; numpy's limit too
MAX_RATIO = 1032  # of deflate: a match of 258 bytes takes two bits at least
ALIGN = 64  # bytes
CHUNK = 1 << 20  # bytes that are read, and unpacked, at once


def read(path: str | os.PathLike) -> dict[str, LazyArray]:
    """The arrays of an archive by name, without '.npy', in the order of its directory. Their data
    are not read.

    Two-byte void is bfloat16: numpy has no such type and big_vision saves it so (big_vision#107).
    Arrays come in the byte order of this machine.

    Raises:
      CheckpointError: there is no such file, it is no .npz archive or a damaged one, a name is
        there twice, or an array is of another type than bool, integers, floats and bfloat16, or
        not as large as the directory says.
    """
    source, arrays = ArrayFile(path), {}
    with source.open() as file:
        for member in _members(source, file):
            if member.name in arrays:
                raise CheckpointError(f"{source.path} has two arrays {member.name!r}; save it anew")
            arrays[member.name] = _lazy_array(source, file, member)
    return arrays


def write(path: str | os.PathLike, arrays: Iterable[tuple[str, LazyArray]]) -> None:
    """Replaces the file in one move, uncompressed. The same arrays give the same bytes; numpy.load
    reads them, but for bfloat16, which it gives as two-byte void.

    Raises:
      CheckpointError: the file cannot be written, a name is given twice or does not print, or an
        array is of a type that `read` would refuse.
    """
    seen = set()
    with new_file(path) as file, zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays:
            check_name(path, name)
            if name in seen:
                raise CheckpointError(f"{path} is given two arrays {name!r}; rename one")
            seen.add(name)
            header = _header_of(array)
            # A fixed time and system, so that the same arrays give the same bytes.
            info = zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0))
            info.create_system = 3
            info.file_size = len(header) + array.nbytes  # by which zipfile chooses zip64
            with archive.open(info, "w") as member:
                member.write(header)
                write_array(member, array)


class _Member(NamedTuple):
    name: str
    start: int  # of its bytes in the file
    packed: int  # bytes in the file
    size: int  # bytes, header included
    deflated: bool
    crc: int


class _Header(NamedTuple):
    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype  # in the file's byte order
    length: int  # bytes


def _members(source: ArrayFile, file: io.BufferedReader) -> list[_Member]:
    try:
        with zipfile.ZipFile(file) as archive:
            infos = [info for info in archive.infolist() if not info.is_dir()]
    # zipfile's errors for damaged directories. It reads no more bytes than the file has.
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error) as error:
        file.seek(0)
        head = file.read(256)
        what = "" if head.startswith(b"PK") else what_it_is(head)
        if what:
            what = f"is {what}"
        elif head[6:9] == b"\0\0{":
            what = "is a safetensors file under a wrong name; rename it"
        elif "not a zip file" in str(error):
            what = (
                "is truncated or not an .npz archive (no zip directory at its end); copy it again"
            )
        else:
            what = f"has a damaged zip directory ({error}); copy it again"
        raise CheckpointError(f"{source.path} {what}") from error
    members = [_member(source, file, info) for info in infos]
    if sum(member.packed for member in members) > source.size:
        raise CheckpointError(f"{source.path} has arrays that overlap in the file; it is damaged")
    return members


def _member(source: ArrayFile, file: io.BufferedReader, info: zipfile.ZipInfo) -> _Member:
    if not info.filename.endswith(".npy"):
        raise CheckpointError(
            f"{source.path} has a member {info.filename!r}, which is no array (.npy); "
            "other members, such as pickles, are never read"
        )
    name = info.filename.removesuffix(".npy")
    check_name(source.path, name)
    where = f"{source.path}: array {name!r}"
    deflated = info.compress_type == zipfile.ZIP_DEFLATED
    if info.flag_bits & 1 or not (deflated or info.compress_type == zipfile.ZIP_STORED):
        raise CheckpointError(
            f"{where} is encrypted or compressed by another method than numpy's; save it anew"
        )
    header = b""
    if 0 <= info.header_offset < source.size:
        file.seek(info.header_offset)
        header = file.read(30)
    if len(header) < 30 or not header.startswith(b"PK\3\4"):
        raise CheckpointError(f"{where} is not where the zip directory says; copy the file again")
    # The lengths of name and extra field in the directory may differ from those before the data.
    start = info.header_offset + 30 + sum(struct.unpack_from("<HH", header, 26))
    if start + info.compress_size > source.size:
        raise CheckpointError(
            f"{where} is truncated: it ends at byte {start + info.compress_size}, but the file at "
            f"{source.size}; copy the file again"
        )
    limit = info.compress_size * (MAX_RATIO if deflated else 1)
    if info.file_size > limit or (not deflated and info.file_size < limit):
        raise CheckpointError(
            f"{where} claims {info.file_size} bytes, but {info.compress_size} in the file hold "
            f"{'at most' if deflated else 'exactly'} {limit}; the file is damaged"
        )
    return _Member(name, start, info.compress_size, info.file_size, deflated, info.CRC)


def _lazy_array(source: ArrayFile, file: io.BufferedReader, member: _Member) -> LazyArray:
    where, origin = f"{source.path}: array {member.name!r}", f"{source.name}: {member.name}"
    head = np.empty(min(member.size, MAX_HEADER + 12), np.uint8)
    try:
        header = _parse(head[: _fill(file, member, head)].tobytes())
    # A header is parsed as Python and as a numpy type: hostile text may raise any error there.
    except Exception as error:
        reason = str(error).partition("\n")[0][:200]
        raise CheckpointError(f"{where} has a damaged header ({reason!r})") from error
    dtype = _native(where, header.dtype)
    if not is_possible(header.shape, dtype):
        raise CheckpointError(f"{where} has an impossible shape; the file is damaged")
    array = LazyArray(header.shape, dtype, origin, lambda: _read(source, member, header, array))
    if header.length + array.nbytes != member.size:
        raise CheckpointError(
            f"{where} claims to be {dtype}{list(array.shape)}, {array.nbytes} bytes, but "
            f"{member.size - header.length} are there; the file is damaged"
        )
    return array


def _parse(head: bytes) -> _Header:
    stream = io.BytesIO(head)
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    version = np.lib.format.read_magic(stream)
    if version not in readers:
        raise ValueError(f"version {version} of .npy, which arrays of numbers do not need")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python 2's numbers; escapes in texts that are refused
        shape, fortran, dtype = readers[version](stream, max_header_size=MAX_HEADER)
    return _Header(tuple(int(n) for n in shape), fortran, dtype, stream.tell())


def _native(where: str, dtype: np.dtype) -> np.dtype:
    if dtype.hasobject:
        raise CheckpointError(
            f"{where} holds Python objects, a pickle, which may run any code and is never read; "
            "save numbers"
        )
    if dtype.kind == "V" and dtype.itemsize == 2 and not dtype.names and not dtype.subdtype:
        return BFLOAT16
    native = dtype.newbyteorder("=")
    if native not in NUMBERS:
        raise CheckpointError(f"{where} has the type {dtype.str!r}, which is not read")
    return native


def _read(source: ArrayFile, member: _Member, header: _Header, lazy: LazyArray) -> np.ndarray:
    """
    Raises:
      CheckpointError: the bytes are not those that were saved.
    """
    # One buffer for header and array, in which the array is aligned.
    pad = -header.length % ALIGN
    content = np.empty(pad + member.size, np.uint8)[pad:]
    try:
        with source.open() as file:
            count = _fill(file, member, content)
    except zlib.error as error:
        raise CheckpointError(f"{lazy.origin} is damaged ({error}); copy the file again") from error
    if count < member.size or zlib.crc32(content.data) != member.crc:
        raise CheckpointError(f"{lazy.origin} is damaged (wrong checksum); copy the file again")
    shape = header.shape[::-1] if header.fortran else header.shape
    array = as_array(lazy.origin, content[header.length :], lazy.dtype, shape)
    if not header.dtype.isnative:  # bfloat16 is saved as void, which has no byte order
        array = array.byteswap(inplace=True)
    return array.T if header.fortran else array


def _fill(file: io.BufferedReader, member: _Member, out: np.ndarray) -> int:
    """Reads the first bytes of a member into uint8 [n]; their number is less at its end.

    Raises:
      zlib.error: they cannot be unpacked.
    """
    file.seek(member.start)
    if not member.deflated:
        return file.readinto(out.data)  # `out` is not longer than the member
    unpack, left, at = zlib.decompressobj(-15), member.packed, 0
    while at < out.size and not unpack.eof:
        data = unpack.unconsumed_tail
        if not data:
            data = file.read(min(left, CHUNK))
            left -= len(data)
        piece = unpack.decompress(data, min(out.size - at, CHUNK))
        if not data and not piece:
            break
        out[at : at + len(piece)] = np.frombuffer(piece, np.uint8)
        at += len(piece)
    return at


def _header_of(array: LazyArray) -> bytes:
    if array.dtype == BFLOAT16:
        code = "<V2"
    elif array.dtype.newbyteorder("=") in NUMBERS:
        code = array.dtype.newbyteorder("<").str
    else:
        raise CheckpointError(
            f"{array.origin}: {array.dtype} has no place in an .npz; convert it to float32"
        )
    header = io.BytesIO()
    fields = {"descr": code, "fortran_order": False, "shape": tuple(array.shape)}
    np.lib.format.write_array_header_1_0(header, fields)
    return header.getvalue()
