"""Reads the headers of a tar file: names and offsets of its members.

Not tarfile: it follows links, has no random access, and needs 30 us for a header. Nothing here
opens, writes or names a file.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from input_pipeline.sources import storage

MAX_EXTENDED_BYTES = 1 << 20  # bytes of a name, or of the fields of a pax header
BLOCK = 512
REGULAR = (b"0", b"\0", b"7")
FOLDER = b"5"
KINDS_WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders, FIFOs
SPARSE = b"GNU.sparse"  # a file with holes, which are not among its bytes
# Writers end a file with fewer zeros than this. More mean that it was allocated, never filled.
MAX_PADDING_BYTES = 1 << 20
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18")

Read = Callable[[int, int], bytes]  # (start, size); less only where the file ends


class Extent(NamedTuple):
    """Place of a member. start: its first header; -1: the sample has no such member."""

    start: int
    data: int
    size: int
    checksum: int  # of the header before the data; tells whether the file is still the same


class BrokenTar(Exception):
    """Raised where a file stops being a valid tar file; the message says why and where."""


class Header(NamedTuple):
    kind: bytes
    name: bytes
    size: int
    checksum: int


class Member(NamedTuple):
    name: bytes
    kind: bytes
    extent: Extent


def header_of(block: bytes) -> Header | None:
    """Parses a header; None for zeros, which end a tar file.

    Raises:
      BrokenTar: it is neither.
    """
    filled = block.translate(None, b"\0")  # most of a header is zeros: 3 times as fast
    if len(block) != BLOCK:
        raise BrokenTar("ends without the zeros that close a tar file")
    if not filled:
        return None
    digits = block[148:156].partition(b"\0")[0].strip()
    checksum = int(digits, 8) if re.fullmatch(rb"[0-7]+", digits) else -1
    total = sum(filled) - sum(block[148:156]) + 8 * ord(" ")
    if checksum != total:
        outside = block[:148] + block[156:]  # old writers took bytes as signed
        if checksum != total - 256 * sum(byte > 127 for byte in outside):
            raise BrokenTar("has no valid tar header")
    name = block[:100].partition(b"\0")[0]
    if block[257:263] == b"ustar\0" and block[345]:
        name = block[345:500].partition(b"\0")[0] + b"/" + name
    return Header(block[156:157], name, _number(block[124:136]), checksum)


def _number(field: bytes) -> int:
    """Octal digits, or binary where the first bit is set (sizes from 8 GiB on)."""
    if field[0] & 0x80:
        if field[0] & 0x40:
            raise BrokenTar("has a header with a negative number")
        return int.from_bytes(field, "big") - (0x80 << 8 * (len(field) - 1))
    digits = field.partition(b"\0")[0].strip()
    try:
        if digits and not digits.isdigit():  # int() would take signs and underscores too
            raise ValueError
        return int(digits or b"0", 8)
    except ValueError:
        raise BrokenTar("has a header with no valid number") from None


def member_at(read: Read, start: int, shared: dict[bytes, bytes]) -> Member | None:
    """The member whose headers begin at `start`; None at the end of the archive.

    shared: fields of global pax headers, kept from member to member.
    """
    at, long_name, fields = start, None, {}
    while True:
        try:
            header = header_of(read(at, BLOCK))
            if header is None:
                return None
            if header.kind not in (b"L", b"K", b"x", b"X", b"g"):
                break
            if header.size > MAX_EXTENDED_BYTES:
                raise BrokenTar(f"has a name or pax header of {header.size} bytes")
            content = read(at + BLOCK, header.size)
            if len(content) < header.size:
                raise BrokenTar("ends inside a header")
            if header.kind == b"L":
                long_name = content.partition(b"\0")[0]
            elif header.kind == b"g":
                shared.update(_pax(content))
            elif header.kind != b"K":  # K: where a link leads
                fields = _pax(content)
        except BrokenTar as error:
            raise BrokenTar(f"{error}, at byte {at}") from None
        at += BLOCK + padded(header.size)
    fields = {**shared, **fields}
    kind, size = header.kind, header.size
    if kind == b"\0" and header.name.endswith(b"/"):
        kind = FOLDER  # in the oldest format
    if b"size" in fields:
        if not re.fullmatch(rb"\d{1,18}", fields[b"size"]):
            raise BrokenTar(f"has a pax header without a valid size, at byte {start}")
        size = int(fields[b"size"])
    if kind in KINDS_WITHOUT_DATA:
        size = 0
    if SPARSE in fields:
        kind = b"S"
    name = fields.get(b"path") or long_name or header.name
    return Member(name, kind, Extent(start, at + BLOCK, size, header.checksum))


def _pax(content: bytes) -> dict[bytes, bytes]:
    """Path, size and sparseness from records 'length key=value\\n'; the length counts all of it."""
    fields: dict[bytes, bytes] = {}
    at = 0
    while at < len(content) and content[at]:
        space = content.find(b" ", at, at + 20)
        digits = content[at:space] if space > 0 else b""
        end = at + int(digits) if digits.isdigit() else 0
        if end <= space + 1 or end > len(content):
            raise BrokenTar("has an invalid pax header")
        key, _, value = content[space + 1 : end - 1].partition(b"=")
        if key in (b"path", b"size"):
            fields[key] = value
        elif key.startswith(b"GNU.sparse"):
            fields[SPARSE] = b""
        at = end
    return fields


def padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


class Reader:
    """Reads a file in ascending order through a buffer that adapts to the size of members.

    Many small members come out of one read; of large ones little more than the headers is read.
    """

    MIN_CHUNK, MAX_CHUNK = 4 << 10, 1 << 20
    REMOTE_CHUNK = 4 << 20  # takes about as long to transfer as the latency of one request

    def __init__(self, blob: storage.Blob):
        self._blob, self._begin, self._data, self._used = blob, 0, b"", 0
        self._remote = storage.is_url(blob.path)
        self._chunk = self.MIN_CHUNK

    def __call__(self, start: int, size: int) -> bytes:
        at = start - self._begin
        self._used += 1
        if at < 0 or at + size > len(self._data):
            # A larger chunk pays where there was a header in every 2 KiB.
            dense = self._used * (2 << 10) >= self._chunk
            self._chunk = min(2 * self._chunk, self.MAX_CHUNK) if dense else self.MIN_CHUNK
            chunk = self.REMOTE_CHUNK if self._remote else self._chunk
            self._data = self._blob.read(max(size, chunk), start)
            self._begin, at, self._used = start, 0, 0
        return self._data[at : at + size]
