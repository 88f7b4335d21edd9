"""Embeddings of a whole source into files, by as many processes as there are.

Each makes shards of its own on its own devices, and none waits for another: a process that dies
costs its shard, nothing else. Batches begin anew with every shard, so which process makes it, and
how often it was begun, does not change a bit of it.
"""

import collections
import hashlib
import importlib.metadata
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array

from base.errors import UserError
from embedding.reading import Reader, Row, Slots, zeros_of
from embedding.store import Store, Writer
from input_pipeline import loader
from input_pipeline.bad_examples import BadExamples
from input_pipeline.errors import BadExample
from input_pipeline.sources.embeddings import KINDS
from siglip.sharding import batch_sharding, local_mesh, replicated, to_device
from siglip.towers.vit import images_of

SHARD_ROWS = 16384  # 75 MB of images at d = 1152
CROWD = 1000  # rows, of which more than half are bad only where something is wrong with all
AHEAD = 2  # batches on the devices while the host makes the next
EVERY = 5.0  # seconds between two lines of progress


class Embedded(NamedTuple):
    """What became of this process's shards, and of the folder."""

    bad: BadExamples
    manifest: dict[str, Any] | None  # None: shards of other processes are missing


def embed_source(
    model: Any,
    params: Any,
    preprocess: Any,
    source: Any,
    out: str | pathlib.Path,
    *,
    description: dict[str, Any],
    what: Sequence[str] = KINDS,
    batch_size: int = 256,
    dtype: str = "float32",
    shard_rows: int = SHARD_ROWS,
    process_index: int = 0,
    process_count: int = 1,
    max_bad_fraction: float = 0.01,
    wait: float = 600,
    num_threads: int = loader.NUM_THREADS,
    progress: Callable[[str], None] = print,
) -> Embedded:
    """Writes the embeddings that are not there yet; sources/embeddings.py describes the files.

    Args:
      model: model.apply({'params': params}, image=..., text=...) -> (zimg, ztxt, _), unit norm.
      params: of the model, in any placement. Every device gets all of them.
      preprocess: see transforms.Preprocess.
      source: see input_pipeline/__init__.py. Read once, in its order, also for texts alone.
      out: the folder; one of an earlier run of the same goes on.
      description: what else a later run must agree on, as JSON: model, preprocessing, source.
      what: 'image', 'text' or both. All texts of an example are embedded.
      batch_size: images, or texts, at a time on the devices of this process.
      dtype: of the files, 'float32' or 'float16'.
      process_index, process_count: this process makes shards process_index + i process_count.
      max_bad_fraction: of this process's examples. A bad one is a row of zeros, without texts.
      wait: seconds to wait for process 0 to write the manifest.
      progress: takes a line every few seconds.

    Raises:
      UserError: a setting is out of range, the folder is of something else, too many examples are
        bad, an embedding is not finite, or the source refuses.
    """
    mesh = local_mesh()
    what = [kind for kind in KINDS if kind in what]
    _check(what, dtype, shard_rows, process_index, process_count, batch_size, mesh.size)
    if not len(source):
        raise UserError("there is nothing to embed: the source has no examples")
    params_hash = hash_of(params)
    params = jax.device_put(params, replicated(mesh))
    zeros = zeros_of(source, preprocess, what)
    embed = jax.jit(_embed_with(model), out_shardings=batch_sharding(mesh))
    manifest = {
        **description,
        "params_sha256": params_hash,
        "examples": len(source),
        "examples_sha256": _fingerprint(source),
        "class_names": source.class_names and list(map(str, source.class_names)),
        "what": what,
        "d": _width(embed, params, zeros, batch_size),
        "dtype": dtype,
        "shard_rows": shard_rows,
        "jax": importlib.metadata.version("jax"),
    }
    place = {"process_index": process_index, "process_count": process_count}
    with Store(out, manifest, **place, wait=wait, tell=progress) as store:
        bad = _Allowed(store, max_bad_fraction)
        slots = Slots(len(source), store.left, shard_rows, batch_size)
        if slots.rows < store.rows:
            progress(f"{store.rows - slots.rows} of {store.rows} rows are there already")
        work = _DeviceWork(lambda batch: embed(params, to_device(batch, mesh)))
        told = _Told(slots.rows, what, progress)
        reader = Reader(source, preprocess, zeros)
        if len(slots):
            batches = loader.eval_batches(
                slots, reader.row, batch_size=batch_size, num_threads=num_threads
            )
            with batches:  # an error leaves no threads behind
                _embed_batches(batches, reader, store, work, bad, told)
        told.end()
        return Embedded(bad.met, store.finish())


def _fingerprint(source: Any) -> str:
    """Of ids and texts all over the source: a run does not go on with other data."""
    found, tries = hashlib.sha256(), min(32, len(source))
    for i in range(tries):
        try:
            example = source[i * len(source) // tries]
            told = (str(example["id"]), list(example["texts"]))
        except BadExample as error:
            told = (error.kind,)
        found.update(repr(told).encode())
    return found.hexdigest()


def _embed_batches(
    batches: loader.Batches,
    reader: "Reader",
    store: Store,
    work: "_DeviceWork",
    bad: "_Allowed",
    told: "_Told",
) -> None:
    shard: _Shard | None = None
    for batch in batches:
        rows = [(int(i), reader.taken(int(i))) for i in batch["row"] if i >= 0]
        bad.add([row for _, row in rows])
        if shard is None:
            writer = store.writer(rows[0][0] // store.manifest["shard_rows"])
            shard = _Shard(writer, work, len(batch["row"]), store.manifest["dtype"])
        shard.add(rows, {key: batch[key] for key in reader.zeros})
        if store.ends_with(rows[-1][0]):
            shard.end()
            shard = None
        told.add(len(rows), sum(len(row.texts) for _, row in rows))
    work.drain(0)


def hash_of(params: Any) -> str:
    """sha256 over names, shapes, types and bytes of the arrays: the same for the same parameters,
    wherever they lie."""
    arrays = jax.tree_util.tree_flatten_with_path(params)[0]
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in arrays}
    digest = hashlib.sha256()
    for name, x in sorted(named.items()):
        array = np.ascontiguousarray(x)  # one at a time in memory
        digest.update(f"{name} {array.dtype} {list(np.shape(x))}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


class _DeviceWork:
    """Batches on their way through the devices, in order, and what to do with each result."""

    def __init__(self, embed: Callable[[dict[str, np.ndarray]], Array]):
        self._embed = embed
        self._waiting: collections.deque[tuple[Array | None, Callable]] = collections.deque()
        self._running = 0

    def start(self, batch: dict[str, np.ndarray], then: Callable[[np.ndarray], None]) -> None:
        self._waiting.append((self._embed(batch), then))
        self._running += 1
        self.drain(AHEAD)

    def after(self, then: Callable[[], None]) -> None:
        """Calls it when all that was started before is done; the devices do not wait for it."""
        self._waiting.append((None, then))

    def drain(self, left: int) -> None:
        """Waits until no more than `left` batches are under way."""
        while self._waiting and (self._running > left or left == 0):
            z, then = self._waiting.popleft()
            if z is None:
                then()
            else:
                self._running -= 1
                then(np.array(z))


class _Shard:
    """A shard while its batches go to the devices and come back."""

    def __init__(self, writer: Writer, work: _DeviceWork, batch_size: int, dtype: str):
        self._writer, self._work = writer, work
        self._batch_size, self._dtype = batch_size, dtype
        self._tokens: list[np.ndarray] = []

    def add(self, rows: list[tuple[int, Row]], images: dict[str, np.ndarray]) -> None:
        for i, row in rows:
            self._writer.row(
                index=i,
                id=row.id,
                texts=row.texts,
                languages=row.languages,
                weights=row.weights,
                label=row.label,
                bad=row.bad.kind if row.bad else "",
            )
            self._tokens += row.tokens
        if images:
            good = np.array([row.bad is None for _, row in rows])
            self._work.start(images, lambda z: self._write("image", z, good))
        while len(self._tokens) >= self._batch_size:
            self._start_texts()

    def end(self) -> None:
        if self._tokens:
            self._start_texts()
        self._work.after(self._writer.finish)

    def _start_texts(self) -> None:
        tokens = self._tokens[: self._batch_size]
        del self._tokens[: self._batch_size]
        batch = np.zeros((self._batch_size, *tokens[0].shape), tokens[0].dtype)
        batch[: len(tokens)] = tokens
        good = np.ones(len(tokens), bool)
        self._work.start({"text": batch}, lambda z: self._write("text", z, good))

    def _write(self, kind: str, z: np.ndarray, good: np.ndarray) -> None:
        z = z[: len(good)]
        if broken := int((~np.isfinite(z[good]).all(axis=1)).sum()):
            raise UserError(
                f"{broken} of {int(good.sum())} embeddings of kind {kind} are not finite: these "
                "parameters are broken, embed with others"
            )
        z[~good] = 0
        self._writer.append(kind, z.astype(self._dtype))


class _Told:
    """'4096/100000 rows, 812 images/s, 3200 texts/s, 0:01:58 left', every few seconds."""

    def __init__(self, total: int, what: Sequence[str], tell: Callable[[str], None]):
        self._total, self._what, self._tell = total, what, tell
        self._begun: float | None = None
        self._last, self._rows, self._texts = time.monotonic(), 0, 0
        self._first = (0, 0)

    def add(self, rows: int, texts: int) -> None:
        self._rows, self._texts = self._rows + rows, self._texts + texts
        now = time.monotonic()
        if self._begun is None:  # the first batch waited for the compiler
            self._begun, self._first = now, (self._rows, self._texts)
        if now - self._last >= EVERY:
            self._last = now
            self._tell(self.line(now))

    def line(self, now: float) -> str:
        seconds = now - self._begun if self._begun else 0.0
        rates = [(self._rows - self._first[0]), (self._texts - self._first[1])]
        images, texts = (rate / seconds if seconds > 0 else 0.0 for rate in rates)
        left = (self._total - self._rows) / images if images else None
        parts = [f"{self._rows}/{self._total} rows"]
        parts += [f"{images:.0f} images/s"] if "image" in self._what else []
        parts += [f"{texts:.0f} texts/s"] if "text" in self._what else []
        return ", ".join([*parts, f"{_duration(left)} left"])

    def end(self) -> None:
        if self._total:
            self._tell(self.line(time.monotonic()))


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


class _Allowed:
    """Bad examples of this process's shards, also of earlier runs; UserError once they are too
    many."""

    def __init__(self, store: Store, fraction: float):
        self.met, self._rows, self._fraction = BadExamples(), store.rows, fraction
        for error, name in store.bad():
            self.met.record(error, name)
        self._earlier, self._seen = self.met.count, 0
        self._check()

    def add(self, rows: Sequence[Row]) -> None:
        for row in rows:
            if row.bad is not None:
                self.met.record(row.bad, row.id, row.shard)
        self._seen += len(rows)
        self._check()

    def _check(self) -> None:
        count, new = self.met.count, self.met.count - self._earlier
        # Of few examples one is a large share already, so a single one stops no run that allows
        # any. A disk that has gone: the share of all would show it late.
        many = count > max(self._fraction * self._rows, 1 if self._fraction else 0)
        gone = self._seen >= CROWD and new > max(0.5, self._fraction) * self._seen
        if many or gone:
            told = f"{new} of {self._seen}" if gone else f"{count} of {self._rows}"
            kinds = ", ".join(f"{n} {kind}" for kind, n in self.met.kinds().items())
            raise UserError(
                f"{told} examples cannot be used ({kinds}), more than max_bad_fraction="
                f"{self._fraction}; the worst: {self.met.worst()}; mend them and embed into a new "
                "folder, or allow more"
            )


def _embed_with(model: Any) -> Callable:
    def embed(params, batch: dict[str, Array]) -> Array:
        image, text = images_of(batch), batch.get("text")
        zimg, ztxt, _ = model.apply({"params": params}, image=image, text=text)
        return ztxt if zimg is None else zimg

    return embed


def _width(embed: Callable, params: Any, zeros: dict[str, np.ndarray], batch_size: int) -> int:
    """d, without computing anything."""
    batch = {k: jax.ShapeDtypeStruct((batch_size, *v.shape), v.dtype) for k, v in zeros.items()}
    images = {k: v for k, v in batch.items() if k != "text"}
    texts = {k: v for k, v in batch.items() if k == "text"}
    widths = {
        jax.eval_shape(embed, params, fields).shape[1] for fields in (images, texts) if fields
    }
    if len(widths) > 1:
        raise UserError(f"embeddings of images and texts have different widths {sorted(widths)}")
    return widths.pop()


def _check(what, dtype, shard_rows, process_index, process_count, batch_size, devices) -> None:
    if not what:
        raise UserError(f"what is none of {', '.join(KINDS)}")
    if dtype not in ("float32", "float16"):
        raise UserError(f"dtype {dtype!r} is none of float32, float16")
    if shard_rows < 1:
        raise UserError(f"shard_rows={shard_rows} must be at least 1")
    if not 0 <= process_index < process_count:
        raise UserError(f"process {process_index} is not one of 0 to {process_count - 1}")
    if batch_size < 1 or batch_size % devices:
        near = max(1, round(batch_size / devices)) * devices
        raise UserError(
            f"batch_size={batch_size} does not divide over {devices} devices; the nearest that "
            f"does is {near}"
        )
