"""Parquet files, as Hugging Face and others write them: a column of images, columns of captions."""

import concurrent.futures
import itertools
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from base.errors import UserError
from base.words import nearest, one_line
from input_pipeline.errors import BadExample
from input_pipeline.sources.columns import in_threads, make_captions, weighted_names
from input_pipeline.sources.contract import Example
from input_pipeline.sources.storage import (
    Blob,
    expand,
    is_file,
    is_url,
    join,
    parent,
    read,
)

# Footers of all files that are kept in memory; others are read again with each row group.
MAX_FOOTER_BYTES = 64 << 20


class Parquet:
    """One example for each row, in the order of the files.

    A row cannot be read without its row group, so decoded row groups are kept: the newest
    2 * window of them, with the columns of the settings only. `blocks` are the row groups.

    Args:
      path: a pattern of files ('data/train-*.parquet', URLs too), or several.
      image: the column of images: struct{bytes, path} as Hugging Face writes it, the bytes alone,
        or paths of files.
      images: the folder or URL that paths are relative to; '': the folder of the Parquet file.
      text: the column of captions, text or lists of texts; or several columns, each with how often
        it is drawn: (('caption', 0.7), ('alt_text', 0.3)). '': none, which is enough for
        classification.
      label: a column of integers, the class. class_names are the ones that Hugging Face's
        metadata have of it. '': none.
      language: a column with the language of a row's captions, or a list with that of each. '':
        not known.
      window: row groups that are read at a time.

    Raises:
      UserError: a file is missing or damaged at its end, or a column is missing or of another type;
        when read: a file has gone, or a row group is too large to be read.
    """

    def __init__(
        self,
        *,
        path: str | tuple,
        image: str = "image",
        images: str = "",
        text: str | tuple = "caption",
        label: str = "",
        language: str = "",
        window: int = 8,
    ):
        if window < 1:
            raise UserError(f"parquet: window={window} row groups at a time must be at least 1")
        self._image, self._label, self._language = image, label, language
        self._texts, self._weights = weighted_names("parquet", text)
        self.window, self._folder = window, images
        self._paths = expand(path)
        files = in_threads(self._open, self._paths)
        self._blobs = [file.blob for file in files]
        self.class_names = files[0].class_names
        for file in files:
            if file.class_names != self.class_names:
                raise UserError(
                    f"parquet: {file.blob.path} has other classes of {label!r} than "
                    f"{self._paths[0]}, so the same number would mean two of them"
                )
        groups = [(f, g, n) for f, file in enumerate(files) for g, n in file.groups if n]
        if not groups:
            raise UserError(f"parquet: {self._paths[0]} has no rows")
        self._groups = [(f, g) for f, g, _ in groups]
        self.blocks = np.concatenate([[0], np.cumsum([n for *_, n in groups])]).astype(np.int64)
        before = np.cumsum([0] + [sum(n for _, n in file.groups) for file in files])
        self._first_row = before[:-1]  # of each file
        kept = itertools.accumulate(file.footer.serialized_size for file in files)
        self._footers = [
            file.footer if n <= MAX_FOOTER_BYTES else None for file, n in zip(files, kept)
        ]

        self._lock = threading.Lock()
        self._decoded: OrderedDict[int, concurrent.futures.Future] = OrderedDict()
        self._by_language: dict[str, np.ndarray] | None = None
        self._language_lock = threading.Lock()
        if files[0].image_is_path:
            self._check_one_image()

    def __len__(self) -> int:
        return int(self.blocks[-1])

    def __getitem__(self, i: int) -> Example:
        if not 0 <= i < len(self):
            raise IndexError(i)
        block = int(np.searchsorted(self.blocks, i, "right")) - 1
        file, _ = self._groups[block]
        path = self._paths[file]
        name = f"{os.path.basename(path)}[{i - self._first_row[file]}]"
        try:
            row = i - int(self.blocks[block])
            return self._example(self._group(block), row, id=name, shard=path)
        except BadExample as error:
            error.id, error.shard = name, path
            raise

    def by_language(self) -> dict[str, np.ndarray]:
        """Rows of each language, ascending; only that column is read, once. {}: not known."""
        if not self._language:
            return {}
        with self._language_lock:
            if self._by_language is None:
                indices: dict[str, list[np.ndarray]] = {}
                for block, rows in enumerate(in_threads(self._languages, range(len(self._groups)))):
                    for language, inside in rows.items():
                        indices.setdefault(language, []).append(inside + self.blocks[block])
                self._by_language = {k: np.concatenate(indices[k]) for k in sorted(indices)}
            return self._by_language

    def _open(self, path: str) -> "_File":
        return _File(path, self._image, self._texts, self._label, self._language)

    def _group(self, block: int) -> pa.Table:
        """A decoded row group, which one thread decodes for all that need it."""
        with self._lock:
            future = self._decoded.get(block)
            mine = future is None
            if future is None:
                future = self._decoded[block] = concurrent.futures.Future()
                while len(self._decoded) > 2 * self.window:
                    self._decoded.popitem(last=False)
            else:
                self._decoded.move_to_end(block)
        if mine:
            names = (self._image, *self._texts, self._label, self._language)
            try:
                future.set_result(self._decode(block, [name for name in names if name]))
            except BaseException as error:  # not damage of the data, so a later try may succeed
                with self._lock:
                    if self._decoded.get(block) is future:
                        del self._decoded[block]
                future.set_exception(error)
        decoded = future.result()
        if isinstance(decoded, str):
            raise BadExample("damaged record", decoded)
        return decoded

    def _decode(self, block: int, columns: list[str]) -> pa.Table | str:
        """Columns of a row group, or a text that says what is wrong with it."""
        file, group = self._groups[block]
        blob, footer = self._blobs[file], self._footers[file]
        try:
            with blob.open() as opened:
                reader = pq.ParquetFile(
                    opened,
                    metadata=footer,
                    # One request for neighbouring columns, as each has the latency of a network.
                    pre_buffer=is_url(blob.path),
                    page_checksum_verification=True,
                )
                table = reader.read_row_group(group, columns, use_threads=False)
        except pa.ArrowNotImplementedError as error:
            raise UserError(
                f"parquet: row group {group} of {blob.path} cannot be read ({one_line(error)}); "
                "write the file with smaller row groups, say of 100 rows"
            ) from error
        except (pa.ArrowException, OSError) as error:
            if not _is_of_arrow(error):
                raise UserError(f"{blob.path} cannot be read: {one_line(error)}") from error
            return f"row group {group}: {one_line(error)}"
        rows = int(self.blocks[block + 1] - self.blocks[block])
        if table.num_rows != rows or not {*columns} <= {*table.column_names}:
            return f"row group {group}: it is not what it was when the file was opened"
        return table

    def _example(self, table: pa.Table, row: int, *, id: str, shard: str) -> Example:
        image = self._read_image(table.column(self._image)[row], shard)
        try:
            texts = [_listed(table.column(name)[row]) for name in self._texts]
            language = self._language and table.column(self._language)[row]
            languages = _listed(language) if self._language else None
        except UnicodeDecodeError as error:
            raise BadExample("caption not UTF-8", one_line(error)) from error
        captions = make_captions(texts, self._weights, languages)
        example: Example = {"image": image, "id": id, "shard": shard, **captions}
        if self._label:
            label = table.column(self._label)[row].as_py()
            if label is None:
                raise BadExample("damaged record", f"no class in {self._label!r}")
            example["label"] = label
        return example

    def _read_image(self, cell: pa.Scalar, path: str) -> bytes:
        """Bytes of the cell, or of the file that it names."""
        if isinstance(cell, pa.StructScalar):
            if not cell.is_valid:
                raise BadExample("no image", "nothing in the column")
            inside = cell["bytes"].as_py()
            cell = cell["path"] if not inside and "path" in cell else cell["bytes"]
        try:
            value = cell.as_py()
        except UnicodeDecodeError as error:
            raise BadExample("no image", "its path is not UTF-8") from error
        if not value:
            raise BadExample("no image", "nothing in the column")
        if isinstance(value, bytes):
            return value
        try:
            return read(self._place(value, path))
        except (OSError, ValueError) as error:  # ValueError: a null character, or a UserError
            raise BadExample("no image", one_line(error)) from error

    def _place(self, image: str, path: str) -> str:
        protocols = {place.partition(":")[0] for place in (self._folder, path) if is_url(place)}
        if is_url(image) and image.partition(":")[0] not in protocols:
            # Data must not choose which hosts this machine connects to.
            raise BadExample("no image", f"its path is a URL, {image}; set `images` to allow that")
        return image if is_url(image) else join(self._folder or parent(path), image)

    def _check_one_image(self) -> None:
        """Refuses a missing folder of images at the start, by the first image."""
        table = self._decode(0, [self._image])
        values = [] if isinstance(table, str) else table.column(0).drop_null()[:1].to_pylist()
        for value in filter(None, values):
            try:
                place = self._place(value, self._paths[0])
            except BadExample as error:
                raise UserError(f"parquet: {self._paths[0]}: {error}") from error
            if not is_file(place):
                raise UserError(
                    f"parquet: {self._paths[0]} names the image {place}, which does not exist; "
                    "set `images` to the folder that paths are relative to"
                )

    def _languages(self, block: int) -> dict[str, np.ndarray]:
        """Language -> rows of a row group, counted from its first."""
        table = self._decode(block, [self._language])
        if isinstance(table, str):
            return {}  # its rows are reported as damaged when they are read
        values = table.column(0).combine_chunks()
        rows = np.arange(len(values))
        if _is_list(values.type):
            rows = pc.call_function("list_parent_indices", [values])
            rows = rows.to_numpy(zero_copy_only=False)
            values = values.flatten()
        if pa.types.is_dictionary(values.type):
            values = values.dictionary_decode()
        values = values.cast(pa.large_binary())  # what is not UTF-8 is no language
        encoded = values.dictionary_encode()
        numbers = pc.fill_null(encoded.indices, -1).to_numpy(zero_copy_only=False)
        names = [name.decode("utf-8", "replace") for name in encoded.dictionary.to_pylist()]
        return {name: np.unique(rows[numbers == k]) for k, name in enumerate(names) if name}


class _File:
    """The footer of a file; UserError where it does not have the columns of the settings."""

    def __init__(self, path: str, image: str, texts: Sequence[str], label: str, language: str):
        self.blob = Blob(path)
        try:
            with self.blob.open() as opened:
                reader = pq.ParquetFile(opened)
                schema, self.footer = reader.schema_arrow, reader.metadata
        except (pa.ArrowException, OSError) as error:
            raise UserError(
                f"{path} cannot be read as a Parquet file ({one_line(error)}); "
                "it is another file, or its end is missing or damaged: copy it again"
            ) from error
        counts = range(self.footer.num_row_groups)
        self.groups = [(g, self.footer.row_group(g).num_rows) for g in counts]
        types = {field.name: _plain(field.type) for field in schema}

        def check(option: str, name: str, fits: Callable[[pa.DataType], bool], what: str) -> None:
            if name not in types:
                raise UserError(
                    f"parquet: {path} has no column {option}={name!r}; {nearest(name, types)}"
                )
            if not fits(types[name]):
                raise UserError(
                    f"parquet: column {option}={name!r} of {path} is {types[name]}, not {what}"
                )

        check("image", image, _is_image, "struct{bytes, path}, binary or string")
        for name in texts:
            check("text", name, _is_texts, "string or a list of strings")
        if label:
            check("label", label, pa.types.is_integer, "an integer")
        if language:
            check("language", language, _is_texts, "string or a list of strings")
        self.image_is_path = _is_text(types[image])
        self.class_names = _class_names(schema, label) if label else None


def _listed(cell: pa.Scalar) -> list[str | None]:
    value = cell.as_py()
    return value if isinstance(value, list) else [] if value is None else [value]


def _is_of_arrow(error: Exception) -> bool:
    """Whether the bytes are at fault, not the storage: Arrow raises a bare OSError for damage."""
    bare = type(error) is OSError and error.errno is None
    return isinstance(error, pa.ArrowException) or bare


def _plain(kind: pa.DataType) -> pa.DataType:
    return _plain(kind.value_type) if pa.types.is_dictionary(kind) else kind


def _is_text(kind: pa.DataType) -> bool:
    t, kind = pa.types, _plain(kind)
    return t.is_string(kind) or t.is_large_string(kind) or t.is_string_view(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    t, kind = pa.types, _plain(kind)
    return t.is_binary(kind) or t.is_large_binary(kind) or t.is_binary_view(kind)


def _is_list(kind: pa.DataType) -> bool:
    t = pa.types
    return t.is_list(kind) or t.is_large_list(kind) or t.is_fixed_size_list(kind)


def _is_texts(kind: pa.DataType) -> bool:
    # A column with nothing in it, as a file may be whose rows have no captions.
    return pa.types.is_null(kind) or _is_text(kind.value_type if _is_list(kind) else kind)


def _is_image(kind: pa.DataType) -> bool:
    if not pa.types.is_struct(kind):
        return _is_bytes(kind) or _is_text(kind)
    inside = {field.name: field.type for field in kind}
    fits = "bytes" in inside and _is_bytes(inside["bytes"])
    path = inside.get("path", pa.null())
    return fits and (pa.types.is_null(path) or _is_text(path))


def _class_names(schema: pa.Schema, label: str) -> list[str] | None:
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = features[label]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return None  # not written by Hugging Face, or not a column of classes
    fits = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return names if names and fits else None
