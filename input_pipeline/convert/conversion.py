"""Converts a source into shards, one after another; an interrupted conversion goes on."""

import concurrent.futures
import contextlib
import fcntl
import glob
import io
import json
import os
import pathlib
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from base import whole_file
from base.errors import UserError
from base.progress import Progress
from base.words import one_line
from input_pipeline.convert.writers import WRITERS, Record
from input_pipeline.errors import BadExample
from input_pipeline.sources.webdataset.source import IMAGES

STATE = "conversion.json"  # in the folder: the command, and the report of each shard
THREADS, AHEAD = 8, 64  # threads that read, and examples in memory
LISTED = 20  # bad examples that are listed by name


class Conversion:
    """Writes the shards of a source, one after another.

    Args:
      source: any.
      asked: words of the command; a run that continues an earlier one must have the same.
      to: one of WRITERS.
      out: the folder. New, or that of an earlier run of the same command.
      shard_examples: of the source, in each shard; bad ones are left out.
      name: beginning of the names of shards.

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
                name, report = self.names[k], ShardReport()
                indices = range(k * self.size, k * self.size + size)
                rows = report.counted(self._rows(indices, pool, progress, report))
                part = self.out / f".{name}.part"
                WRITERS[self.to](part, rows, class_names)
                # Before the name, so that a shard that has its name has its report.
                shards[name] = vars(report)
                save(self.out / STATE, json.dumps(self.state, indent=1))
                whole_file.rename(part, self.out / name)
        progress.close()
        if not any(shard["written"] for shard in shards.values()):
            bad = next(iter(shards.values()))["bad"]
            raise UserError(f"no example could be used; the first: {bad[0]}")
        if class_names and self.to == "array_record":  # as TFDS does
            lines = [" ".join(str(name).split()) for name in class_names]
            save(self.out / "label.labels.txt", "\n".join(lines) + "\n")
        if self._table is not None:
            self._join(self._table)

    def _join(self, table: pathlib.Path) -> None:
        """Joins the shards, which are parts of a table, into the table."""
        parts = [self.out / name for name in self.names]
        if not table.exists():
            with whole_file.create(table) as file:
                for part in parts:
                    with part.open("rb") as rows:
                        shutil.copyfileobj(rows, file)
        for part in parts:
            part.unlink(missing_ok=True)

    def _rows(
        self,
        indices: range,
        pool: concurrent.futures.Executor,
        progress: Progress,
        report: "ShardReport",
    ) -> Iterator[Record]:
        for first in range(indices.start, indices.stop, AHEAD):
            several = range(first, min(first + AHEAD, indices.stop))
            for row in pool.map(self._record, several):
                progress.update()
                if isinstance(row, BadExample):
                    report.bad.append(f"{row.id}: {row}")
                else:
                    yield row

    def _record(self, i: int) -> Record | BadExample:
        name = f"[{i}]"
        try:
            example = self.source[i]
            name = example["id"]
            return _make_record(i, example, self.to)
        except BadExample as error:
            error.id = error.id or name
            return error

    def lines(self) -> list[str]:
        """Lines for the user: what was written and left out, and the settings that read it."""
        reports = [self.state["shards"][name] for name in self.names]
        written = sum(report["written"] for report in reports)
        bad = [name for report in reports for name in report["bad"]]
        lines = [f"{written} examples in {self.out}"]
        if bad:
            lines.append(f"left out {len(bad)} that cannot be used:")
            lines += [f"  {name}" for name in bad[:LISTED]]
            if len(bad) > LISTED:
                lines.append(f"  and {len(bad) - LISTED} more, all in {self.out / STATE}")
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
        if total["mixed"] and self.to == "webdataset":
            has["language"] = False
            lines.append("the language of each caption is in `languages`, which is not read back")
        folder = pathlib.Path(glob.escape(str(self.out.absolute())))
        path = folder / self.pattern if self._table is None else self._table.absolute()
        settings = {"name": self.to, "path": str(path)}
        if self.to == "webdataset":
            keys = ["json.caption", *(f"json.caption_{k}" for k in range(1, most))][:most]
            if most != 1:
                settings["captions"] = str(tuple((key, 1.0) for key in keys))
            columns = {"label": "json.label", "language": "json.language"}
        elif self.to == "files":
            settings |= {} if most else {"text_column": ""}
            columns = {"label": "label", "language": "languages"}
        else:
            settings |= {} if most else {"text": ""}
            columns = {"label": "label", "language": "language"}
        suffix = "_column" if self.to == "files" else ""
        settings |= {f"{key}{suffix}": columns[key] for key in columns if has[key]}
        lines.append("train with it:")
        return [*lines, *config_lines(settings)]


class ShardReport:
    """Counts of the examples of a shard, and the bad ones."""

    def __init__(self):
        self.written = self.labels = self.languages = 0  # examples, and how many have these
        self.mixed = 0  # examples with texts in several languages
        self.texts = 0  # most texts of one example
        self.weights = False
        self.bad: list[str] = []

    def counted(self, rows: Iterator[Record]) -> Iterator[Record]:
        for row in rows:
            self.written += 1
            self.labels += row.label is not None
            self.languages += bool(row.languages)
            self.mixed += len(set(row.languages)) > 1
            self.texts = max(self.texts, len(row.texts))
            self.weights |= row.weighted
            yield row


def _make_record(i: int, example: dict[str, Any], to: str) -> Record:
    image = example["image"]
    if isinstance(image, np.ndarray):  # from a source that has pixels
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
    if label is not None and not -(2**63) <= label < 2**63:
        raise BadExample("damaged record", f"its label is {label}")
    languages = list(example.get("languages", []))
    try:
        "".join([*texts, *languages]).encode()
    except UnicodeEncodeError as error:  # half a surrogate, out of JSON
        raise BadExample("caption not UTF-8", one_line(error)) from error
    name, weighted = str(example["id"]), "weights" in example
    return Record(i, bytes(image), suffix, texts, languages, label, name, weighted)


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
    """Suffix of the image's format; '' where training decodes no format with such first bytes."""
    matches = (suffix for magic, suffix in MAGIC.items() if re.match(magic, image[:16], re.DOTALL))
    return next(matches, "")


def _state(out: pathlib.Path, command: dict[str, Any]) -> dict[str, Any]:
    """The state of an earlier run of the same command, or a new one in a new folder."""
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
                    f"--out {out} is of another conversion, {key} {_as_text(before[key])} "
                    f"instead of {_as_text(value)}; give a new folder"
                )
        return state
    others = out.is_dir() and [path for path in out.iterdir() if path.suffix != ".part"]
    if others or (out.exists() and not out.is_dir()):
        raise UserError(f"--out {out} is not empty, and not of this conversion; give a new folder")
    out.mkdir(parents=True, exist_ok=True)
    state = {**command, "shards": {}}
    save(file, json.dumps(state))
    return state


def _as_text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def save(path: pathlib.Path, text: str) -> None:
    whole_file.write_text(path, text, errors="replace")


def config_lines(settings: dict[str, str]) -> list[str]:
    def quoted(value: str) -> str:
        plain = "'" in value and not set(value) & set('"$`\\!')
        return f'"{value}"' if plain else shlex.quote(value)

    return [f"  --config.input.source.{key}={quoted(v)}" for key, v in settings.items()]


@contextlib.contextmanager
def locked(out: pathlib.Path) -> Iterator[None]:
    """Locks the folder for this process; the lock ends with the process, however that ends.

    Raises:
      UserError: another conversion writes there.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; give a new folder")
    out.mkdir(parents=True, exist_ok=True)
    folder = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise UserError(f"--out {out}: another conversion writes there; wait for it") from error
    finally:
        os.close(folder)
