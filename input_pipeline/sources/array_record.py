"""ArrayRecord files of tf.train.Example records, as TFDS and input_pipeline.convert write
them, without TensorFlow."""

import hashlib
import os
import shutil
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]
from google.protobuf.message import DecodeError
from tensorflow_datasets.proto import tf_example_generated_pb2 as tf_example

from base import whole_file
from base.errors import UserError
from base.words import nearest, one_line
from input_pipeline.errors import BadExample
from input_pipeline.sources.columns import in_threads, make_captions, weighted_names
from input_pipeline.sources.contract import Captions, Example
from input_pipeline.sources.storage import (
    Blob,
    expand,
    is_file,
    is_url,
    join,
    parent,
    read,
)

CACHE = "~/.cache/siglip-jax"

# Open readers. Each has an index of about 10 bytes a record; the least recently used is closed.
MAX_OPEN = 256

CHECKED_RECORDS = 10  # whose features are compared with the settings, spread over the files

COPY_BYTES = 16 << 20  # bytes that are copied at a time

TfExample: Any = tf_example.Example  # pyright: ignore[reportAttributeAccessIssue]


class ArrayRecord:
    """One example for each record, in the order of the files.

    Args:
      path: a pattern of files ('data/train*.array_record*', URLs too), or several.
      image: the feature that has the image, encoded.
      text: the feature of captions, one or several in each record; or several features, each with
        how often it is drawn: (('caption', 0.7), ('alt_text', 0.3)). '': none, which is enough for
        classification.
      label: a feature of one integer, the class. class_names are the lines of <label>.labels.txt
        beside the first file, where TFDS and input_pipeline.convert write it. '': none.
      language: the language of the captions, or one for each of them. '': not known.
      cache: the folder for copies of files behind URLs, which are made at the start and stay; '':
        array_record in ~/.cache/siglip-jax.

    Raises:
      UserError: a file is missing or ends too early, a feature is missing or of another type, or
        there is no room for copies.
    """

    def __init__(
        self,
        *,
        path: str | tuple,
        image: str = "image",
        text: str | tuple = "caption",
        label: str = "",
        language: str = "",
        cache: str = "",
    ):
        self._image, self._label, self._language = image, label, language
        self._texts, self._weights = weighted_names("array_record", text)
        self._paths = expand(path)
        folder = os.path.expanduser(cache or f"{CACHE}/array_record")
        self._files = _local(self._paths, folder)
        self._readers: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()
        sizes = in_threads(self._size, range(len(self._files)))
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        if not len(self):
            raise UserError(f"array_record: {self._paths[0]} has no records")
        self._check_features()
        self.class_names = self._read_class_names() if label else None
        self._by_language: dict[str, np.ndarray] | None = None
        self._language_lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, i: int) -> Example:
        if not 0 <= i < len(self):
            raise IndexError(i)
        file = int(np.searchsorted(self._starts, i, "right")) - 1
        row = i - int(self._starts[file])
        shard = self._paths[file]
        name = f"{os.path.basename(shard)}[{row}]"
        try:
            return self._example(self._record(file, row), id=name, shard=shard)
        except BadExample as error:
            error.id, error.shard = name, shard
            raise

    def by_language(self) -> dict[str, np.ndarray]:
        """Records that have a text in each language, ascending. All are read, once: a pass over
        the data. {}: not known."""
        if not self._language:
            return {}
        with self._language_lock:
            if self._by_language is None:
                indices: dict[str, list[np.ndarray]] = {}
                for part in in_threads(self._languages, range(len(self._files))):
                    for language, rows in part.items():
                        indices.setdefault(language, []).append(np.array(rows, np.int64))
                self._by_language = {k: np.concatenate(indices[k]) for k in sorted(indices)}
            return self._by_language

    def _languages(self, file: int) -> dict[str, list[int]]:
        indices: dict[str, list[int]] = {}
        for i in range(int(self._starts[file]), int(self._starts[file + 1])):
            try:
                record = self._record(file, i - int(self._starts[file]))
                languages = self._captions(record).get("languages", [])
            except BadExample:
                continue  # reported when it is read
            for language in set(languages) - {""}:
                indices.setdefault(language, []).append(i)
        return indices

    def _size(self, file: int) -> int:
        reader = _open(self._files[file])
        if not reader.ok():  # it has no end: what an interrupted copy looks like
            raise UserError(
                f"{self._paths[file]} cannot be read as an ArrayRecord file: it is another file, "
                "or its end is missing or damaged; copy it again"
            )
        return reader.num_records()

    def _reader(self, file: int) -> Any:
        """An open reader, for several threads at once; it closes when no thread holds it."""
        with self._lock:
            reader = self._readers.get(file)
            if reader is not None:
                self._readers.move_to_end(file)
                return reader
        reader = _open(self._files[file])
        if not reader.ok():
            raise UserError(f"{self._paths[file]} has gone, or changed since it was opened")
        with self._lock:
            self._readers[file] = reader
            while len(self._readers) > MAX_OPEN:
                self._readers.popitem(last=False)
        return reader

    def _record(self, file: int, row: int) -> dict[str, Any]:
        """The features of a record, by name."""
        reader = self._reader(file)
        try:
            data = reader.read([row])[0]
        except (RuntimeError, IndexError) as error:
            raise BadExample("damaged record", one_line(error)) from error
        return _features(data)

    def _example(self, record: dict[str, Any], *, id: str, shard: str) -> Example:
        images = _values(record, self._image, "bytes_list")
        if not images or not images[0]:
            raise BadExample("no image", f"nothing in {self._image!r}")
        if len(images) > 1:
            raise BadExample("damaged record", f"{len(images)} images in {self._image!r}")
        captions = self._captions(record)
        example: Example = {"image": images[0], "id": id, "shard": shard, **captions}
        if self._label:
            labels = _values(record, self._label, "int64_list")
            if len(labels) != 1:
                raise BadExample("damaged record", f"{len(labels)} classes in {self._label!r}")
            example["label"] = int(labels[0])
        return example

    def _captions(self, record: dict[str, Any]) -> Captions:
        texts = [_strings(record, name) for name in self._texts]
        languages = _strings(record, self._language) if self._language else None
        return make_captions(texts, self._weights, languages)

    def _check_features(self) -> None:
        """Refuses settings that name a feature of another type, or one that no record has."""
        wanted = {self._image: ("image", "bytes_list")}
        wanted |= dict.fromkeys(self._texts, ("text", "bytes_list"))
        if self._label:
            wanted[self._label] = ("label", "int64_list")
        if self._language:
            wanted[self._language] = ("language", "bytes_list")
        kinds: dict[str, str | None] = {}
        for i in np.linspace(0, len(self) - 1, CHECKED_RECORDS).astype(int).tolist():
            file = int(np.searchsorted(self._starts, i, "right")) - 1
            try:
                record = self._record(file, i - int(self._starts[file]))
            except BadExample:
                continue
            # None: a feature without values has no type.
            kinds |= {name: record[name].WhichOneof("kind") or kinds.get(name) for name in record}
        shard = self._paths[0]
        if not kinds:
            raise UserError(
                f"array_record: the records of {shard} are not tf.train.Example; "
                "others are not read"
            )
        for name, (option, kind) in wanted.items():
            if name not in kinds:
                raise UserError(
                    f"array_record: {shard} has no feature {option}={name!r}; "
                    f"{nearest(name, kinds)}"
                )
            if kinds[name] not in (kind, None):
                raise UserError(
                    f"array_record: feature {option}={name!r} of {shard} is {kinds[name]}, "
                    f"not {kind}"
                )

    def _read_class_names(self) -> list[str] | None:
        beside = join(parent(self._paths[0]), f"{self._label}.labels.txt")
        if not is_file(beside):
            return None
        try:
            return read(beside).decode("utf-8").removesuffix("\n").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{beside} cannot be read: {one_line(error)}") from error


def _open(path: str) -> Any:
    # For random access: nothing is read ahead, and the caller's thread does the work.
    return array_record_module.ArrayRecordReader(
        path, options="readahead_buffer_size:0,max_parallelism:0", file_reader_buffer_size=1 << 15
    )


def _features(data: bytes) -> Any:
    """The features of a tf.train.Example, whose definition TFDS has a copy of."""
    try:
        return TfExample.FromString(data).features.feature
    except DecodeError as error:
        raise BadExample("damaged record", "no tf.train.Example") from error


def _values(record: Any, name: str, kind: str) -> Sequence[Any]:
    """The values of a feature; [] where the record does not have it."""
    if name not in record:  # looking it up would add it
        return []
    feature = record[name]
    actual = feature.WhichOneof("kind")
    if actual not in (kind, None):
        raise BadExample("damaged record", f"{name!r} is {actual}, not {kind}")
    return getattr(feature, kind).value


def _strings(record: Any, name: str) -> list[str]:
    try:
        return [value.decode("utf-8") for value in _values(record, name, "bytes_list")]
    except UnicodeDecodeError as error:
        raise BadExample("caption not UTF-8", one_line(error)) from error


def _local(paths: Sequence[str], folder: str) -> list[str]:
    """Local paths: files behind URLs are copied, as the library reads local files only."""
    blobs = {path: blob for path, blob in zip(paths, in_threads(Blob, paths)) if is_url(path)}
    copies = {path: _copy_of(blob, folder) for path, blob in blobs.items()}
    missing = [path for path in blobs if not os.path.exists(copies[path])]
    if missing:
        size = sum(blobs[path].size for path in missing)
        logging.info("copying %d files, %.1f GB, to %s", len(missing), size / 1e9, folder)
        try:
            os.makedirs(folder, exist_ok=True)
            free = shutil.disk_usage(folder).free
        except OSError as error:
            raise UserError(f"cache={folder!r} cannot be made: {one_line(error)}") from error
        if size > free:
            raise UserError(
                f"{len(missing)} files behind URLs are {size / 1e9:.1f} GB, but {folder} has "
                f"{free / 1e9:.1f} GB left; set `cache` to a larger disk"
            )
        in_threads(lambda path: _copy(blobs[path], copies[path]), missing)
    return [copies.get(path, os.path.expanduser(path)) for path in paths]


def _copy_of(blob: Blob, folder: str) -> str:
    """Path of the copy; another one for each version of the file that its storage reports."""
    key = hashlib.sha256(blob.fingerprint().encode()).hexdigest()[:16]
    return os.path.join(folder, f"{key}-{os.path.basename(blob.path)}")


def _copy(blob: Blob, path: str) -> None:
    """Copies a file; several processes may do so at once, and each may be killed."""
    try:
        with whole_file.create(path) as file:
            for offset in range(0, blob.size, COPY_BYTES):
                file.write(blob.read(COPY_BYTES, offset))
            if file.tell() != blob.size:
                raise OSError(f"{file.tell()} bytes came instead of {blob.size}")
    except OSError as error:
        raise UserError(f"{blob.path} cannot be copied to {path}: {one_line(error)}") from error
