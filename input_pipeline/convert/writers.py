"""Writers of one shard in each format, and the records that they are given."""

import contextlib
import io
import itertools
import json
import pathlib
import tarfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

from base.words import one_line
from input_pipeline.sources.array_record import TfExample

ROW_GROUP = 100  # rows of Parquet that are read together: some megabytes of images


class Record(NamedTuple):
    """A checked example on its way from the source into a shard."""

    index: int
    image: bytes
    suffix: str
    texts: list[str]
    languages: list[str]  # [] or parallel to texts
    label: int | None
    id: str
    weighted: bool  # it had weights, which are not written


def _write_array_record(path: pathlib.Path, rows: Iterator[Record], class_names: Any) -> None:
    with array_record_writer(path) as write:
        for row in rows:
            example = TfExample()
            feature = example.features.feature
            feature["image"].bytes_list.value.append(row.image)
            feature["id"].bytes_list.value.append(row.id.encode("utf-8", "replace"))
            feature["caption"].bytes_list.value.extend(text.encode() for text in row.texts)
            if row.languages:
                feature["language"].bytes_list.value.extend(tag.encode() for tag in row.languages)
            if row.label is not None:
                feature["label"].int64_list.value.append(row.label)
            write(example.SerializeToString(deterministic=True))


@contextlib.contextmanager
def array_record_writer(path: pathlib.Path) -> Iterator[Callable[[bytes], None]]:
    """Writes records to a file, each compressed alone, as reading one of a group reads all of it.

    Raises:
      OSError: the disk is full, say.
    """
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    try:
        yield writer.write
        writer.close()  # here the library reports earlier failures
    except RuntimeError as error:
        raise OSError(one_line(error)) from error


def _write_parquet(path: pathlib.Path, rows: Iterator[Record], class_names: Any) -> None:
    schema = pa.schema(
        [
            ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            ("caption", pa.list_(pa.string())),
            ("language", pa.list_(pa.string())),
            ("label", pa.int64()),
            ("id", pa.string()),
        ]
    )
    text: dict[str, Any] = {"dtype": "string", "_type": "Value"}
    label = {"names": list(map(str, class_names)), "_type": "ClassLabel"} if class_names else None
    features = {
        "image": {"_type": "Image"},
        "caption": {"feature": text, "_type": "Sequence"},
        "language": {"feature": text, "_type": "Sequence"},
        "label": label or {"dtype": "int64", "_type": "Value"},
        "id": text,
    }
    schema = schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    leaves = ("caption.list.element", "language.list.element", "label", "id", "image.path")
    # Images are compressed already.
    compression: Any = {**dict.fromkeys(leaves, "zstd"), "image.bytes": "none"}
    writer = pq.ParquetWriter(
        path, schema, compression=compression, use_dictionary=False, write_page_checksum=True
    )
    with writer:
        while group := list(itertools.islice(rows, ROW_GROUP)):
            columns = {
                "image": [
                    {"bytes": row.image, "path": f"{row.index:08d}.{row.suffix}"} for row in group
                ],
                "caption": [row.texts for row in group],
                "language": [row.languages for row in group],
                "label": [row.label for row in group],
                "id": [row.id.encode("utf-8", "replace").decode() for row in group],
            }
            writer.write_table(pa.table(columns, schema=schema), row_group_size=ROW_GROUP)


def _write_webdataset(path: pathlib.Path, rows: Iterator[Record], class_names: Any) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for row in rows:
            members = {row.suffix: row.image}
            if row.texts:
                members["txt"] = row.texts[0].encode()
            # A key for each caption, as the source webdataset names captions by keys.
            about = {f"caption_{k}" if k else "caption": t for k, t in enumerate(row.texts)}
            fields = {**about, "captions": row.texts, **_about(row, class_names)}
            if len(set(row.languages)) == 1:  # the source webdataset reads one for each sample
                fields["language"] = row.languages[0]
            members["json"] = json.dumps(fields, ensure_ascii=False).encode("utf-8", "replace")
            for suffix, content in members.items():
                info = tarfile.TarInfo(f"{row.index:08d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def _write_files(path: pathlib.Path, rows: Iterator[Record], class_names: Any) -> None:
    with path.open("w", encoding="utf-8", errors="replace") as table:
        for row in rows:
            # Folders of 10,000, as file systems get slow with a million entries in one.
            name = f"images/{row.index // 10_000:05d}/{row.index:08d}.{row.suffix}"
            place = path.parent / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(row.image)
            about = _about(row, class_names)
            if "class" in about:  # by name: the source files numbers classes itself
                about["label"] = about.pop("class")
            fields = {"image": name, "caption": row.texts, **about}
            table.write(json.dumps(fields, ensure_ascii=False) + "\n")


WRITERS = {
    "array_record": _write_array_record,
    "parquet": _write_parquet,
    "webdataset": _write_webdataset,
    "files": _write_files,
}


def _about(row: Record, class_names: list[str] | None) -> dict[str, Any]:
    """JSON fields of an example beside its captions."""
    about: dict[str, Any] = {"id": row.id}
    if row.languages:
        about["languages"] = row.languages
    if row.label is not None:
        about["label"] = row.label
        if class_names and 0 <= row.label < len(class_names):
            about["class"] = str(class_names[row.label])
    return about
