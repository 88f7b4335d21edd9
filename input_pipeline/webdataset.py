"""Tar shards as img2dataset and open_clip write them (WebDataset), read at random.

Members of one sample stand together and share their name up to the first dot of its last part:
000123.jpg, 000123.txt, 000123.json. The headers of each shard are walked once; where the members
lie is kept in a .npy file (storage.index_folder), so that later starts read no shard at all.
"""

import array
import collections
import concurrent.futures
import contextlib
import hashlib
import json
import os
import pathlib
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from input_pipeline import storage
from input_pipeline.errors import BadExample, UserError
from input_pipeline.nearest import nearest

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "avif", "tif", "tiff")
# Never read, whatever a config names: they are there to be run, or are no text.
NOT_TEXT = {*IMAGES, "pkl", "pickle", "pyd", "npy", "npz", "pt", "pth", "ten", "tar", "zip"}

MOST_IMAGE = 512 << 20  # bytes
MOST_TEXT = 64 << 10  # of a caption
MOST_JSON = 1 << 20  # holds EXIF and whatever else was known of an image
MOST_EXTENDED = 1 << 20  # of a name, or of the fields of a pax header
GAP = 64 << 10  # beside the image, what one read of a sample may fetch without need
LOOKED_AT = 10  # samples that are searched for the keys of the config
WARNINGS = 10


class WebDataset:
    """One example for each sample that has an image and a caption.

    Args:
      path: the shards, a pattern of them or several: 'cc12m/{00000..01242}.tar', 'data/*.tar',
        'gs://bucket/laion/{00000..41407}.tar'. Plain tar: compressed ones have no random access.
      image: suffixes of the image; the first that a sample has is taken.
      captions: (name, probability) of each caption. A name is the suffix of a member ('txt') or
        a key of the sample's JSON ('json.caption'). A sample's captions are those of them that
        it has; how often each is drawn is in proportion to the probabilities. (): there are none,
        which is enough for classification.
      label: where the class stands, an integer: 'cls' or 'json.KEY'. '': there is none.
      language: 'json.KEY', where the language of the captions stands ('en'). '': not known.

    Attributes:
      damage: (kind, shard) -> members and samples that could not be used.

    Raises:
      UserError: a shard is missing or compressed, no shard has a usable sample, no sample has a
        key of the config, the index cannot be written.
    """

    class_names = None

    def __init__(
        self,
        *,
        path: str | tuple[str, ...],
        image: tuple[str, ...] = IMAGES,
        captions: tuple[tuple[str, float], ...] = (("txt", 1.0),),
        label: str = "",
        language: str = "",
    ):
        self._captions = _captions(captions)
        self._label = _field("label", label) if label else None
        self._language = _field("language", language) if language else None
        if self._language and not self._language.key:
            raise UserError(f"webdataset: language={language!r} is no 'json.KEY'")
        self._layout = _layout(image, self._captions, self._label, self._language)

        shards = _open_all(storage.expand(path), self._layout)
        self._blobs = [blob for blob, _, _ in shards]
        self._files = [file for _, file, _ in shards]
        summaries = [summary for _, _, summary in shards]
        self._begins = [summary.begins for summary in summaries]
        self._languages = [tuple(map(sys.intern, summary.languages)) for summary in summaries]
        self._starts = np.cumsum([0, *(s.samples for s in summaries)], dtype=np.int64)
        self.damage: dict[tuple[str, str], int] = {}
        for blob, summary in zip(self._blobs, summaries):
            for kind, count in summary.damage.items():  # a shard may be named twice
                self.damage[kind, blob.path] = self.damage.get((kind, blob.path), 0) + count
        self._report(path, summaries)
        self._check_keys()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, i: int) -> dict[str, Any]:
        """image, texts, weights, id, shard; languages and label where the config names them.

        Raises:
          BadExample: the sample does not hold what its headers promised, or no valid captions.
        """
        blob, place, members, language = self._place(i)
        base = blob.path.rsplit("/", 1)[-1]
        example: dict[str, Any] = {"id": f"{base}[{place}]", "shard": blob.path}
        try:
            name, image, contents = _read(blob, members, example, base)
            example |= {"id": f"{base}/{name}", "image": image}
            fields = _Fields(dict(zip(self._layout.texts, contents)))
            texts = [(fields.text(f), weight) for f, weight in self._captions]
            texts = [(text, weight) for text, weight in texts if text and text.strip()]
            example["texts"] = [text for text, _ in texts]
            if self._captions:
                example["weights"] = [weight for _, weight in texts]
            if self._label:
                example["label"] = fields.integer(self._label)
        except BadExample as error:
            error.id, error.shard = example["id"], example["shard"]
            raise
        if self._language:
            example["languages"] = [language] * len(texts)
        return example

    def by_language(self) -> dict[str, np.ndarray]:
        """Language -> ascending indices, int64. Samples that name none are in none of them."""
        if not self._language:
            raise UserError("webdataset: set `language` to choose examples by their language")
        found: dict[str, list[np.ndarray]] = {}
        for shard, start in enumerate(self._starts[:-1]):
            try:
                rows, _ = _open(self._files[shard], self._layout.columns)
            except (OSError, ValueError):
                self._make_again(shard)
                rows, _ = _open(self._files[shard], self._layout.columns)
            for code, language in enumerate(self._languages[shard]):
                if language:
                    here = np.flatnonzero(rows[:, -1] == code) + start
                    found.setdefault(language, []).append(here)
        return {language: np.concatenate(found[language]) for language in sorted(found)}

    def _place(self, i: int) -> tuple[storage.Blob, int, list["_Extent"], str]:
        """Shard, place in it, where the members lie, language."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        # The last that starts at i or before: those with the same start before it are empty.
        shard = int(np.searchsorted(self._starts, i, side="right")) - 1
        place = i - int(self._starts[shard])
        row = self._row(shard, place)
        width = len(_Extent._fields)
        members = [_Extent(*row[j : j + width]) for j in range(0, self._layout.members, width)]
        language = self._languages[shard][row[-1]] if self._language else ""
        return self._blobs[shard], place, members, language

    def _row(self, shard: int, place: int) -> list[int]:
        # Read, not mapped: a map holds a file descriptor for each shard, and a file that someone
        # truncates would end the process (SIGBUS).
        size = 8 * self._layout.columns
        begin = self._begins[shard] + place * size
        row = _bytes_at(self._files[shard], begin, size)
        if len(row) < size:
            self._make_again(shard)
            row = _bytes_at(self._files[shard], begin, size)
            if len(row) < size:
                path = self._blobs[shard].path
                raise BadExample("damaged record", "its index is damaged", shard=path)
        return np.frombuffer(row, np.int64).tolist()

    def _make_again(self, shard: int) -> None:
        """Someone cleared the folder."""
        blob, file = self._blobs[shard], self._files[shard]
        try:
            same = _index_file(blob, self._layout, os.path.dirname(file)) == file
        except OSError as error:
            detail = storage.one_line(error)
            raise BadExample("damaged record", detail, shard=blob.path) from error
        if not same:  # i would be another sample
            detail = "the shard is not the one that was indexed"
            raise BadExample("damaged record", detail, shard=blob.path)
        _make_index(blob, file, self._layout)

    def _report(self, path: str | Sequence[str], summaries: list["_Summary"]) -> None:
        lines = []
        for blob, summary in zip(self._blobs, summaries):
            if not summary.samples:
                reasons = summary.broken or _counts(summary.damage) or "it is empty"
                lines.append(f"{blob.path} has no usable sample: {reasons}")
            elif summary.broken:
                lines.append(f"{blob.path} {summary.broken}; {summary.samples} samples before it")
        if not len(self):
            total = collections.Counter[str]()
            for (kind, _), count in self.damage.items():
                total[kind] += count
            suffixes = sorted({suffix for s in summaries for suffix in s.suffixes})
            seen = f"; members end in {', '.join(suffixes[:20])}" if suffixes else ""
            raise UserError(
                f"webdataset: no usable sample in path={path!r} ({_counts(total) or 'empty'}); "
                f"{lines[0]}{seen}; set `image` and `captions` to what "
                "is there; a sample's members stand together"
            )
        for line in lines[:WARNINGS]:
            logging.warning("webdataset: %s", line)
        if len(lines) > WARNINGS:
            logging.warning("webdataset: and %d more shards like these", len(lines) - WARNINGS)

    def _check_keys(self) -> None:
        """A misspelt key shows at once, not as a run without captions."""
        wanted = [f for f, _ in self._captions] + [f for f in (self._label, self._language) if f]
        keys = {f.key for f in wanted if f.key}
        if not keys:
            return
        found = set()
        at = 1 + self._layout.texts.index(b"json")
        for i in sorted(set(np.linspace(0, len(self) - 1, LOOKED_AT, dtype=np.int64).tolist())):
            blob, _, members, _ = self._place(i)
            if members[at].start < 0 or members[at].size > MOST_JSON:
                continue
            with contextlib.suppress(OSError, BadExample):
                content = blob.read(members[at].size, members[at].data)
                found |= _Fields({b"json": content}).json().keys()
        if not found:
            return
        for field in wanted:
            if not field.key or field.key in found:
                continue
            line = (
                f"webdataset: no JSON among {LOOKED_AT} samples of {self._blobs[0].path} ... has a "
                f"key {field.key!r}; {nearest(field.key, found)}"
            )
            others = [f for f, _ in self._captions if not f.key or f.key in found]
            if field in (self._label, self._language) or not others:
                raise UserError(line)
            logging.warning("%s", line)  # a caption that few have, beside others


# ---- what a config names -------------------------------------------------------------------------


class _Field(NamedTuple):
    """A member, or with a key, one value of a JSON member."""

    suffix: bytes
    key: str

    def __str__(self) -> str:
        return self.suffix.decode() + (f".{self.key}" if self.key else "")


def _field(setting: str, name: Any) -> _Field:
    if not isinstance(name, str) or not re.fullmatch(r"json\.[^\0]+|[A-Za-z0-9_.+-]+", name):
        raise UserError(f"webdataset: {setting}: {name!r} is neither a suffix nor 'json.KEY'")
    if name.startswith("json."):
        return _Field(b"json", name[5:])
    suffix = name.lower()
    if suffix == "json":
        raise UserError(f"webdataset: {setting}: 'json' needs the key, as in 'json.caption'")
    if suffix.rsplit(".", 1)[-1] in NOT_TEXT:
        raise UserError(f"webdataset: {setting}: members .{name} hold no text; name one that does")
    return _Field(suffix.encode(), "")


def _captions(captions: Any) -> list[tuple[_Field, float]]:
    found = []
    for pair in captions if isinstance(captions, list | tuple) else [captions]:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise UserError(
                f"webdataset: captions: {pair!r} is no (name, probability), as in ('txt', 1.0)"
            )
        name, weight = pair
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < 1e9:
            raise UserError(
                f"webdataset: captions: {name!r} has no probability above 0: {weight!r}"
            )
        found.append((_field("captions", name), float(weight)))
    return found


class _Layout(NamedTuple):
    """What the index of a shard depends on, beside the shard."""

    images: tuple[bytes, ...]
    texts: tuple[bytes, ...]  # all members but the image that are read
    captions: tuple[bytes, ...]  # one of which a sample must have
    language: str

    @property
    def members(self) -> int:
        return len(_Extent._fields) * (1 + len(self.texts))

    @property
    def columns(self) -> int:
        return self.members + bool(self.language)


def _layout(
    image: Any,
    captions: list[tuple[_Field, float]],
    label: _Field | None,
    language: _Field | None,
) -> _Layout:
    if not isinstance(image, list | tuple) or not image:
        raise UserError(f"webdataset: image={image!r} is no list of suffixes, as in ('jpg', 'png')")
    for suffix in image:
        if not isinstance(suffix, str) or suffix.lower().rsplit(".", 1)[-1] not in IMAGES:
            raise UserError(
                f"webdataset: image: {suffix!r} is no image; {nearest(str(suffix), IMAGES)}"
            )
    texts = {f.suffix for f, _ in captions} | {f.suffix for f in (label, language) if f}
    return _Layout(
        tuple(suffix.lower().encode() for suffix in image),
        tuple(sorted(texts)),
        tuple(sorted({f.suffix for f, _ in captions})),
        language.key if language else "",
    )


# ---- one sample ----------------------------------------------------------------------------------


class _Extent(NamedTuple):
    """Where a member lies. start: its first header; -1: the sample has no such member."""

    start: int
    data: int
    size: int
    checksum: int  # of the header before the data: shows that this is still the same file


def _read(
    blob: storage.Blob, members: list[_Extent], example: dict[str, Any], base: str
) -> tuple[str, bytes, list[bytes | None]]:
    """The image's name and bytes, and the bytes of the other members. Names the example as soon
    as its name is known."""
    image = members[0]
    present = [member for member in members if member.start >= 0]
    if image not in present:
        raise BadExample("damaged record", "its index is damaged")
    try:
        for member, most, kind in [
            (image, MOST_IMAGE, "image too large"),
            *((member, MOST_JSON, "damaged record") for member in members[1:]),
        ]:
            if member.size > most:
                headers = blob.read(min(image.data - image.start, MOST_EXTENDED), image.start)
                example["id"] = f"{base}/{_name(headers)}"
                raise BadExample(kind, f"a member of {member.size} bytes, more than {most}")
        low = min(member.start for member in present)
        high = max(member.data + member.size for member in present)
        if high - low <= image.size + GAP:
            spans = [(low, blob.read(high - low, low))] * len(members)
        else:
            spans = [
                (m.start, blob.read(m.data + m.size - m.start, m.start) if m.start >= 0 else b"")
                for m in members
            ]
    except OSError as error:
        raise BadExample("damaged record", storage.one_line(error)) from error
    low, span = spans[0]
    name = _name(span[image.start - low : image.data - low])
    example["id"] = f"{base}/{name}"
    contents = [
        _content(span, low, member) if member.start >= 0 else None
        for member, (low, span) in zip(members, spans)
    ]
    assert contents[0] is not None
    return name, contents[0], contents[1:]


def _name(headers: bytes) -> str:
    """Of the member whose headers these are; for people, so nothing that moves their cursor."""
    try:
        member = _member(lambda start, size: headers[start : start + size], 0, {})
    except _Broken:
        member = None
    if member is None:
        raise BadExample("damaged record", "no tar header where the index has one")
    name = member.name.decode("utf-8", "replace")
    return "".join(c if c.isprintable() else "\ufffd" for c in name)


def _content(span: bytes, low: int, member: _Extent) -> bytes:
    data = member.data - low
    content = span[data : data + member.size]
    try:
        header = _header(span[data - BLOCK : data])
    except _Broken:
        header = None
    if header is None or header.checksum != member.checksum or len(content) != member.size:
        raise BadExample("damaged record", "the shard is not the one that was indexed")
    return content


class _Fields:
    """What stands in the members of one sample."""

    def __init__(self, contents: dict[bytes, bytes | None]):
        self._contents = contents
        self._json: dict[str, Any] | None = None

    def json(self) -> dict[str, Any]:
        if self._json is None:
            content = self._contents[b"json"]
            try:
                parsed = json.loads(_decoded(content)) if content is not None else {}
            except (ValueError, RecursionError) as error:
                raise BadExample("damaged record", f"JSON: {storage.one_line(error)}") from error
            if not isinstance(parsed, dict):
                raise BadExample("damaged record", "JSON that is no object")
            self._json = parsed
        return self._json

    def text(self, field: _Field) -> str | None:
        """None: the sample has no such caption; in JSON null says so too."""
        if field.key:
            text = self.json().get(field.key)
            if text is not None and not isinstance(text, str):
                raise BadExample("damaged record", f"{field} is not text")
            size = len(text or "")
        else:
            content = self._contents[field.suffix]
            size = len(content or b"")
        if size > MOST_TEXT:
            raise BadExample("damaged record", f"{field} has {size} bytes, more than {MOST_TEXT}")
        if not field.key:
            return None if content is None else _decoded(content)
        if text is not None and re.search("[\ud800-\udfff]", text):
            raise BadExample("caption not UTF-8", f"{field}: half a character")
        return text

    def integer(self, field: _Field) -> int:
        if field.key:
            value = self.json().get(field.key)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
        else:
            value = self._contents[field.suffix]
            if value is not None and re.fullmatch(rb"\s*-?\d{1,18}\s*", value):
                return int(value)
        raise BadExample("damaged record", f"no integer in {field}")


def _decoded(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadExample("caption not UTF-8", storage.one_line(error)) from error


# ---- tar -----------------------------------------------------------------------------------------
# Not tarfile: it follows links, has no random access, and needs 30 us for a header.

BLOCK = 512
REGULAR = (b"0", b"\0", b"7")
WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders, fifos
SPARSE = b"GNU.sparse"  # a file with holes, which are not among its bytes
# Zeros for more than any writer's last block: a file that was allocated and never filled.
MOST_PADDING = 1 << 20
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18")

Read = Callable[[int, int], bytes]  # (start, size); less only where the file ends


class _Broken(Exception):
    """From here on it is no tar file; str() says why and where."""


class _Header(NamedTuple):
    kind: bytes
    name: bytes
    size: int
    checksum: int


class _Member(NamedTuple):
    name: bytes
    kind: bytes
    extent: _Extent


def _header(block: bytes) -> _Header | None:
    """None: zeros, which close a tar file. Raises _Broken for all else that is no header."""
    filled = block.translate(None, b"\0")  # most of a header is zeros: 3 times as fast
    if len(block) != BLOCK:
        raise _Broken("ends without the zeros that close a tar file")
    if not filled:
        return None
    digits = block[148:156].partition(b"\0")[0].strip()
    checksum = int(digits, 8) if re.fullmatch(rb"[0-7]+", digits) else -1
    total = sum(filled) - sum(block[148:156]) + 8 * ord(" ")
    if checksum != total:
        outside = block[:148] + block[156:]  # old writers took bytes as signed
        if checksum != total - 256 * sum(byte > 127 for byte in outside):
            raise _Broken("has no valid tar header")
    name = block[:100].partition(b"\0")[0]
    if block[257:263] == b"ustar\0" and block[345]:
        name = block[345:500].partition(b"\0")[0] + b"/" + name
    return _Header(block[156:157], name, _number(block[124:136]), checksum)


def _number(field: bytes) -> int:
    """Octal digits, or binary where the first bit is set (sizes from 8 GiB on)."""
    if field[0] & 0x80:
        if field[0] & 0x40:
            raise _Broken("has a header with a negative number")
        return int.from_bytes(field, "big") - (0x80 << 8 * (len(field) - 1))
    digits = field.partition(b"\0")[0].strip()
    try:
        if digits and not digits.isdigit():  # int() would take signs and underscores too
            raise ValueError
        return int(digits or b"0", 8)
    except ValueError:
        raise _Broken("has a header with no valid number") from None


def _member(read: Read, start: int, shared: dict[bytes, bytes]) -> _Member | None:
    """The member whose headers begin at `start`; None at the end of the archive.

    shared: fields of global pax headers, kept from member to member.
    """
    at, long_name, fields = start, None, {}
    while True:
        try:
            header = _header(read(at, BLOCK))
            if header is None:
                return None
            if header.kind not in (b"L", b"K", b"x", b"X", b"g"):
                break
            if header.size > MOST_EXTENDED:
                raise _Broken(f"has a name or pax header of {header.size} bytes")
            content = read(at + BLOCK, header.size)
            if len(content) < header.size:
                raise _Broken("ends inside a header")
            if header.kind == b"L":
                long_name = content.partition(b"\0")[0]
            elif header.kind == b"g":
                shared.update(_pax(content))
            elif header.kind != b"K":  # K: where a link leads
                fields = _pax(content)
        except _Broken as error:
            raise _Broken(f"{error}, at byte {at}") from None
        at += BLOCK + _padded(header.size)
    fields = {**shared, **fields}
    kind, size = header.kind, header.size
    if kind == b"\0" and header.name.endswith(b"/"):
        kind = b"5"  # a folder, in the oldest format
    if b"size" in fields:
        if not re.fullmatch(rb"\d{1,18}", fields[b"size"]):
            raise _Broken(f"has a pax header without a valid size, at byte {start}")
        size = int(fields[b"size"])
    if kind in WITHOUT_DATA:
        size = 0
    if SPARSE in fields:
        kind = b"S"
    name = fields.get(b"path") or long_name or header.name
    return _Member(name, kind, _Extent(start, at + BLOCK, size, header.checksum))


def _pax(content: bytes) -> dict[bytes, bytes]:
    """What matters here of the records 'length key=value\\n'; the length counts all of a record."""
    fields: dict[bytes, bytes] = {}
    at = 0
    while at < len(content) and content[at]:
        space = content.find(b" ", at, at + 20)
        digits = content[at:space] if space > 0 else b""
        end = at + int(digits) if digits.isdigit() else 0
        if end <= space + 1 or end > len(content):
            raise _Broken("has an invalid pax header")
        key, _, value = content[space + 1 : end - 1].partition(b"=")
        if key in (b"path", b"size"):
            fields[key] = value
        elif key.startswith(b"GNU.sparse"):
            fields[SPARSE] = b""
        at = end
    return fields


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


class _Reader:
    """A file in the order of a walk. Where members are small, many come out of one read; where
    they are large, hardly more than their headers is read."""

    LEAST, MOST = 4 << 10, 1 << 20
    REMOTE = 4 << 20  # the way there and back costs as much as this

    def __init__(self, blob: storage.Blob):
        self._blob, self._begin, self._data, self._used = blob, 0, b"", 0
        self._remote = storage.is_url(blob.path)
        self._chunk = self.LEAST

    def __call__(self, start: int, size: int) -> bytes:
        at = start - self._begin
        self._used += 1
        if at < 0 or at + size > len(self._data):
            # Worth more at a time where there was a header in every 2 KiB.
            dense = self._used * (2 << 10) >= self._chunk
            self._chunk = min(2 * self._chunk, self.MOST) if dense else self.LEAST
            chunk = self.REMOTE if self._remote else self._chunk
            self._data = self._blob.read(max(size, chunk), start)
            self._begin, at, self._used = start, 0, 0
        return self._data[at : at + size]


# ---- the index of a shard ------------------------------------------------------------------------

FORMAT = 1  # of the files below; a new number leaves the old files unused
# int64: samples, columns, words of the summary | summary: JSON, padded | rows: the _Extents of the
# image and of _Layout.texts, then with a language its place in the summary's list.
HEAD = 3


class _Summary(NamedTuple):
    samples: int
    begins: int  # of the rows in the file, in bytes
    damage: dict[str, int]
    broken: str  # why the walk ended early; '' where it did not
    suffixes: list[str]  # some that were seen, for error messages
    languages: list[str]


class _Samples:
    """Members in, rows out."""

    def __init__(self, layout: _Layout, read: Read):
        self._layout, self._read = layout, read
        self._wanted = {*layout.images, *layout.texts}
        self._key: bytes | None = None
        self._found: dict[bytes, _Extent] = {}
        self._counted = False  # something of this sample is in `damage` already
        self.rows = array.array("q")
        self.damage = collections.Counter[str]()
        self.suffixes: set[bytes] = set()
        self.languages: dict[str, int] = {}

    def add(self, member: _Member) -> None:
        name, kind, extent = member
        # Names are keys here and never paths; but who writes such names means no good.
        hostile = not name or name.startswith(b"/") or b"\0" in name or b".." in name.split(b"/")
        if hostile:
            self.damage["damaged record"] += 1
            return
        key, suffix = _split(name)
        if suffix and key != self._key:
            self.finish()
            self._key = key
        if kind not in REGULAR:
            self.damage["damaged record"] += 1
            self._counted = self._counted or bool(suffix)
        elif suffix in self._wanted:
            self._found.setdefault(suffix, extent)
        if suffix and len(self.suffixes) < 20:
            self.suffixes.add(suffix[:20])

    def tear(self, member: _Member | None) -> None:
        """The file is broken inside this member, or before a header (None)."""
        torn_here = member is not None and _split(member.name)[0] == self._key
        if torn_here:
            self._found.clear()
        self._counted = self._counted or torn_here or member is None
        self.finish()
        self.damage["damaged record"] += 1

    def finish(self) -> None:
        layout, found = self._layout, self._found
        images = [found[s] for s in layout.images if s in found and found[s].size]
        if images and (not layout.captions or any(s in found for s in layout.captions)):
            for extent in (images[0], *(found.get(s, _MISSING) for s in layout.texts)):
                self.rows.extend(extent)
            if layout.language:
                language = self._language(found.get(b"json", _MISSING))
                self.rows.append(self.languages.setdefault(language, len(self.languages)))
        elif self._key is not None and not self._counted:
            self.damage["no caption" if images else "no image"] += 1
        self._key, self._found, self._counted = None, {}, False

    def _language(self, extent: _Extent) -> str:
        if extent.start < 0 or extent.size > MOST_JSON:
            return ""
        try:
            fields = _Fields({b"json": self._read(extent.data, extent.size)})
            language = fields.text(_Field(b"json", self._layout.language))
        except BadExample:  # said again when the sample is read
            return ""
        return language if language and len(language) <= 64 else ""


_MISSING = _Extent(-1, 0, 0, 0)


def _split(name: bytes) -> tuple[bytes, bytes]:
    """'dir/a.seg.png' -> 'dir/a', 'seg.png'. No suffix: it is no member of a sample."""
    slash = name.rfind(b"/") + 1
    dot = name.find(b".", slash)
    return (name[:dot], name[dot + 1 :].lower()) if dot > slash else (name, b"")


def _walk(blob: storage.Blob, layout: _Layout) -> np.ndarray:
    """The index of a shard."""
    read = _Reader(blob)
    if read(0, BLOCK).startswith(COMPRESSED):
        raise UserError(
            f"{blob.path} is compressed, which has no random access; decompress it once and give "
            "the .tar"
        )
    samples, shared, broken, at = _Samples(layout, read), {}, "", 0
    while not broken:
        try:
            member = _member(read, at, shared)
        except _Broken as error:
            broken = str(error)
            samples.tear(None)
            break
        if member is None:
            if blob.size - at > MOST_PADDING:
                broken = f"has zeros in place of a header, at byte {at}"
                samples.tear(None)
            break
        extent = member.extent
        if extent.data + extent.size > blob.size:
            broken = f"ends inside a member, which begins at byte {extent.start}"
            samples.tear(member)
        else:
            samples.add(member)
        at = extent.data + _padded(extent.size)
    samples.finish()
    rows = np.frombuffer(samples.rows, np.int64) if samples.rows else np.zeros(0, np.int64)
    summary = json.dumps(
        {
            "damage": dict(samples.damage),
            "broken": broken,
            "suffixes": sorted(suffix.decode("utf-8", "replace") for suffix in samples.suffixes),
            "languages": list(samples.languages),
        }
    ).encode()
    words = np.frombuffer(summary + b" " * (-len(summary) % 8), np.int64)
    head = [len(rows) // layout.columns, layout.columns, len(words)]
    return np.concatenate([np.array(head, np.int64), words, rows])


def _open(file: str, columns: int) -> tuple[np.ndarray, _Summary]:
    """Rows [samples, columns], which stay on disk, and the summary.

    Raises:
      OSError: there is no such file.
      ValueError: it is damaged.
    """
    # What np.load(mmap_mode="r", allow_pickle=False) does for .npy; np.load opens zip files too.
    mapped = np.lib.format.open_memmap(file, mode="r")
    words = mapped.view(np.ndarray)
    if words.dtype != np.int64 or words.ndim != 1 or len(words) < HEAD:
        raise ValueError(f"{file} is no index")
    samples, width, length = words[:HEAD].tolist()
    if min(samples, length) < 0 or width != columns:
        raise ValueError(f"{file} is no index of {columns} columns")
    if len(words) != HEAD + length + samples * width:
        raise ValueError(f"{file} is no index of {samples} samples")
    try:
        fields = json.loads(words[HEAD : HEAD + length].tobytes())
        summary = _Summary(samples, mapped.offset + 8 * (HEAD + length), **fields)
    except (TypeError, RecursionError) as error:
        raise ValueError(f"{file} has no summary") from error
    return words[HEAD + length :].reshape(samples, width), summary


def _bytes_at(file: str, begin: int, size: int) -> bytes:
    """Fewer where the file ends, or is not there."""
    try:
        with open(file, "rb", buffering=0) as opened:
            return os.pread(opened.fileno(), size, begin)
    except OSError:
        return b""


def _make_index(blob: storage.Blob, file: str, layout: _Layout) -> None:
    try:
        index = _walk(blob, layout)
    except OSError as error:
        raise UserError(f"{blob.path} cannot be read: {storage.one_line(error)}") from error
    folder = pathlib.Path(file).parent
    temporary = ""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".tmp", delete=False) as out:
            temporary = out.name
            np.save(out, index, allow_pickle=False)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, file)  # at once: others see all of it or nothing
    except OSError as error:
        raise UserError(f"{folder} takes no index: {storage.one_line(error)}") from error
    finally:
        if temporary:
            pathlib.Path(temporary).unlink(missing_ok=True)


Shard = tuple[storage.Blob, str, _Summary]


def _index_file(blob: storage.Blob, layout: _Layout, folder: str) -> str:
    asked = repr((FORMAT, blob.fingerprint(), *layout))
    return os.path.join(folder, hashlib.sha256(asked.encode()).hexdigest()[:40] + ".npy")


def _open_shard(path: str, layout: _Layout, folder: str) -> Shard:
    blob = storage.Blob(path)
    try:
        file = _index_file(blob, layout, folder)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {storage.one_line(error)}") from error
    try:
        return blob, file, _open(file, layout.columns)[1]
    except (OSError, ValueError):
        _make_index(blob, file, layout)
        return blob, file, _open(file, layout.columns)[1]


def _open_all(paths: list[str], layout: _Layout) -> list[Shard]:
    """In the order of `paths`. Each process begins in an order of its own, so that those that
    share the folder find most of each other's work done."""
    folder = str(storage.index_folder())
    pool = concurrent.futures.ThreadPoolExecutor(max(4, os.cpu_count() or 1))
    try:
        order = np.random.default_rng().permutation(len(paths)).tolist()
        tasks = {i: pool.submit(_open_shard, paths[i], layout, folder) for i in order}
        _wait(set(tasks.values()))
        return [tasks[i].result() for i in range(len(paths))]
    finally:
        pool.shutdown(cancel_futures=True)


QUIET = 3.0  # seconds before there is a word of progress


def _wait(waiting: set[concurrent.futures.Future]) -> None:
    """Returns when all have ended, and raises what the first that failed raises."""
    begun, total, written = time.monotonic(), len(waiting), 0.0
    live = sys.stderr.isatty()
    while waiting:
        done, waiting = concurrent.futures.wait(
            waiting, timeout=min(1.0, QUIET), return_when=concurrent.futures.FIRST_EXCEPTION
        )
        for task in done:
            task.result()
        passed = time.monotonic() - begun
        if passed < QUIET or (written and passed - written < (1 if live else 30)):
            continue
        written, ready = passed, total - len(waiting)
        left = f", {passed / ready * len(waiting) / 60:.1f} minutes left" if ready else ""
        line = f"indexing tar shards: {ready} of {total}{left}"
        end = "\r" if live and waiting else "\n"
        print(f"{line:<70}" if live else line, end=end, file=sys.stderr, flush=True)


def _counts(damage: dict[str, int]) -> str:
    return ", ".join(f"{kind}: {count}" for kind, count in sorted(damage.items()))
