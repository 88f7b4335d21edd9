"""One sample of a tar shard: the bytes of its members, and the captions and numbers in them."""

import json
import re
from typing import Any, NamedTuple

from base.words import one_line
from input_pipeline.errors import BadExample
from input_pipeline.sources import storage
from input_pipeline.sources.contract import Example
from input_pipeline.sources.webdataset.tar_headers import (
    BLOCK,
    MAX_EXTENDED_BYTES,
    BrokenTar,
    Extent,
    header_of,
    member_at,
)

MAX_IMAGE_BYTES = 512 << 20  # bytes
MAX_TEXT_BYTES = 64 << 10  # bytes of a caption
MAX_JSON_BYTES = 1 << 20  # JSON may hold EXIF and other metadata of the image
GAP = 64 << 10  # bytes beside the image that one read of a sample may fetch needlessly


class Field(NamedTuple):
    """A member, or with a key, one value of a JSON member."""

    suffix: bytes
    key: str

    def __str__(self) -> str:
        return self.suffix.decode() + (f".{self.key}" if self.key else "")


def read_sample(
    blob: storage.Blob, members: list[Extent], example: Example, base: str
) -> tuple[str, bytes, list[bytes | None]]:
    """The image's name and bytes, and the bytes of the other members.

    Sets example["id"] as soon as the name is known, for the messages of later errors.
    """
    image = members[0]
    present = [member for member in members if member.start >= 0]
    if image not in present:
        raise BadExample("damaged record", "its index is damaged")
    try:
        for member, most, kind in [
            (image, MAX_IMAGE_BYTES, "image too large"),
            *((member, MAX_JSON_BYTES, "damaged record") for member in members[1:]),
        ]:
            if member.size > most:
                headers = blob.read(min(image.data - image.start, MAX_EXTENDED_BYTES), image.start)
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
        raise BadExample("damaged record", one_line(error)) from error
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
    """Name of the member with these headers, without characters that a terminal cannot print."""
    try:
        member = member_at(lambda start, size: headers[start : start + size], 0, {})
    except BrokenTar:
        member = None
    if member is None:
        raise BadExample("damaged record", "no tar header where the index has one")
    name = member.name.decode("utf-8", "replace")
    return "".join(c if c.isprintable() else "\ufffd" for c in name)


def _content(span: bytes, low: int, member: Extent) -> bytes:
    data = member.data - low
    content = span[data : data + member.size]
    try:
        header = header_of(span[data - BLOCK : data])
    except BrokenTar:
        header = None
    if header is None or header.checksum != member.checksum or len(content) != member.size:
        raise BadExample("damaged record", "the shard is not the one that was indexed")
    return content


class Fields:
    """Captions and numbers in the members of one sample."""

    def __init__(self, contents: dict[bytes, bytes | None]):
        self._contents = contents
        self._json: dict[str, Any] | None = None

    def json(self) -> dict[str, Any]:
        if self._json is None:
            content = self._contents[b"json"]
            try:
                parsed = json.loads(_decoded(content)) if content is not None else {}
            except (ValueError, RecursionError) as error:
                raise BadExample("damaged record", f"JSON: {one_line(error)}") from error
            if not isinstance(parsed, dict):
                raise BadExample("damaged record", "JSON that is no object")
            self._json = parsed
        return self._json

    def value(self, key: str) -> Any:
        """The value of a JSON key, 'a.b' for one inside an object; None where it is missing."""
        fields: Any = self.json()
        if key in fields:
            return fields[key]
        for part in key.split("."):
            fields = fields.get(part) if isinstance(fields, dict) else None
        return fields

    def texts(self, field: Field) -> list[str]:
        """The texts of a field: one, or those of a list; [] where the sample has none.

        null and NaN count as none: tables with empty cells are converted to them.
        """
        if not field.key:
            content = self._contents[field.suffix]
            _check_size(field, content or b"")
            return [] if content is None else [_decoded(content)]
        value = self.value(field.key)
        if value is None or value != value:
            return []
        texts = value if isinstance(value, list) else [value]
        for text in texts:
            if not isinstance(text, str):
                raise BadExample("damaged record", f"{field} is not text")
            _check_size(field, text)
            if re.search("[\ud800-\udfff]", text):
                raise BadExample("caption not UTF-8", f"{field}: half a character")
        return texts

    def integer(self, field: Field) -> int:
        if field.key:
            value = self.value(field.key)
            if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63:
                return value
        else:
            value = self._contents[field.suffix]
            if value is not None and re.fullmatch(rb"\s*-?\d{1,18}\s*", value):
                return int(value)
        raise BadExample("damaged record", f"no integer in {field}")


def _check_size(field: Field, text: str | bytes) -> None:
    if len(text) > MAX_TEXT_BYTES:
        raise BadExample(
            "damaged record", f"{field} has {len(text)} bytes, more than {MAX_TEXT_BYTES}"
        )


def _decoded(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadExample("caption not UTF-8", one_line(error)) from error
