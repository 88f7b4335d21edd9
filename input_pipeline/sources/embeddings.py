"""Embeddings that `python -m programs.embed` wrote: a source, and arrays to search in.

A folder of shards; shard k has the rows [k S, (k + 1) S) of the source that was embedded:
  manifest.json       which model, preprocessing and source; S = shard_rows; `done` at the end
  image-00000.npy     [rows, d], unit norm; zeros where the example is bad
  text-00000.npy      [texts, d], unit norm: all texts of all rows, one after another
  rows-00000.arrow    a row of SCHEMA for each example. It comes last: with it the shard is whole
"""

import bisect
import functools
import json
import os
import pathlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from base.errors import UserError
from base.words import one_line
from input_pipeline.sources.columns import in_threads
from input_pipeline.sources.contract import Example

MANIFEST = "manifest.json"
VERSION = 1  # of the files; others are refused
KINDS = ("image", "text")
SCHEMA = pa.schema(
    {
        "index": pa.int64(),  # in the source that was embedded
        "id": pa.string(),
        "texts": pa.list_(pa.string()),
        "languages": pa.list_(pa.string()),  # null where the source has none; so below
        "weights": pa.list_(pa.float64()),
        "label": pa.int64(),
        "bad": pa.string(),  # '', or the kind of BadExample; it has no texts then
        "text_offset": pa.int64(),  # row of its first text in text-*.npy
    }
)
MAX_OPEN = 256  # shards that are mapped at a time; each has up to three files
AGAIN = "run the same `python -m programs.embed` again"


def file_name(kind: str, shard: int) -> str:
    return f"{kind}-{shard:05d}.{'arrow' if kind == 'rows' else 'npy'}"


class Shard(NamedTuple):
    """A shard, mapped into memory. None: that kind was not embedded."""

    rows: pa.Table
    image: np.ndarray | None
    text: np.ndarray | None


class Embeddings:
    """Images as the embeddings of a frozen tower, with their texts; examples that were bad are
    left out. Only the rows that are asked for are read.

    Train on it with config.input.image='embedding' and config.model.img.variant='precomputed'.

    Args:
      path: the folder.

    Raises:
      UserError: the folder is not of embeddings, not finished, or a file is missing or damaged.

    Attributes:
      manifest: the content of manifest.json.
    """

    def __init__(self, *, path: str):
        self.path = str(pathlib.Path(path).expanduser())
        self.manifest = read_manifest(self.path)
        self.class_names: list[str] | None = self.manifest["class_names"]
        count = shard_count(self.manifest)
        files = set(os.listdir(self.path))
        missing = [k for k in range(count) if file_name("rows", k) not in files]
        if missing or not self.manifest["done"]:
            lack = f"shard {missing[0]} of {count} is missing, " if missing else ""
            missing_part = f"{lack}{len(missing)} in all" if len(missing) > 1 else lack.rstrip(", ")
            detail = missing_part and f": {missing_part}"
            raise UserError(f"{path} is not finished{detail}; {AGAIN}")
        self._open = functools.lru_cache(MAX_OPEN)(
            lambda k: open_shard(self.path, k, self.manifest)
        )
        scans = in_threads(self._scan, range(count))
        self._good = [good for good, _, _ in scans]
        self._starts = _ends([len(good) for good in self._good])
        self._text_starts = _ends([texts for _, texts, _ in scans])
        self.damage = sum((damage for _, _, damage in scans), Counter())
        if not len(self):
            raise UserError(
                f"{path} has no usable example: all {self.manifest['examples']} are bad"
            )
        self._by_language: dict[str, np.ndarray] | None = None

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, i: int) -> Example:
        """Example i: its image is float32 [d]."""
        k, row = self._find(i)
        shard = self._open(k)
        if shard.image is None:
            raise UserError(
                f"{self.path} has no embeddings of images; embed again with --what image,text"
            )
        fields = {name: shard.rows.column(name)[row].as_py() for name in FIELDS}
        example = {name: value for name, value in fields.items() if value is not None}
        example["image"] = np.asarray(shard.image[row], np.float32)
        example["shard"] = os.path.join(self.path, file_name("image", k))
        return cast(Example, example)

    @property
    def blocks(self) -> np.ndarray | None:
        """Starts of the shards, where they are too many to be open at once (order.BlockEpochs)."""
        return np.asarray(self._starts, np.int64) if len(self._good) > MAX_OPEN else None

    @property
    def window(self) -> int:
        """Shards whose examples are mixed: two windows are open where one ends."""
        return MAX_OPEN // 2 - 1

    def by_language(self) -> dict[str, np.ndarray]:
        """Language -> ascending indices of the examples that have a text in it."""
        if self._by_language is None:
            indices: dict[str, list[np.ndarray]] = {}
            for k, good in enumerate(self._good):
                column = self._open(k).rows.column("languages").take(pa.array(good))
                parents = pc.call_function("list_parent_indices", [column]).to_numpy()
                tags = (
                    pc.call_function("list_flatten", [column]).combine_chunks().dictionary_encode()
                )
                codes = tags.indices.to_numpy()
                for code, tag in enumerate(tags.dictionary.to_pylist()):
                    rows = np.unique(parents[codes == code]) + self._starts[k]
                    indices.setdefault(tag, []).append(rows)
            self._by_language = {tag: np.concatenate(indices[tag]) for tag in sorted(indices)}
        return self._by_language

    def arrays(self, kind: str) -> tuple["Vectors", "Ids"]:
        """Embeddings [n, d] of 'image' or 'text', and the id of the example that each is of: both
        in the order of the source, read from the files when they are indexed.

        Raises:
          UserError: that kind was not embedded.
        """
        if kind not in self.manifest["what"]:
            raise UserError(f"{self.path} has no embeddings of kind {kind!r}")
        vectors = Vectors(self, kind)
        return vectors, Ids(self, vectors)

    def _scan(self, k: int) -> tuple[np.ndarray, int, Counter]:
        """(rows that are not bad, number of texts, damage) of a shard; it is checked on the way."""
        shard = open_shard(self.path, k, self.manifest)
        bad = shard.rows.column("bad").to_numpy()
        kinds = Counter(kind for kind in bad[bad != ""])
        file = os.path.join(self.path, file_name("rows", k))
        damage = Counter({(kind, file): count for kind, count in kinds.items()})
        return np.flatnonzero(bad == "").astype(np.int32), _texts(shard.rows), damage

    def _find(self, i: int) -> tuple[int, int]:
        """(shard, row in it) of an example."""
        k, inside = _place(self._starts, i)
        return k, int(self._good[k][inside])


FIELDS = ("texts", "id", "weights", "languages", "label")


class Vectors:
    """Embeddings of all shards as one array [n, d] that stays in its files.

    vectors[i] is a row, vectors[a:b] an array in memory. Bad images have no row here.
    """

    def __init__(self, source: Embeddings, kind: str):
        self._source, self._kind = source, kind
        self._starts = source._starts if kind == "image" else source._text_starts
        self.shape = (self._starts[-1], source.manifest["d"])
        self.dtype = np.dtype(source.manifest["dtype"])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, where: int | slice) -> np.ndarray:
        if isinstance(where, int | np.integer):
            k, inside = _place(self._starts, int(where))
            return self._part(k, inside, inside + 1)[0]
        first, last, step = where.indices(len(self))
        parts = [np.zeros((0, self.shape[1]), self.dtype)]
        for k in range(bisect.bisect_right(self._starts, first) - 1, len(self._starts) - 1):
            start, end = self._starts[k], self._starts[k + 1]
            if start >= last:
                break
            parts.append(self._part(k, max(first, start) - start, min(last, end) - start))
        return np.concatenate(parts)[::step]

    def example(self, i: int) -> tuple[int, int]:
        """(index of the example in the source, which of its texts) of a row; images have text 0."""
        k, inside = _place(self._starts, i)
        if self._kind == "image":
            return i, 0
        offsets = self._source._open(k).rows.column("text_offset").to_numpy()
        # Of several rows with one offset only the last has texts.
        row = int(np.searchsorted(offsets, inside, "right")) - 1
        good = int(np.searchsorted(self._source._good[k], row))
        return self._source._starts[k] + good, inside - int(offsets[row])

    def _part(self, k: int, first: int, last: int) -> np.ndarray:
        rows: Any = getattr(self._source._open(k), self._kind)
        good = self._source._good[k]
        if self._kind == "image" and len(good) < len(rows):
            return np.asarray(rows[good[first:last]])
        return np.asarray(rows[first:last])


class Ids(Sequence[str]):
    """The id of the example of each row of Vectors."""

    def __init__(self, source: Embeddings, vectors: Vectors):
        self._source, self._vectors = source, vectors

    def __len__(self) -> int:
        return len(self._vectors)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        k, row = self._source._find(self._vectors.example(int(i))[0])
        return self._source._open(k).rows.column("id")[row].as_py()


def read_manifest(folder: str) -> dict[str, Any]:
    """The content of manifest.json.

    Raises:
      UserError: the file is missing or is not a manifest.
    """
    file = pathlib.Path(folder) / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{folder} has no {MANIFEST}; set `path` to a folder that programs.embed wrote"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({one_line(error)})") from error
    try:
        if manifest["version"] != VERSION:
            raise UserError(
                f"{file} is of version {manifest['version']}, this program reads {VERSION}; "
                "embed again"
            )
        valid = min(manifest["examples"], manifest["shard_rows"], manifest["d"]) > 0
        valid = valid and set(manifest["what"]) <= set(KINDS) and "class_names" in manifest
        valid = valid and manifest["dtype"] in ("float32", "float16")
        valid = valid and isinstance(manifest["done"], bool)
    except (KeyError, TypeError):
        valid = False
    if not valid:
        raise UserError(f"{file} is no manifest of embeddings")
    return manifest


def shard_count(manifest: Mapping[str, Any]) -> int:
    return -(-manifest["examples"] // manifest["shard_rows"])


def open_shard(folder: str, k: int, manifest: Mapping[str, Any]) -> Shard:
    """Maps the files of a shard and checks that they fit each other and the manifest.

    Raises:
      UserError: one is missing, has another size or other rows.
    """
    file = os.path.join(folder, file_name("rows", k))
    first = k * manifest["shard_rows"]
    count = min(manifest["shard_rows"], manifest["examples"] - first)
    try:
        with pa.memory_map(file) as mapped:
            rows = pa.ipc.open_file(mapped).read_all()
            rows.validate()
    except (OSError, pa.ArrowException) as error:
        raise _damaged(file, one_line(error)) from error
    if not rows.schema.equals(SCHEMA) or rows.num_rows != count:
        raise _damaged(file, f"{rows.num_rows} rows of {len(rows.schema)} columns, not {count}")
    if not np.array_equal(rows.column("index").to_numpy(), np.arange(first, first + count)):
        raise _damaged(file, f"its rows are not {first} to {first + count - 1} of the source")
    texts = pc.call_function("list_value_length", [rows.column("texts")]).to_numpy()
    if not np.array_equal(rows.column("text_offset").to_numpy(), np.cumsum(texts) - texts):
        raise _damaged(file, "its text_offset is not the sum of the texts before")
    sizes = {"image": count, "text": _texts(rows)}
    arrays = {
        kind: _mapped(os.path.join(folder, file_name(kind, k)), sizes[kind], manifest)
        for kind in manifest["what"]
    }
    return Shard(rows, arrays.get("image"), arrays.get("text"))


def _texts(rows: pa.Table) -> int:
    """Number of texts of a shard."""
    return rows.column("text_offset")[-1].as_py() + len(rows.column("texts")[-1])


def _mapped(file: str, rows: int, manifest: Mapping[str, Any]) -> np.ndarray:
    try:
        # Not np.load, which would open other formats too.
        array = np.lib.format.open_memmap(file, mode="r")
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise _damaged(file, one_line(error)) from error
    wanted = (rows, manifest["d"]), np.dtype(manifest["dtype"])
    if (array.shape, array.dtype) != wanted or np.isfortran(array):
        raise _damaged(file, f"{array.dtype}{list(array.shape)}, not {wanted[1]}{list(wanted[0])}")
    if os.path.getsize(file) != array.offset + array.nbytes:
        raise _damaged(file, "it is longer than its header says")
    return array


def _damaged(file: str, what: str) -> UserError:
    return UserError(f"{file} is missing or damaged ({what}); {AGAIN}, which makes it anew")


def _ends(sizes: Sequence[int]) -> list[int]:
    return [0, *np.cumsum(sizes, dtype=np.int64).tolist()]


def _place(starts: Sequence[int], i: int) -> tuple[int, int]:
    """(part, place in it) of the i-th of all."""
    if not 0 <= i < starts[-1]:
        raise IndexError(i)
    k = bisect.bisect_right(starts, i) - 1
    return k, i - starts[k]
