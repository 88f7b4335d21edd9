"""Copies a TFDS data set prepared as tfrecord into ArrayRecord files, record by record."""

import importlib.util
import itertools
import json
import os
import pathlib
import re
import shutil
import struct
from collections.abc import Iterator
from typing import Any, BinaryIO, NoReturn

from google.protobuf.message import DecodeError

from base import whole_file
from base.errors import UserError
from base.progress import Progress
from base.words import nearest, one_line
from input_pipeline.convert.conversion import config_lines, locked, save
from input_pipeline.convert.writers import array_record_writer
from input_pipeline.sources.array_record import TfExample


def convert_tfds(folder: pathlib.Path, out: pathlib.Path) -> list[str]:
    """Copies a data set that TFDS prepared as tfrecord, as ArrayRecord, into the data_dir `out`.

    Returns:
      Lines for the user: what was copied, and the settings that read it.

    Raises:
      UserError: the folder is not such a data set, or is damaged.
    """
    info, splits = _tfds_info(folder)
    with locked(out):
        return _copied(folder, out, info, splits)


def _copied(folder: pathlib.Path, out: pathlib.Path, info: Any, splits: "Splits") -> list[str]:
    target = out.joinpath(info["name"], info.get("configName", ""), info["version"])
    if (target / "dataset_info.json").exists():  # written last
        raise UserError(f"{target} is prepared already; give another folder")
    target.mkdir(parents=True, exist_ok=True)
    shards = [shard for split in splits.values() for shard in split]
    progress = Progress(sum(count for _, count in shards), "records")
    for name, count in shards:
        _copy_records(folder / name, target / _renamed(name), count, progress)
    progress.close()
    names = {name for name, _ in shards}
    for file in folder.iterdir():
        if file.is_file() and file.name not in names and file.name != "dataset_info.json":
            shutil.copyfile(file, target / file.name)
    info["fileFormat"] = "array_record"
    for split in info["splits"]:
        if "filepathTemplate" in split:
            split["filepathTemplate"] = _renamed(split["filepathTemplate"])
    save(target / "dataset_info.json", json.dumps(info, indent=2))
    lines = [f"{sum(count for _, count in shards)} records in {target}"]
    if not _checks_data():
        lines.append("checksums of the data were not compared, which needs: pip install crc32c")
    dataset = "/".join(filter(None, (info["name"], info.get("configName"))))
    dataset += f":{info['version']}"
    settings = {"name": "tfds", "dataset": dataset, "data_dir": str(out.absolute())}
    return [*lines, f"splits: {', '.join(splits)}", "train with it:", *config_lines(settings)]


Splits = dict[str, list[tuple[str, int]]]


def _tfds_info(folder: pathlib.Path) -> tuple[dict[str, Any], Splits]:
    """The content of dataset_info.json, and split -> (file, records) of each shard."""
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
        format_ = info.get("fileFormat", "tfrecord")
        if format_ != "tfrecord":
            raise UserError(f"{folder} is prepared as {format_}; only tfrecord is converted")
        builder = read_only_builder.builder_from_directory(folder)
        splits = {
            name: list(zip(split.filenames, map(int, split.shard_lengths)))
            for name, split in builder.info.splits.items()
        }
        for key in ("name", "version", "configName"):  # folders below the new one
            if not re.fullmatch(r"\w[\w.+-]*" + "|" * (key == "configName"), info.get(key, "")):
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
        progress.update(count)
        return
    part = target.with_name(f".{target.name}.part")
    written = 0
    with array_record_writer(part) as write, file.open("rb") as records:
        for record in _tfrecords(records, file):
            write(record)
            written += 1
            progress.update()
    if written != count:
        raise UserError(
            f"{file} has {written} records, but dataset_info.json says {count}; "
            "copy or prepare the data set again"
        )
    whole_file.rename(part, target)


def _checks_data() -> bool:
    # Without the package crc32c, in Python, a few megabytes take a second.
    return importlib.util.find_spec("crc32c") is not None


def _tfrecords(file: BinaryIO, path: pathlib.Path) -> Iterator[bytes]:
    """Yields the records of a TFRecord file: u64 length, its masked CRC-32C, data, its CRC."""
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
        TfExample.FromString(data)
    except DecodeError:
        return False
    return True
