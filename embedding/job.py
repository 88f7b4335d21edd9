"""Embeds a whole source into files, on any number of processes.

Each process makes shards of its own on its own devices, and none waits for another: a process that
dies costs its current shard, nothing else. Every shard begins with a new batch, so neither the
process that makes it nor the number of attempts changes a bit of it.
"""

import functools
import hashlib
import importlib.metadata
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from base.errors import UserError
from base.progress import Progress
from embedding.devices import DeviceQueue, ShardEmbedder
from embedding.reading import BadExampleLimit, ExampleReader, Slots, zeros_of
from embedding.store import Store
from input_pipeline import loader
from input_pipeline.bad_examples import BadExamples
from input_pipeline.errors import BadExample
from input_pipeline.sources.embeddings import KINDS
from siglip.embed import embed_batch
from siglip.leaf_names import leaves
from siglip.sharding import batch_sharding, check_batch_size, local_mesh, replicated, to_device

SHARD_ROWS = 16384  # 75 MB of images at d = 1152
PROGRESS_SECONDS = 5.0  # between two lines


class Embedded(NamedTuple):
    """The outcome of one process: its bad examples, and the manifest once the folder is complete.

    The manifest is None while shards of other processes are missing.
    """

    bad: BadExamples
    manifest: dict[str, Any] | None


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
    """Embeds all rows that are not on disk yet; sources/embeddings.py describes the files.

    Args:
      model: model.apply({'params': params}, image=..., text=...) -> (zimg, ztxt, _), unit norm.
      params: of the model, in any placement. Every device gets all of them.
      preprocess: see transforms.Preprocess.
      source: see input_pipeline/sources/contract.py. Read once, in its order, also for texts alone.
      out: a new folder, or that of an earlier run with the same settings, which is continued.
      description: what else must be equal in a run that continues, as JSON: model, preprocessing,
        source.
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
    _check_settings(what, dtype, shard_rows, process_index, process_count)
    check_batch_size("batch_size", batch_size, mesh)
    if not len(source):
        raise UserError("there is nothing to embed: the source has no examples")
    params_hash = hash_params(params)
    params = jax.device_put(params, replicated(mesh))
    zeros = zeros_of(source, preprocess, what)
    embed = jax.jit(functools.partial(embed_batch, model), out_shardings=batch_sharding(mesh))
    manifest = {
        **description,
        "params_sha256": params_hash,
        "examples": len(source),
        "examples_sha256": _hash_examples(source),
        "class_names": source.class_names and list(map(str, source.class_names)),
        "what": what,
        "d": _width(embed, params, zeros, batch_size),
        "dtype": dtype,
        "shard_rows": shard_rows,
        "jax": importlib.metadata.version("jax"),
    }
    process = {"process_index": process_index, "process_count": process_count}
    with Store(out, manifest, **process, wait=wait, tell=progress) as store:
        limit = BadExampleLimit(store.rows, max_bad_fraction, store.bad())
        slots = Slots(len(source), store.missing, shard_rows, batch_size)
        if slots.rows < store.rows:
            progress(f"{store.rows - slots.rows} of {store.rows} rows are there already")
        queue = DeviceQueue(lambda batch: embed(params, to_device(batch, mesh)))
        reader = ExampleReader(source, preprocess, zeros)
        with Progress(
            slots.rows,
            "rows",
            others=("texts",) if "text" in what else (),
            tell=progress,
            interval=PROGRESS_SECONDS,
        ) as status:
            if len(slots):
                batches = loader.eval_batches(
                    slots, reader.row, batch_size=batch_size, num_threads=num_threads
                )
                with batches:  # an error leaves no threads behind
                    _embed_batches(batches, reader, store, queue, limit, status)
        return Embedded(limit.bad, store.finish())


def _embed_batches(
    batches: loader.Batches,
    reader: ExampleReader,
    store: Store,
    queue: DeviceQueue,
    limit: BadExampleLimit,
    status: Progress,
) -> None:
    shard: ShardEmbedder | None = None
    for batch in batches:
        rows = [(int(i), reader.take(int(i))) for i in batch["row"] if i >= 0]
        limit.add([row for _, row in rows])
        if shard is None:
            writer = store.writer(rows[0][0] // store.manifest["shard_rows"])
            shard = ShardEmbedder(writer, queue, len(batch["row"]), store.manifest["dtype"])
        shard.add(rows, {key: batch[key] for key in reader.zeros})
        if store.ends_shard(rows[-1][0]):
            shard.end()
            shard = None
        texts = {"texts": sum(len(row.texts) for _, row in rows)}
        status.update(len(rows), **(texts if "text" in store.manifest["what"] else {}))
    queue.drain(0)


def _hash_examples(source: Any) -> str:
    """sha256 of ids and texts from all over the source: no run continues with other data."""
    digest, samples = hashlib.sha256(), min(32, len(source))
    for i in range(samples):
        try:
            example = source[i * len(source) // samples]
            content = (str(example["id"]), list(example["texts"]))
        except BadExample as error:
            content = (error.kind,)
        digest.update(repr(content).encode())
    return digest.hexdigest()


def hash_params(params: Any) -> str:
    """sha256 of names, shapes, types and bytes of the arrays, wherever these are placed."""
    digest = hashlib.sha256()
    for name, x in sorted(leaves(params).items()):
        array = np.ascontiguousarray(x)  # one at a time in memory
        digest.update(f"{name} {array.dtype} {list(np.shape(x))}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _width(embed: Callable, params: Any, zeros: dict[str, np.ndarray], batch_size: int) -> int:
    """The width d of the embeddings, from shapes alone."""
    batch = {k: jax.ShapeDtypeStruct((batch_size, *v.shape), v.dtype) for k, v in zeros.items()}
    images = {k: v for k, v in batch.items() if k != "text"}
    texts = {k: v for k, v in batch.items() if k == "text"}
    widths = {
        jax.eval_shape(embed, params, fields).shape[1] for fields in (images, texts) if fields
    }
    if len(widths) > 1:
        raise UserError(f"embeddings of images and texts have different widths {sorted(widths)}")
    return widths.pop()


def _check_settings(what, dtype, shard_rows, process_index, process_count) -> None:
    if not what:
        raise UserError(f"what is none of {', '.join(KINDS)}")
    if dtype not in ("float32", "float16"):
        raise UserError(f"dtype {dtype!r} is none of float32, float16")
    if shard_rows < 1:
        raise UserError(f"shard_rows={shard_rows} must be at least 1")
    if not 0 <= process_index < process_count:
        raise UserError(f"process {process_index} is not one of 0 to {process_count - 1}")
