"""Copies a data set into another format, images byte for byte.

  python -m input_pipeline.convert --to array_record files path=pairs.jsonl --out FOLDER
  python -m input_pipeline.convert --to parquet \\
      tfds dataset=coco_captions data_dir=/data text=captions/text --out FOLDER
  python -m input_pipeline.convert tfds-files DATASET_DIR --out FOLDER

The first form reads any source: its name, then its settings as in config.input.source. The second
makes an ArrayRecord data set of one that TFDS prepared as tfrecord; FOLDER is the new data_dir.
Killed? Run the same command again: shards that are whole stay.
"""

import argparse
import ast
import concurrent.futures
import contextlib
import datetime
import glob
import importlib.util
import inspect
import io
import itertools
import json
import os
import pathlib
import re
import shlex
import shutil
import struct
import sys
import tarfile
import time
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]
from google.protobuf.message import DecodeError
from PIL import Image

from input_pipeline.array_record import Example
from input_pipeline.errors import BadExample, UserError
from input_pipeline.nearest import nearest
from input_pipeline.storage import is_url, one_line
from input_pipeline.webdataset import IMAGES

DONE, FAILED, MISTAKE, INTERRUPTED = 0, 1, 2, 85

STATE = "conversion.json"  # in the folder: what was asked for, and what became of each shard
ROW_GROUP = 100  # rows of Parquet that are read together: some megabytes of images
THREADS, AHEAD = 8, 64  # that read, and examples that are in memory
NAMES = 20  # bad examples that are listed


class Row(NamedTuple):
    """An example on its way."""

    index: int
    image: bytes
    suffix: str
    texts: list[str]
    languages: list[str]  # [] or parallel to texts
    label: int | None
    id: str
    weighted: bool  # it said how often each text is drawn


class Conversion:
    """Shards of a source, one after another.

    Args:
      source: any.
      asked: the command, as it is compared with that of an earlier run.
      to: one of WRITERS.
      out: the folder. New, or that of an earlier run of the same command.
      shard_examples: of the source, in each shard; bad ones are left out.
      name: what names of shards begin with.

    Raises:
      UserError: the folder belongs to something else, or no example is usable.
    """

    def __init__(
        self,
        source: Any,
        *,
        asked: list[str],
        to: str,
        out: pathlib.Path,
        shard_examples: int,
        name: str,
    ):
        self.source, self.to, self.out, self.size = source, to, out, shard_examples
        count = -(-len(source) // shard_examples)
        ending = {"webdataset": "tar", "files": "jsonl"}.get(to, to)
        self.names = [f"{name}-{k:05d}-of-{count:05d}.{ending}" for k in range(count)]
        self.pattern = f"{name}-*.{ending}"
        self._table = out / "pairs.jsonl" if to == "files" else None
        command = {"to": to, "source": asked, "shard_examples": shard_examples}
        command["examples"] = len(source)
        self.state = _state(out, command)

    def run(self) -> None:
        finished = self._table is not None and self._table.exists()
        shards = self.state["shards"]
        left = [
            k
            for k, name in enumerate(self.names)
            if not finished and not (name in shards and (self.out / name).exists())
        ]
        if len(left) < len(self.names):
            whole = len(self.names) - len(left)
            print(f"{whole} of {len(self.names)} shards are there already", file=sys.stderr)
        sizes = [min(self.size, len(self.source) - k * self.size) for k in left]
        progress = Progress(sum(sizes), "examples")
        class_names = self.source.class_names
        with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
            for k, size in zip(left, sizes):
                name, report = self.names[k], Report()
                indices = range(k * self.size, k * self.size + size)
                rows = report.counted(self._rows(indices, pool, progress, report))
                part = self.out / f".{name}.part"
                WRITERS[self.to](part, rows, class_names)
                # Before the name, so that a shard that has its name has its report.
                shards[name] = vars(report)
                _save(self.out / STATE, json.dumps(self.state, indent=1))
                os.replace(part, self.out / name)
        progress.end()
        if not any(shard["written"] for shard in shards.values()):
            bad = next(iter(shards.values()))["bad"]
            raise UserError(f"no example could be used; the first: {bad[0]}")
        if class_names and self.to == "array_record":  # as TFDS does
            lines = [" ".join(str(name).split()) for name in class_names]
            _save(self.out / "label.labels.txt", "\n".join(lines) + "\n")
        if self._table is not None:
            self._join(self._table)

    def _join(self, table: pathlib.Path) -> None:
        """The parts of a table, which were the shards, into one."""
        parts = [self.out / name for name in self.names]
        if not table.exists():
            whole = self.out / ".pairs.jsonl.part"
            with whole.open("wb") as file:
                for part in parts:
                    with part.open("rb") as rows:
                        shutil.copyfileobj(rows, file)
            os.replace(whole, table)
        for part in parts:
            part.unlink(missing_ok=True)

    def _rows(
        self,
        indices: range,
        pool: concurrent.futures.Executor,
        progress: "Progress",
        report: "Report",
    ) -> Iterator[Row]:
        for first in range(indices.start, indices.stop, AHEAD):
            several = range(first, min(first + AHEAD, indices.stop))
            for row in pool.map(self._row, several):
                progress.step()
                if isinstance(row, BadExample):
                    report.bad.append(f"{row.id}: {row}")
                else:
                    yield row

    def _row(self, i: int) -> Row | BadExample:
        name = f"[{i}]"
        try:
            example = self.source[i]
            name = example["id"]
            return _row(i, example, self.to)
        except BadExample as error:
            error.id = error.id or name
            return error

    def lines(self) -> list[str]:
        """What was done, what was left out, and how to train with it."""
        reports = [self.state["shards"][name] for name in self.names]
        written = sum(report["written"] for report in reports)
        bad = [name for report in reports for name in report["bad"]]
        lines = [f"{written} examples in {self.out}"]
        if bad:
            lines.append(f"left out {len(bad)} that cannot be used:")
            lines += [f"  {name}" for name in bad[:NAMES]]
            if len(bad) > NAMES:
                lines.append(f"  and {len(bad) - NAMES} more, all in {self.out / STATE}")
        if any(report["weights"] for report in reports):
            lines.append("not copied: how often each caption is drawn; set it again")
        most = max(report["texts"] for report in reports)
        total = {
            key: sum(report[key] for report in reports) for key in ("labels", "languages", "mixed")
        }
        has = {"label": total["labels"] == written, "language": total["languages"] == written}
        for what in ("labels", "languages"):
            if 0 < total[what] < written:
                lines.append(f"only {total[what]} of them have {what}")
        if total["mixed"] and self.to in ("webdataset", "files"):
            has["language"] = False
            lines.append("the language of each caption is in `languages`, which is not read back")
        folder = pathlib.Path(glob.escape(str(self.out.absolute())))
        path = folder / self.pattern if self._table is None else self._table.absolute()
        settings = {"name": self.to, "path": str(path)}
        if self.to == "webdataset":
            keys = ["json.caption", *(f"json.caption_{k}" for k in range(1, most))][:most]
            if most != 1:
                settings["captions"] = str(tuple((key, 1.0) for key in keys))
            fields = {"label": "json.label", "language": "json.language"}
        elif self.to == "files":
            settings |= {} if most else {"text_column": ""}
            fields = {"label_column": "label", "language_column": "language"}
        else:
            settings |= {} if most else {"text": ""}
            fields = {"label": "label", "language": "language"}
        settings |= {key: field for key, field in fields.items() if has[field.split(".")[-1]]}
        lines.append("train with it:")
        return [*lines, *_config(settings)]


class Report:
    """What became of the examples of a shard."""

    def __init__(self):
        self.written = self.labels = self.languages = 0  # examples, and how many have these
        self.mixed = 0  # examples with texts in several languages
        self.texts = 0  # of the example that has most
        self.weights = False
        self.bad: list[str] = []

    def counted(self, rows: Iterator[Row]) -> Iterator[Row]:
        for row in rows:
            self.written += 1
            self.labels += row.label is not None
            self.languages += bool(row.languages)
            self.mixed += len(set(row.languages)) > 1
            self.texts = max(self.texts, len(row.texts))
            self.weights |= row.weighted
            yield row


def _row(i: int, example: dict[str, Any], to: str) -> Row:
    image = example["image"]
    if isinstance(image, np.ndarray):  # of a source that draws its images
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        image = file.getvalue()
    texts, label = list(example["texts"]), example.get("label")
    if not image:
        raise BadExample("no image", "the file is missing or empty")
    suffix = _suffix(image)
    if not suffix or (to == "webdataset" and suffix not in IMAGES):
        raise BadExample("unknown image format", f"it begins with {bytes(image[:8])!r}")
    if not texts and label is None:
        raise BadExample("no caption")
    languages = list(example.get("languages", []))
    try:
        "".join([*texts, *languages]).encode()
    except UnicodeEncodeError as error:  # half a surrogate, out of JSON
        raise BadExample("caption not UTF-8", one_line(error)) from error
    name, weighted = str(example["id"]), "weights" in example
    return Row(i, bytes(image), suffix, texts, languages, label, name, weighted)


MAGIC = {
    rb"\xff\xd8\xff": "jpg",
    rb"\x89PNG\r\n\x1a\n": "png",
    rb"RIFF....WEBP": "webp",
    rb"GIF8": "gif",
    rb"....ftyp(avif|avis)": "avif",
    rb"II\*\0|MM\0\*": "tiff",
    rb"P[1-6]\s": "ppm",
    rb"BM": "bmp",
}


def _suffix(image: bytes) -> str:
    """'' where the first bytes are those of no format that training decodes."""
    matches = (suffix for magic, suffix in MAGIC.items() if re.match(magic, image[:16], re.DOTALL))
    return next(matches, "")


def _write_array_record(path: pathlib.Path, rows: Iterator[Row], class_names: Any) -> None:
    with _records(path) as write:
        for row in rows:
            example = Example()
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
def _records(path: pathlib.Path) -> Iterator[Callable[[bytes], None]]:
    """Writes records to a file, one compressed by one: of a group, all are read for each.

    Raises:
      OSError: the disk is full, say.
    """
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    try:
        yield writer.write
        writer.close()  # here the library says that it failed
    except RuntimeError as error:
        raise OSError(one_line(error)) from error


def _write_parquet(path: pathlib.Path, rows: Iterator[Row], class_names: Any) -> None:
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


def _write_webdataset(path: pathlib.Path, rows: Iterator[Row], class_names: Any) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for row in rows:
            members = {row.suffix: row.image}
            if row.texts:
                members["txt"] = row.texts[0].encode()
            # Keys of their own for further captions: a source names its captions by keys.
            about = {f"caption_{k}" if k else "caption": t for k, t in enumerate(row.texts)}
            fields = {**about, "captions": row.texts, **_about(row, class_names)}
            members["json"] = json.dumps(fields, ensure_ascii=False).encode("utf-8", "replace")
            for suffix, content in members.items():
                info = tarfile.TarInfo(f"{row.index:08d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def _write_files(path: pathlib.Path, rows: Iterator[Row], class_names: Any) -> None:
    with path.open("w", encoding="utf-8", errors="replace") as table:
        for row in rows:
            # Not all in one folder: file systems and people get slow with a million entries.
            name = f"images/{row.index // 10_000:05d}/{row.index:08d}.{row.suffix}"
            place = path.parent / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(row.image)
            about = _about(row, class_names)
            if "class" in about:  # its number depends on which classes the table has
                about["label"] = about.pop("class")
            fields = {"image": name, "caption": row.texts, **about}
            table.write(json.dumps(fields, ensure_ascii=False) + "\n")


WRITERS = {
    "array_record": _write_array_record,
    "parquet": _write_parquet,
    "webdataset": _write_webdataset,
    "files": _write_files,
}


def _about(row: Row, class_names: list[str] | None) -> dict[str, Any]:
    """What JSON says of an example beside its captions."""
    about: dict[str, Any] = {"id": row.id}
    if row.languages:
        about["languages"] = row.languages
        if len(set(row.languages)) == 1:
            about["language"] = row.languages[0]
    if row.label is not None:
        about["label"] = row.label
        if class_names and 0 <= row.label < len(class_names):
            about["class"] = str(class_names[row.label])
    return about


def _state(out: pathlib.Path, command: dict[str, Any]) -> dict[str, Any]:
    """That of an earlier run of the same command, or a new one in a new folder."""
    file = out / STATE
    if file.exists():
        try:
            state = json.loads(file.read_text(encoding="utf-8"))
            before = {key: state[key] for key in command}
            state["shards"].keys()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{file} is damaged; give a new folder") from error
        for key, value in command.items():
            if before[key] != value:
                raise UserError(
                    f"--out {out} is of another conversion, {key} {_told(before[key])} instead of "
                    f"{_told(value)}; give a new folder"
                )
        return state
    others = out.is_dir() and [path for path in out.iterdir() if path.suffix != ".part"]
    if others or (out.exists() and not out.is_dir()):
        raise UserError(f"--out {out} is not empty, and not of this conversion; give a new folder")
    out.mkdir(parents=True, exist_ok=True)
    state = {**command, "shards": {}}
    _save(file, json.dumps(state))
    return state


def _told(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _save(path: pathlib.Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8", errors="replace")
    os.replace(part, path)


def _config(settings: dict[str, str]) -> list[str]:
    def quoted(value: str) -> str:
        plain = "'" in value and not set(value) & set('"$`\\!')
        return f'"{value}"' if plain else shlex.quote(value)

    return [f"  --config.input.source.{key}={quoted(v)}" for key, v in settings.items()]


class Progress:
    """One line on stderr: how far, how fast, how long still."""

    def __init__(self, total: int, what: str):
        self._total, self._what, self._done = total, what, 0
        self._begun = self._told = time.monotonic()
        self._live = sys.stderr.isatty()

    def step(self, count: int = 1) -> None:
        self._done += count
        if time.monotonic() - self._told > (0.5 if self._live else 30):
            self._tell()

    def end(self) -> None:
        self._tell()
        if self._live:
            print(file=sys.stderr)

    def _tell(self) -> None:
        self._told = time.monotonic()
        rate = self._done / max(self._told - self._begun, 1e-9)
        left = datetime.timedelta(seconds=round((self._total - self._done) / max(rate, 1e-9)))
        line = f"{self._done}/{self._total} {self._what}, {rate:.0f}/s, {left} left"
        start, end = ("\r", "   ") if self._live else ("", "\n")
        print(f"{start}{line}", end=end, file=sys.stderr, flush=True)


# A source from the words of a command.


def make_source(words: list[str]) -> Any:
    """The source that `name key=value key=value` says.

    Raises:
      UserError: there is no such source or setting, or the source refuses.
    """
    from input_pipeline import SOURCES  # here, so that nothing is imported in a circle

    name, *pairs = words
    if name not in SOURCES:
        raise UserError(f"there is no source {name!r}; {nearest(name, SOURCES)}")
    known = inspect.signature(SOURCES[name]).parameters
    settings: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"{pair!r} is no setting of the source {name}; write key=value")
        if key not in known:
            raise UserError(f"source {name} has no setting {key!r}; {nearest(key, known)}")
        settings[key] = _value(key, value, known[key].annotation)
    lacking = [k for k, p in known.items() if p.default is p.empty and k not in settings]
    if lacking:
        raise UserError(f"source {name} needs {lacking[0]}=...; it has {', '.join(known)}")
    return SOURCES[name](**settings)


def _value(setting: str, text: str, kind: Any) -> Any:
    """'1' is a number, or a text where the setting is one."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = text
    several = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    kinds = tuple(typing.get_origin(one) or one for one in several)
    if isinstance(value, kinds):
        return value
    if float in kinds and isinstance(value, int):
        return float(value)
    if str in kinds:
        return text
    expected = " or ".join(one.__name__ for one in kinds)
    raise UserError(f"{setting}={text} is not of type {expected}")


# TFDS: the same records in other files.


def convert_tfds(folder: pathlib.Path, out: pathlib.Path) -> list[str]:
    """Copies a data set that TFDS prepared as tfrecord, as ArrayRecord, into the data_dir `out`.

    Returns:
      What was done, and how to train with it.

    Raises:
      UserError: it is no such data set, or is damaged.
    """
    info, splits = _tfds_info(folder)
    target = out.joinpath(info["name"], info.get("configName", ""), info["version"])
    if (target / "dataset_info.json").exists():  # written last
        raise UserError(f"{target} is prepared already; give another folder")
    target.mkdir(parents=True, exist_ok=True)
    shards = [shard for split in splits.values() for shard in split]
    progress = Progress(sum(count for _, count in shards), "records")
    for name, count in shards:
        _copy_records(folder / name, target / _renamed(name), count, progress)
    progress.end()
    names = {name for name, _ in shards}
    for file in folder.iterdir():
        if file.is_file() and file.name not in names and file.name != "dataset_info.json":
            shutil.copyfile(file, target / file.name)
    info["fileFormat"] = "array_record"
    for split in info["splits"]:
        if "filepathTemplate" in split:
            split["filepathTemplate"] = _renamed(split["filepathTemplate"])
    _save(target / "dataset_info.json", json.dumps(info, indent=2))
    lines = [f"{sum(count for _, count in shards)} records in {target}"]
    if not _checks_data():
        lines.append("checksums of the data were not compared, which needs: pip install crc32c")
    dataset = "/".join(filter(None, (info["name"], info.get("configName"))))
    dataset += f":{info['version']}"
    settings = {"name": "tfds", "dataset": dataset, "data_dir": str(out.absolute())}
    return [*lines, f"splits: {', '.join(splits)}", "train with it:", *_config(settings)]


Splits = dict[str, list[tuple[str, int]]]


def _tfds_info(folder: pathlib.Path) -> tuple[dict[str, Any], Splits]:
    """dataset_info.json, and of each split (file, records) of its shards."""
    from tensorflow_datasets.core import read_only_builder

    file = folder / "dataset_info.json"
    if not file.is_file():
        below = [str(p.parent) for p in folder.glob("**/dataset_info.json")]
        near = f"; {nearest(str(folder), below)}" if below else ""
        raise UserError(
            f"{folder} has no dataset_info.json, so it is no prepared TFDS data set{near}"
        )
    try:
        info = json.loads(file.read_text(encoding="utf-8"))
        found = info.get("fileFormat", "tfrecord")
        if found != "tfrecord":
            raise UserError(f"{folder} is prepared as {found}; only tfrecord is converted")
        builder = read_only_builder.builder_from_directory(folder)
        splits = {
            name: list(zip(split.filenames, map(int, split.shard_lengths)))
            for name, split in builder.info.splits.items()
        }
        for key in ("name", "version"):
            if not re.fullmatch(r"\w[\w.-]*", info[key]):
                raise UserError(f"{file} has no valid {key}: {info[key]!r}")
    except UserError:
        raise
    except Exception as error:  # TFDS raises whatever a damaged file leads it to
        raise UserError(f"{folder} cannot be read as TFDS files: {one_line(error)}") from error
    for shard, _ in (shard for split in splits.values() for shard in split):
        if not (folder / shard).is_file():
            raise UserError(f"{folder} lacks {shard}; copy or prepare the data set again")
    return info, splits


def _renamed(name: str) -> str:
    return name.replace(".tfrecord", ".array_record")


def _copy_records(file: pathlib.Path, target: pathlib.Path, count: int, progress: Progress) -> None:
    if target.exists():  # whole: it has its name
        progress.step(count)
        return
    part = target.with_name(f".{target.name}.part")
    written = 0
    with _records(part) as write, file.open("rb") as records:
        for record in _tfrecords(records, file):
            write(record)
            written += 1
            progress.step()
    if written != count:
        raise UserError(
            f"{file} has {written} records, but dataset_info.json says {count}; "
            "copy or prepare the data set again"
        )
    os.replace(part, target)


def _checks_data() -> bool:
    # In Python it takes a second for a few megabytes.
    return importlib.util.find_spec("crc32c") is not None


def _tfrecords(file: BinaryIO, path: pathlib.Path) -> Iterator[bytes]:
    """Records of a TFRecord file: u64 length, its masked CRC-32C, the data, that of the data."""
    from tensorboardX.record_writer import masked_crc32c

    def refuse(number: int, what: str) -> NoReturn:
        raise UserError(f"{path} {what} record {number}; copy or prepare the data set again")

    left = os.fstat(file.fileno()).st_size
    check_data = _checks_data()
    for number in itertools.count():
        if not left:
            return
        head = file.read(12)
        if len(head) < 12:
            refuse(number, "ends within")
        length, crc = struct.unpack("<QI", head)
        if masked_crc32c(head[:8]) != crc:
            refuse(number, "is damaged at the head of")
        left -= 16 + length
        if left < 0:
            refuse(number, "ends within")
        data, (crc,) = file.read(length), struct.unpack("<I", file.read(4))
        good = masked_crc32c(data) == crc if check_data else _is_example(data)
        if not good:
            refuse(number, "is damaged in")
        yield data


def _is_example(data: bytes) -> bool:
    try:
        Example.FromString(data)
    except DecodeError:
        return False
    return True


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="python -m input_pipeline.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", nargs="+", help="name key=value ..., or: tfds-files DATASET_DIR")
    parser.add_argument("--to", metavar="FORMAT", help=", ".join(WRITERS))
    parser.add_argument("--out", metavar="FOLDER", help="a new folder, on a local disk")
    parser.add_argument(
        "--shard_examples", metavar="N", type=int, default=5000, help="in each file (5000)"
    )
    flags = parser.parse_args(argv)
    if not flags.out:
        parser.error("pass --out, a new folder")
    if is_url(flags.out):
        parser.error(f"--out {flags.out} is no folder on a local disk")
    if flags.source[0] == "tfds-files":
        if len(flags.source) != 2 or flags.to:
            parser.error("tfds-files takes one folder, and --out")
        return flags
    if flags.to not in WRITERS:
        given = f"--to {flags.to} is not a format" if flags.to else "pass --to"
        parser.error(f"{given}; there are: {', '.join(WRITERS)}")
    if flags.shard_examples < 1:
        parser.error(f"--shard_examples {flags.shard_examples} must be at least 1")
    return flags


def main(argv: list[str]) -> int:
    """Does what the command line says; the exit code."""
    try:
        flags = _parse(argv)
        out = pathlib.Path(flags.out).expanduser()
        if flags.source[0] == "tfds-files":
            lines = convert_tfds(pathlib.Path(flags.source[1]).expanduser(), out)
        else:
            lines = _convert(flags, out)
    except UserError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return MISTAKE
    except OSError as failure:  # a full disk, say
        again = "run the same command again to go on"
        print(f"error: {one_line(failure)}; {again}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return INTERRUPTED
    print("\n".join(lines))
    return DONE


def _convert(flags: argparse.Namespace, out: pathlib.Path) -> list[str]:
    source = make_source(flags.source)
    if not len(source):
        raise UserError(f"source {flags.source[0]} has no examples")
    split = re.search(r"(?:^|\s)split=(\w+)", " ".join(flags.source[1:]))
    conversion = Conversion(
        source,
        asked=[flags.source[0], *sorted(flags.source[1:])],
        to=flags.to,
        out=out,
        shard_examples=flags.shard_examples,
        name=split[1] if split else "train",
    )
    conversion.run()
    return conversion.lines()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
