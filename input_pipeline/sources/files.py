"""Your own data: a table of captions (JSONL, CSV, TSV) and images in a folder or in zip files."""

import csv
import io
import json
import os
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np
from absl import logging

from base.errors import UserError
from base.words import nearest
from input_pipeline.sources import storage
from input_pipeline.sources.contract import Example
from input_pipeline.sources.zip_file import Zip

# Number of loose images whose existence is checked at the start. A missing folder shows at once,
# and a table of millions on a network disk does not take an hour to check.
CHECKED_FILES = 100
CHECKED_URLS = 4  # each check is a request


class Files:
    """One example for each row of a table. Table, folder and zip files may be behind URLs.

    Args:
      path: the table. .jsonl: an object in each line; .csv: quoted as spreadsheets do; .tsv:
        nothing quoted. CSV and TSV have the names of the columns in the first line. UTF-8.
      images: the folder or zip file that image names are relative to; '': the table's folder.
        A name may itself lead into a zip file, as in 'archive.zip/member.png'.
      image_column: the image's name.
      text_column: the caption; in JSONL also a list of captions. '': there are none, which
        is enough for classification.
      split_column: the split of a row. A table without this column is all 'train'.
      split: the rows to take; '': all, for training without a held-out part.
      label_column: the class, for evaluation: a name (class_names is then all names of the table,
        sorted) or an integer. '': none.
      language_column: the language of the row's captions; in JSONL also a list with the language
        of each caption. '': none.
      languages: keeps the captions in these languages alone, in this order. Rows that have none of
        them are left out, and their number is logged. (): all captions, as they are.

    Raises:
      UserError: a file, column, caption, label, language or split is missing; the message names
        the first lines of the table where it is.
    """

    def __init__(
        self,
        *,
        path: str,
        images: str = "",
        image_column: str = "image",
        text_column: str = "caption",
        split_column: str = "split",
        split: str = "train",
        label_column: str = "",
        language_column: str = "",
        languages: tuple[str, ...] = (),
    ):
        self._path = path
        rows = list(_read(path))
        if not rows:
            raise UserError(f"{path} has no rows")
        for column in (image_column, text_column, label_column, language_column):
            if column:
                _check_column(path, rows, column)
        if label_column:
            labels, self.class_names = _labels(path, rows, label_column)
        else:
            labels, self.class_names = [None] * len(rows), None

        kept = _rows_of_split(path, rows, split_column, split)
        chosen = [rows[i] for i in kept]
        names: list[Any] = [row.get(image_column) for _, row in chosen]
        _refuse(path, chosen, [not _is_text(n) for n in names], f"no image in {image_column!r}")
        texts = [_texts(row.get(text_column)) if text_column else [] for _, row in chosen]
        if text_column:
            _refuse(path, chosen, [not t for t in texts], f"no caption in {text_column!r}")
        # Columns, not rows: whatever else stands in a table of millions does not stay in memory.
        self._names: list[str] = names
        self._texts, self._labels = texts, [labels[i] for i in kept]
        self._languages: list[tuple[str, ...]] | None = None
        if language_column:
            self._languages = _languages(path, chosen, language_column, texts)
        lines = [line for line, _ in chosen]
        if languages:
            lines = self._keep_languages(languages, lines)

        self._archives: dict[str, Zip] = {}
        self._root = os.path.expanduser(images) if images else storage.parent(path)
        if images and not storage.is_url(images) and not os.path.exists(self._root):
            raise UserError(f"images={images!r} is neither a folder nor a zip file")
        self._check_images(lines)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, i: int) -> Example:
        """Row i. Its image is b'' where the file has gone or is damaged in its zip file."""
        name = self._names[i]
        try:
            image = self._read_image(name)
        except (OSError, KeyError, zipfile.BadZipFile):
            image = b""  # a bad image, which training counts and evaluation refuses
        example: Example = {"image": image, "texts": list(self._texts[i]), "id": name}
        label = self._labels[i]
        if label is not None:
            example["label"] = label
        if self._languages is not None:
            example["languages"] = list(self._languages[i])
        return example

    def by_language(self) -> dict[str, np.ndarray]:
        """Ascending indices of the rows that have a caption in each language; {}: not known."""
        rows: dict[str, list[int]] = {}
        for i, languages in enumerate(self._languages or ()):
            for language in set(languages):
                rows.setdefault(language, []).append(i)
        return {language: np.array(rows[language], np.int64) for language in sorted(rows)}

    def _keep_languages(self, languages: tuple[str, ...], lines: list[int]) -> list[int]:
        """Leaves out captions in other languages, then rows without captions; the lines kept."""
        if self._languages is None:
            raise UserError(
                f"languages={languages!r} is set without the column that names the language of "
                "captions; set `language_column`"
            )
        known = {language for row in self._languages for language in row}
        for language in languages:
            if language not in known:
                raise UserError(
                    f"{self._path} has no captions in language {language!r}; "
                    f"{nearest(language, known)}"
                )
        kept = []
        for i, (texts, tags) in enumerate(zip(self._texts, self._languages)):
            order = [k for language in languages for k, tag in enumerate(tags) if tag == language]
            self._texts[i] = [texts[k] for k in order]
            self._languages[i] = tuple(tags[k] for k in order)
            if order:
                kept.append(i)
        if len(kept) < len(lines):
            logging.warning(
                "%s: left out %d of %d rows, which have no caption in %s",
                self._path,
                len(lines) - len(kept),
                len(lines),
                ", ".join(languages),
            )
        self._names = [self._names[i] for i in kept]
        self._texts = [self._texts[i] for i in kept]
        self._labels = [self._labels[i] for i in kept]
        self._languages = [self._languages[i] for i in kept]
        return [lines[i] for i in kept]

    def _place(self, name: str) -> tuple[str, str | None]:
        """(file, None) or (zip file, member)."""
        if self._root.lower().endswith(".zip"):
            return self._root, name
        # An absolute name, or a URL, stays what it is.
        full = name if storage.is_url(name) else storage.join(self._root, name)
        end = full.lower().find(".zip/")
        if end >= 0 and not os.path.isdir(full[: end + 4]):
            return full[: end + 4], full[end + 5 :]
        return full, None

    def _read_image(self, name: str) -> bytes:
        file, member = self._place(name)
        if member is None:
            return storage.read(file)
        return self._archives[file].read(member)

    def _check_images(self, lines: list[int]) -> None:
        """Checks every member of a zip file and some of the loose files. Opens the zip files."""
        checked = CHECKED_URLS if storage.is_url(self._root) else CHECKED_FILES
        every = max(1, len(self._names) // checked)
        for i, (name, line) in enumerate(zip(self._names, lines)):
            file, member = self._place(name)
            if member is None:
                if i % every == 0 and not storage.is_file(file):
                    raise UserError(
                        f"{self._path} line {line}: there is no image {file}; names are relative "
                        f"to {self._root}, set `images` to another folder or zip file"
                    )
                continue
            if file not in self._archives:
                self._archives[file] = Zip(file)
            if member not in self._archives[file]:
                raise UserError(
                    f"{self._path} line {line}: {file} has no member {member!r}; "
                    f"{nearest(member, self._archives[file].names(), limit=3)}"
                )


def _read(table: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number, row) for each row of a table."""
    readers = {".jsonl": _read_jsonl, ".csv": _read_csv, ".tsv": _read_tsv}
    reader = readers.get(os.path.splitext(table)[1].lower())
    if reader is None:
        raise UserError(
            f"{table} is no table that can be read; give a .jsonl, .csv or .tsv file, or a pattern "
            "of .tar, .parquet or .array_record files such as 'folder/*.tar'"
        )
    if not storage.is_file(table):
        raise UserError(f"there is no file {table}; set `path` to the table of captions")
    try:
        # utf-8-sig: spreadsheets write a mark first, which would be part of a column's name.
        with (
            storage.Blob(table).open() as file,
            io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as lines,
        ):
            yield from reader(table, lines)
    except UnicodeDecodeError as error:
        raise UserError(f"{table} is not UTF-8 ({error.reason}); save it as UTF-8") from error


def _read_jsonl(table: str, lines) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{table} line {number} is not JSON ({error})") from error
        if not isinstance(row, dict):
            raise UserError(f"{table} line {number} is not a JSON object {{column: value, ...}}")
        yield number, row


def _read_csv(table: str, lines, **dialect) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.reader(lines, strict=True, **dialect)
    try:
        header = next(reader, None)
        if header is None:
            return
        before = reader.line_num
        for values in reader:
            line, before = before + 1, reader.line_num  # a quoted value may span lines
            if not values:
                continue
            if len(values) != len(header):
                raise UserError(
                    f"{table} line {line} has {len(values)} values, but the first line names "
                    f"{len(header)} columns"
                )
            yield line, dict(zip(header, values))
    except csv.Error as error:
        raise UserError(f"{table} line {reader.line_num} cannot be read ({error})") from error


def _read_tsv(table: str, lines) -> Iterator[tuple[int, dict[str, Any]]]:
    return _read_csv(table, lines, delimiter="\t", quoting=csv.QUOTE_NONE)


Rows = list[tuple[int, dict[str, Any]]]


def _check_column(path: str, rows: Rows, column: str) -> None:
    if not any(column in row for _, row in rows):
        columns = {name for _, row in rows[:100] for name in row}
        raise UserError(f"{path} has no column {column!r}; {nearest(column, columns)}")


def _refuse(path: str, rows: Rows, bad: list[bool], what: str) -> None:
    lines = [str(line) for (line, _), is_bad in zip(rows, bad) if is_bad]
    if lines:
        more = f" and {len(lines) - 5} more" if len(lines) > 5 else ""
        plural = "s" if len(lines) > 1 else ""
        raise UserError(
            f"{path}: {what} in line{plural} {', '.join(lines[:5])}{more}; "
            "fill them in or take them out"
        )


def _rows_of_split(path: str, rows: Rows, column: str, split: str) -> list[int]:
    """Places in `rows` of those that belong to the split."""
    if not split:
        return list(range(len(rows)))
    if not any(column in row for _, row in rows):
        if split == "train":
            return list(range(len(rows)))
        # All rows under another name would evaluate on what was trained on.
        raise UserError(
            f"{path} has no column {column!r}, so all of it is split 'train'; "
            f"for {split!r} add the column or give another table"
        )
    splits: list[Any] = [row.get(column) for _, row in rows]
    _refuse(path, rows, [not _is_text(s) for s in splits], f"no split in {column!r}")
    kept = [i for i, s in enumerate(splits) if s == split]
    if not kept:
        raise UserError(f"{path} has no rows of split {split!r}; {nearest(split, splits)}")
    return kept


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _texts(value: Any) -> list[str]:
    """The captions of a cell; [] where there is none, or one of several is empty."""
    values = value if isinstance(value, list) else [value]
    return values if values and all(map(_is_text, values)) else []


def _languages(path: str, rows: Rows, column: str, texts: list[list[str]]) -> list[tuple[str, ...]]:
    """The language of each caption of each row."""
    cells: list[Any] = [row.get(column) for _, row in rows]
    _refuse(path, rows, [not _texts(cell) for cell in cells], f"no language in {column!r}")
    _refuse(
        path,
        rows,
        [isinstance(cell, list) and len(cell) != len(t) for cell, t in zip(cells, texts)],
        f"not one language for each caption in {column!r}",
    )
    known: dict[tuple[str, ...], tuple[str, ...]] = {}  # equal rows share one tuple in memory
    tags = (tuple(c) if isinstance(c, list) else (c,) * len(t) for c, t in zip(cells, texts))
    return [known.setdefault(row, row) for row in tags]


def _labels(path: str, rows: Rows, column: str) -> tuple[list[int], list[str] | None]:
    """The label of each row, and the class names where the column holds names."""
    values: list[Any] = [row.get(column) for _, row in rows]
    # A table of text has its integers as text.
    if all(isinstance(v, str) and v.strip().isdecimal() for v in values):
        values = [int(v) for v in values]
    if all(isinstance(v, int) and not isinstance(v, bool) for v in values):
        return values, None
    _refuse(path, rows, [not _is_text(v) for v in values], f"no class in {column!r}")
    names = sorted(set(values))
    number = {name: i for i, name in enumerate(names)}
    return [number[v] for v in values], names
