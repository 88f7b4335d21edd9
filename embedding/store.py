"""The folder of embeddings while it is written: a shard is complete or absent, whatever kills us.

What the files are: see input_pipeline/sources/embeddings.py, which reads them.
"""

import fcntl
import json
import pathlib
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from base import whole_file
from base.errors import UserError
from base.nested import flatten
from input_pipeline.errors import BadExample
from input_pipeline.sources.embeddings import (
    KINDS,
    MANIFEST,
    SCHEMA,
    VERSION,
    file_name,
    open_shard,
    read_manifest,
    shard_count,
)

LOCK = ".lock"
# Keys of the manifest that may differ in a run that continues. The model's name is one of them, as
# the hash of the parameters decides.
NOT_COMPARED = ("jax", "done", "rows", "texts", "bad", "model")
FIRST_COUNT_BYTE = 2**40  # byte FIRST_COUNT_BYTE + n of the lock stands for n processes
POLL_SECONDS = 0.2  # between looks for the manifest of process 0


class Store:
    """The shards of one process. Shard k belongs to process k modulo process_count.

    A file gets its name when it is on the disk, and the file of the rows comes last: a shard
    without it is made again, so a kill or a power cut leaves neither a gap nor a row twice.

    Args:
      out: the folder, new or that of an earlier run with the same settings.
      manifest: what is embedded. Process 0 writes it, the others wait for it.
      wait: seconds that they wait.
      tell: takes lines for people.

    Raises:
      UserError: the folder belongs to something else, or another run writes these shards.

    Attributes:
      manifest: what is embedded.
      shards: of this process. missing: those of them that are not on disk yet.
      rows: the number of rows in the shards of this process.
    """

    def __init__(
        self,
        out: str | pathlib.Path,
        manifest: dict[str, Any],
        *,
        process_index: int = 0,
        process_count: int = 1,
        wait: float = 600,
        tell: Callable[[str], None] = print,
    ):
        self.out, self.manifest = pathlib.Path(out).expanduser(), _plain(manifest)
        self.manifest |= {"version": VERSION, "done": False}
        self._process, self._processes = process_index, process_count
        self._writers: list[ShardWriter] = []
        if self.out.exists() and not self.out.is_dir():
            raise UserError(f"--out {out} is a file; give a new folder")
        self.out.mkdir(parents=True, exist_ok=True)
        self._lock = self._acquire_lock()
        try:
            self._agree_on_manifest(wait)
            for part in self.out.glob(".*.part"):
                if self._is_mine(part):
                    part.unlink()
            self.shards = range(process_index, shard_count(self.manifest), process_count)
            self.rows = sum(map(self._rows_of, self.shards))
            self.missing = [k for k in self.shards if not self._is_complete(k, tell)]
            if self.missing and self._on_disk()["done"]:  # somebody deleted or damaged a shard
                self._save_manifest(self.manifest)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *unused) -> None:
        self.close()

    def close(self) -> None:
        for writer in self._writers:
            writer.close()
        self._lock.close()

    def writer(self, shard: int) -> "ShardWriter":
        """A writer of a shard; close() of the store closes it, finished or not."""
        kinds, d, dtype = self.manifest["what"], self.manifest["d"], self.manifest["dtype"]
        self._writers = [writer for writer in self._writers if not writer.closed]
        self._writers.append(ShardWriter(self.out, shard, kinds, d, dtype))
        return self._writers[-1]

    def ends_shard(self, row: int) -> bool:
        """Whether a row of the source is the last of its shard."""
        k, offset = divmod(row, self.manifest["shard_rows"])
        return offset + 1 == self._rows_of(k)

    def bad(self) -> list[tuple[BadExample, str]]:
        """The bad examples in the complete shards of this process, with their ids."""
        return [bad for k in self.shards if k not in self.missing for bad in self._bad(k)]

    def finish(self) -> dict[str, Any] | None:
        """Marks the folder as done and returns the manifest; None while shards are missing. Any
        process may do so: all would write the same."""
        everything = range(shard_count(self.manifest))
        if not all((self.out / file_name("rows", k)).exists() for k in everything):
            return None
        texts, kinds = 0, Counter()
        for k in everything:
            rows = open_shard(str(self.out), k, self.manifest).rows
            texts += len(rows.column("texts").combine_chunks().flatten())
            kinds.update(error.kind for error, _ in self._bad(k))
        counts = {
            "rows": self.manifest["examples"],
            "texts": texts,
            "bad": dict(sorted(kinds.items())),
        }
        jax_version = self._on_disk()["jax"]  # of the run that began
        done = {**self.manifest, "jax": jax_version, **counts, "done": True}
        self._save_manifest(done)
        return done

    def _rows_of(self, k: int) -> int:
        rows = self.manifest["shard_rows"]
        return min(rows, self.manifest["examples"] - k * rows)

    def _acquire_lock(self) -> BinaryIO:
        """Locks the byte of this process; the system frees it however the process ends."""
        file = (self.out / LOCK).open("a+b")
        try:
            self._lock_process_count(file)
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, self._process)
        except (BlockingIOError, PermissionError) as error:
            file.close()
            raise UserError(
                f"--out {self.out}: another run of process {self._process} writes there; wait for "
                "it, or give each its own --process_id"
            ) from error
        except OSError:
            pass  # a file system without locks: two runs of one command are the user's to avoid
        return file

    def _lock_process_count(self, file: BinaryIO) -> None:
        """Makes sure that all that write here at a time agree on the number of processes, else a
        shard had two owners: each shares the byte of its number, and nobody may hold another."""
        fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB, 1, FIRST_COUNT_BYTE + self._processes)
        before = (self._processes, FIRST_COUNT_BYTE)
        after = (FIRST_COUNT_BYTE, FIRST_COUNT_BYTE + self._processes + 1)
        try:
            for length, first in (before, after):
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, length, first)
                fcntl.lockf(file, fcntl.LOCK_UN, length, first)
        except (BlockingIOError, PermissionError) as error:
            file.close()
            raise UserError(
                f"--out {self.out}: a run with another --num_processes writes there; stop it, or "
                "start this one with its number"
            ) from error

    def _agree_on_manifest(self, wait: float) -> None:
        """Writes or awaits manifest.json, and refuses one of another embedding."""
        if self._process == 0 and not (self.out / MANIFEST).exists():
            others = [path.name for path in self.out.iterdir() if not path.name.startswith(".")]
            if others:
                raise UserError(
                    f"--out {self.out} is not empty ({sorted(others)[0]}), and not of an "
                    "embedding; give a new folder"
                )
            self._save_manifest(self.manifest)
        until = time.monotonic() + wait
        while not (self.out / MANIFEST).exists():
            if time.monotonic() > until:
                raise UserError(
                    f"process 0 wrote no {self.out / MANIFEST} within {wait:.0f} s; is it running, "
                    "with the same --out?"
                )
            time.sleep(POLL_SECONDS)
        there, here = flatten(self._on_disk()), flatten(self.manifest)
        for key in here | there:
            was, value = there.get(key), here.get(key)
            if was != value and key.partition(".")[0] not in NOT_COMPARED:
                raise UserError(
                    f"--out {self.out} is of another embedding, {key} {_short(was)} instead of "
                    f"{_short(value)}; give a new folder"
                )

    def _on_disk(self) -> dict[str, Any]:
        return read_manifest(str(self.out))

    def _save_manifest(self, manifest: dict[str, Any]) -> None:
        text = json.dumps(manifest, indent=1, sort_keys=True) + "\n"
        part = self.out / f".{MANIFEST}.{self._process}.part"
        part.write_bytes(text.encode())
        whole_file.rename(part, self.out / MANIFEST)

    def _is_mine(self, part: pathlib.Path) -> bool:
        """'.image-00007.npy.part' is by its shard, '.manifest.json.1.part' by its process."""
        number = part.name.split(".")[1].rpartition("-")[2]
        if part.name.startswith(f".{MANIFEST}."):
            return part.name == f".{MANIFEST}.{self._process}.part"
        return number.isdecimal() and int(number) % self._processes == self._process

    def _is_complete(self, k: int, tell: Callable[[str], None]) -> bool:
        if not (self.out / file_name("rows", k)).exists():
            return False
        try:
            open_shard(str(self.out), k, self.manifest)
            return True
        except UserError as damage:
            tell(f"made again: {damage}")
            (self.out / file_name("rows", k)).unlink()
            return False

    def _bad(self, k: int) -> list[tuple[BadExample, str]]:
        rows = open_shard(str(self.out), k, self.manifest).rows
        kinds = rows.column("bad").to_numpy()
        bad = np.flatnonzero(kinds != "")
        ids = rows.column("id").take(pa.array(bad)).to_pylist()
        return [(BadExample(kinds[row]), name) for row, name in zip(bad, ids)]


class ShardWriter:
    """Writes a shard: embeddings as they come, the rows at the end, then the files get their names.

    The rows, with their texts, are in memory until then.
    """

    def __init__(self, out: pathlib.Path, shard: int, kinds: list[str], d: int, dtype: str):
        self._out, self._shard = out, shard
        self._columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
        self._texts = 0
        self._arrays = {kind: _GrowingNpy(self._part(kind), d, dtype) for kind in kinds}

    def row(self, **values: Any) -> None:
        """The next row; see SCHEMA, without text_offset."""
        for name, column in self._columns.items():
            column.append(self._texts if name == "text_offset" else values[name])
        self._texts += len(values["texts"])

    def append(self, kind: str, z: np.ndarray) -> None:
        """The next embeddings [n, d], of 'image' or 'text'."""
        self._arrays[kind].append(z)

    def finish(self) -> None:
        """Writes the rows and names the files.

        Raises:
          AssertionError: embeddings are missing.
        """
        sizes = {"image": len(self._columns["index"]), "text": self._texts}
        for kind in KINDS:
            if kind in self._arrays and self._arrays[kind].rows != sizes[kind]:
                raise AssertionError(f"{self._arrays[kind].rows} {kind}s of {sizes[kind]}")
        for array in self._arrays.values():
            array.finish()
        table = pa.table(self._columns, schema=SCHEMA)
        part = str(self._part("rows"))
        with pa.OSFile(part, "wb") as file, pa.ipc.new_file(file, SCHEMA) as writer:
            writer.write_table(table)
        for kind in (*self._arrays, "rows"):  # the rows last
            whole_file.rename(self._part(kind), self._out / file_name(kind, self._shard))
        self.close()

    @property
    def closed(self) -> bool:
        return all(array.file.closed for array in self._arrays.values())

    def close(self) -> None:
        for array in self._arrays.values():
            array.file.close()

    def _part(self, kind: str) -> pathlib.Path:
        return self._out / f".{file_name(kind, self._shard)}.part"


class _GrowingNpy:
    """A .npy file [rows, d] that grows. The bytes are those that np.save would write."""

    def __init__(self, path: pathlib.Path, d: int, dtype: str):
        self._d, self._dtype, self.rows = d, np.dtype(dtype), 0
        self.file = path.open("wb")
        self._header()

    def append(self, z: np.ndarray) -> None:
        if z.ndim != 2 or z.shape[1] != self._d:
            raise AssertionError(f"{z.shape} are no embeddings of width {self._d}")
        self.file.write(np.ascontiguousarray(z, self._dtype).data)
        self.rows += len(z)

    def finish(self) -> None:
        self.file.seek(0)
        self._header()
        self.file.close()

    def _header(self) -> None:
        # NumPy leaves room for the number of rows to grow, so the header stays as long.
        shape = (self.rows, self._d)
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self.file, header)


def _plain(value: Any) -> Any:
    """The value as JSON gives it back: tuples are lists."""
    return json.loads(json.dumps(value))


def _short(value: Any) -> str:
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
