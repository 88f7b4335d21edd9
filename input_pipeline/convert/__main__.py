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
import inspect
import pathlib
import re
import sys
import types
import typing
from typing import Any, NoReturn

from input_pipeline import SOURCES
from input_pipeline.convert.conversion import Conversion, locked
from input_pipeline.convert.tfds_files import convert_tfds
from input_pipeline.convert.writers import WRITERS
from input_pipeline.errors import UserError
from input_pipeline.nearest import nearest
from input_pipeline.storage import is_url, one_line

DONE, FAILED, MISTAKE, INTERRUPTED = 0, 1, 2, 85


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
        told = f"split={default.default} alone; convert others with split=NAME into other folders"
        lines.insert(1, told)
    return lines


def make_source(words: list[str]) -> Any:
    """The source that `name key=value key=value` says.

    Raises:
      UserError: there is no such source or setting, or the source refuses.
    """
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
