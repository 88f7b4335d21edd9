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
import inspect
import pathlib
import re
import sys
from typing import Any

from base import command_line
from base.errors import UserError
from input_pipeline.convert.conversion import Conversion, locked
from input_pipeline.convert.tfds_files import convert_tfds
from input_pipeline.convert.writers import WRITERS
from input_pipeline.sources.from_words import make_source
from input_pipeline.sources.storage import is_url


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = command_line.Parser(prog="python -m input_pipeline.convert", description=__doc__)
    parser.add_argument("source", nargs="+", help="name key=value ..., or: tfds-files DATASET_DIR")
    parser.add_argument("--to", metavar="FORMAT", help=", ".join(WRITERS))
    parser.add_argument("--out", metavar="FOLDER", help="a new folder, on a local disk")
    parser.add_argument(
        "--shard_examples", metavar="N", type=int, default=5000, help="in each file (5000)"
    )
    flags = parser.parse_intermixed_args(argv)
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
    """Converts as the command line says; returns the exit code."""
    return command_line.run(lambda: _main(argv), failures=(OSError,))  # a full disk, say


def _main(argv: list[str]) -> None:
    flags = _parse(argv)
    out = pathlib.Path(flags.out).expanduser()
    if flags.source[0] == "tfds-files":
        lines = convert_tfds(pathlib.Path(flags.source[1]).expanduser(), out)
    else:
        lines = _convert(flags, out)
    print("\n".join(lines))


def _convert(flags: argparse.Namespace, out: pathlib.Path) -> list[str]:
    source = make_source(flags.source)
    if not len(source):
        raise UserError(f"source {flags.source[0]} has no examples")
    with locked(out):
        return _converted(flags, out, source)


def _converted(flags: argparse.Namespace, out: pathlib.Path, source: Any) -> list[str]:
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
    lines = conversion.lines()
    default = inspect.signature(type(source)).parameters.get("split")
    if default and not split:
        note = f"split={default.default} alone; convert others with split=NAME into other folders"
        lines.insert(1, note)
    return lines


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
