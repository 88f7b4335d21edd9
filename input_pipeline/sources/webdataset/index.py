"""The index of a tar shard: offsets of the members of each sample, kept in a .npy file."""

import array
import collections
import concurrent.futures
import hashlib
import json
import os
import pathlib
from typing import NamedTuple

import numpy as np

from base import whole_file
from base.errors import UserError
from base.progress import Progress
from base.words import one_line
from input_pipeline.errors import BadExample
from input_pipeline.sources import storage
from input_pipeline.sources.webdataset.sample import MAX_JSON_BYTES, Field, Fields
from input_pipeline.sources.webdataset.tar_headers import (
    BLOCK,
    COMPRESSED,
    FOLDER,
    MAX_PADDING_BYTES,
    REGULAR,
    BrokenTar,
    Extent,
    Member,
    Read,
    Reader,
    member_at,
    padded,
)


class Layout(NamedTuple):
    """The settings of a source that decide which members its index holds."""

    images: tuple[bytes, ...]
    texts: tuple[bytes, ...]  # all members but the image that are read
    captions: tuple[bytes, ...]  # one of which a sample must have
    language: str

    @property
    def members(self) -> int:
        return len(Extent._fields) * (1 + len(self.texts))

    @property
    def columns(self) -> int:
        return self.members + bool(self.language)


FORMAT = 1  # of the files below; a new number leaves the old files unused
# int64: samples, columns, words of the summary | summary: JSON, padded | rows: the Extents of the
# image and of Layout.texts, then, if languages are read, the position in the summary's list.
HEAD = 3


class Summary(NamedTuple):
    samples: int
    begins: int  # byte offset of the rows in the file
    damage: dict[str, int]
    broken: str  # why the walk ended early; '': it did not
    suffixes: list[str]  # up to 20 suffixes of members, for error messages
    languages: list[str]


class _Samples:
    """Groups the members of a walk into samples, and makes a row of the index of each."""

    def __init__(self, layout: Layout, read: Read):
        self._layout, self._read = layout, read
        self._wanted = {*layout.images, *layout.texts}
        self._key: bytes | None = None
        self._extents: dict[bytes, Extent] = {}
        self._counted = False  # this sample is counted in `damage` already
        self.rows = array.array("q")
        self.damage = collections.Counter[str]()
        self.suffixes: set[bytes] = set()
        self.languages: dict[str, int] = {}

    def add(self, member: Member) -> None:
        name, kind, extent = member
        # Names only serve as keys and are never opened, but such a name is a sign of an attack.
        hostile = not name or name.startswith(b"/") or b"\0" in name or b".." in name.split(b"/")
        if hostile:
            self.damage["damaged record"] += 1
            return
        key, suffix = _split(name)
        if suffix and key != self._key:
            self.finish()
            self._key = key
        if kind == FOLDER:
            return  # tar writes one where it packs a folder
        if kind not in REGULAR:
            self.damage["damaged record"] += 1
            self._counted = self._counted or bool(suffix)
        elif suffix in self._wanted:
            self._extents.setdefault(suffix, extent)
        if suffix and len(self.suffixes) < 20:
            self.suffixes.add(suffix[:20])

    def tear(self, member: Member | None) -> None:
        """Counts the sample that is cut off inside this member, or at a header (None)."""
        is_torn = member is not None and _split(member.name)[0] == self._key
        if is_torn:
            self._extents.clear()
        self._counted = self._counted or is_torn or member is None
        self.finish()
        self.damage["damaged record"] += 1

    def finish(self) -> None:
        layout, extents = self._layout, self._extents
        images = [extents[s] for s in layout.images if s in extents and extents[s].size]
        if images and (not layout.captions or any(s in extents for s in layout.captions)):
            for extent in (images[0], *(extents.get(s, _MISSING) for s in layout.texts)):
                self.rows.extend(extent)
            if layout.language:
                language = self._language(extents.get(b"json", _MISSING))
                self.rows.append(self.languages.setdefault(language, len(self.languages)))
        elif self._key is not None and not self._counted:
            self.damage["no caption" if images else "no image"] += 1
        self._key, self._extents, self._counted = None, {}, False

    def _language(self, extent: Extent) -> str:
        if extent.start < 0 or extent.size > MAX_JSON_BYTES:
            return ""
        try:
            fields = Fields({b"json": self._read(extent.data, extent.size)})
            language = next(iter(fields.texts(Field(b"json", self._layout.language))), "")
        except BadExample:  # reported when the sample is read
            return ""
        return language if len(language) <= 64 else ""


_MISSING = Extent(-1, 0, 0, 0)


def _split(name: bytes) -> tuple[bytes, bytes]:
    """Splits 'dir/a.seg.png' into 'dir/a' and 'seg.png'; a member of a sample has a suffix."""
    slash = name.rfind(b"/") + 1
    dot = name.find(b".", slash)
    return (name[:dot], name[dot + 1 :].lower()) if dot > slash else (name, b"")


def walk(blob: storage.Blob, layout: Layout) -> np.ndarray:
    """Walks the headers of a shard; returns its index as int64 words (see FORMAT)."""
    read = Reader(blob)
    if read(0, BLOCK).startswith(COMPRESSED):
        raise UserError(
            f"{blob.path} is compressed, which has no random access; decompress it once and give "
            "the .tar"
        )
    samples, shared, broken, at = _Samples(layout, read), {}, "", 0
    while not broken:
        try:
            member = member_at(read, at, shared)
        except BrokenTar as error:
            broken = str(error)
            samples.tear(None)
            break
        if member is None:
            if blob.size - at > MAX_PADDING_BYTES or any(read(at, blob.size - at)):
                broken = f"has zeros in place of a header, at byte {at}, and goes on behind them"
                samples.tear(None)
            break
        extent = member.extent
        if extent.data + extent.size > blob.size:
            broken = f"ends inside a member, which begins at byte {extent.start}"
            samples.tear(member)
        else:
            samples.add(member)
        at = extent.data + padded(extent.size)
    samples.finish()
    rows = np.frombuffer(samples.rows, np.int64) if samples.rows else np.zeros(0, np.int64)
    summary = json.dumps(
        {
            "damage": dict(samples.damage),
            "broken": broken,
            "suffixes": sorted(suffix.decode("utf-8", "replace") for suffix in samples.suffixes),
            "languages": list(samples.languages),
        }
    ).encode()
    words = np.frombuffer(summary + b" " * (-len(summary) % 8), np.int64)
    head = [len(rows) // layout.columns, layout.columns, len(words)]
    return np.concatenate([np.array(head, np.int64), words, rows])


def open_index(file: str, columns: int) -> tuple[np.ndarray, Summary]:
    """Rows [samples, columns], which stay on disk, and the summary.

    Raises:
      OSError: there is no such file.
      ValueError: it is damaged.
    """
    # What np.load(mmap_mode="r", allow_pickle=False) does for .npy; np.load opens zip files too.
    mapped = np.lib.format.open_memmap(file, mode="r")
    words = mapped.view(np.ndarray)
    if words.dtype != np.int64 or words.ndim != 1 or len(words) < HEAD:
        raise ValueError(f"{file} is no index")
    samples, width, length = words[:HEAD].tolist()
    if min(samples, length) < 0 or width != columns:
        raise ValueError(f"{file} is no index of {columns} columns")
    try:
        fields = json.loads(words[HEAD : HEAD + length].tobytes())
        summary = Summary(samples, mapped.offset + 8 * (HEAD + length), **fields)
    except (TypeError, RecursionError) as error:
        raise ValueError(f"{file} has no summary") from error
    return words[HEAD + length :].reshape(samples, width), summary


def bytes_at(file: str, begin: int, size: int) -> bytes:
    """Reads `size` bytes of a file; fewer where it ends, none where it is missing."""
    try:
        with open(file, "rb", buffering=0) as opened:
            return os.pread(opened.fileno(), size, begin)
    except OSError:
        return b""


def make_index(blob: storage.Blob, file: str, layout: Layout) -> None:
    try:
        index = walk(blob, layout)
    except OSError as error:
        raise UserError(f"{blob.path} cannot be read: {one_line(error)}") from error
    folder = pathlib.Path(file).parent
    try:
        with whole_file.create(file) as out:
            np.save(out, index, allow_pickle=False)
    except OSError as error:
        raise UserError(f"{folder} takes no index: {one_line(error)}") from error


Shard = tuple[storage.Blob, str, Summary]


def index_file(blob: storage.Blob, layout: Layout, folder: str) -> str:
    key = repr((FORMAT, blob.fingerprint(), *layout))
    return os.path.join(folder, hashlib.sha256(key.encode()).hexdigest()[:40] + ".npy")


def _open_shard(path: str, layout: Layout, folder: str) -> Shard:
    blob = storage.Blob(path)
    try:
        file = index_file(blob, layout, folder)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from error
    try:
        return blob, file, open_index(file, layout.columns)[1]
    except (OSError, ValueError):
        make_index(blob, file, layout)
        return blob, file, open_index(file, layout.columns)[1]


def open_all(paths: list[str], layout: Layout) -> list[Shard]:
    """Opens shards, and indexes those that have no index yet; in the order of `paths`.

    Each process works in a random order, so that processes that share the folder share the work.
    """
    folder = str(storage.index_folder())
    pool = concurrent.futures.ThreadPoolExecutor(max(4, os.cpu_count() or 1))
    try:
        order = np.random.default_rng().permutation(len(paths)).tolist()
        tasks = {i: pool.submit(_open_shard, paths[i], layout, folder) for i in order}
        _wait(set(tasks.values()))
        return [tasks[i].result() for i in range(len(paths))]
    finally:
        pool.shutdown(cancel_futures=True)


QUIET = 3.0  # seconds before the first line of progress


def _wait(waiting: set[concurrent.futures.Future]) -> None:
    """Waits for all tasks and prints progress; raises the first error at once."""
    with Progress(len(waiting), "shards", title="indexing tar: ", quiet=QUIET) as progress:
        while waiting:
            done, waiting = concurrent.futures.wait(
                waiting, timeout=min(1.0, QUIET), return_when=concurrent.futures.FIRST_EXCEPTION
            )
            for task in done:
                task.result()
            progress.update(len(done))
