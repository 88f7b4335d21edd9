"""Batches in an order that is a function of (seed, step) alone.

Which example stands where depends on nothing else: not on threads, not on how many processes read
(each reads only its rows of the global batch), not on where reading began. So the position of a
run is one integer, the step, and starting at step 10^6 costs as much as starting at 0.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np

from base.errors import UserError
from input_pipeline.bad_examples import Bad
from input_pipeline.errors import KINDS, BadExample
from input_pipeline.mixture import identity
from input_pipeline.order import order_of
from input_pipeline.transforms.corrupt import Corruption

# A thread makes CHUNK rows at a time: not a whole batch, not one row. With whole batches all
# threads finish theirs together, so the first takes num_threads times as long, and as many are in
# memory; with single rows the hand-over between threads costs more than small images do.
# On 2 cores, by whole batches, chunks, single rows: 256 photos to 224 px with 8 threads: first
# batch after 3.0, 0.8, 0.8 s, 500, 165, 100 MB of memory, 760, 700, 740 images per CPU second;
# 512 images of 32 px with 2 threads: 5,500, 7,000, 4,600 images/s.
CHUNK = 32
NUM_THREADS = 8  # about where Python's own work on a row, which only one thread does, is the limit
PREFETCH = 4


def train_batches(
    source: Any,
    preprocess: Any,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = NUM_THREADS,
    prefetch: int = PREFETCH,
    corrupt: str | tuple = "",
    bad: Bad | None = None,
) -> "Batches":
    """An endless iterator of this process's rows of the global batches from `start_step` on.

    Every epoch is a permutation of the source, a new one each (see order.py for files that are
    read in blocks, and mixtures); a batch may begin in one epoch and end in the next. Process p
    has rows [p n, (p+1) n) of each batch, n = batch_size / process_count. What is random in an
    example (its caption, its crop) comes from a generator seeded by (seed, global position).

    An example that cannot be used is a row of zeros in its place, so that the order of the others
    does not depend on it: one file among millions must not end a run.

    Args:
      source: see input_pipeline/__init__.py.
      preprocess: see transforms.Preprocess.
      num_threads: chunks of a batch that are made at a time.
      prefetch: batches that wait for the step.
      corrupt: see corrupt.py.
      bad: where bad examples are entered.

    Yields:
      image uint8 [n, res, res, 3], text int32 [n, token_len], mask bool [n] (False: a bad
      example), bad uint8 [n] (0, or 1 + its kind's place in KINDS), position int64 [n] (global
      position in the stream of all epochs), index int32 [n] (which example, modulo 2**31).

    Raises:
      ValueError: processes do not divide the batch, or there are no examples.
      UserError: none of the examples tried at the start can be used; later, from `next`, what
        the source raises.
    """
    if batch_size % process_count:
        raise ValueError(f"batch_size {batch_size} does not divide over {process_count} processes")
    if not len(source):
        raise ValueError("the source has no examples")
    bad = Bad() if bad is None else bad
    order, corruption = (
        order_of(source, seed),
        Corruption(corrupt, seed=seed, batch_size=batch_size),
    )
    positions = _Positions(batch_size, process_index, process_count, 2**40 // batch_size)
    zeros = {key: np.zeros_like(value) for key, value in _one(source, preprocess).items()}

    def make(position: int, index: int) -> dict[str, Any]:
        example: dict[str, Any] = {}
        try:
            example = source[index]
            made = preprocess.example(example, np.random.default_rng((seed, position)))
            if (at := corruption.text_position(position)) != position:
                index, example = order[at], {}
                example = source[index]  # its caption, as its own row has it
                caption = preprocess.caption(example, np.random.default_rng((seed, at)))
                made["text"] = preprocess.text(caption)
        except BadExample as error:
            bad.record(error, example.get("id", f"[{index}]"), example.get("shard", ""))
            return {**zeros, "mask": np.False_, "bad": np.uint8(1 + KINDS.index(error.kind))}
        for key, like in zeros.items():
            if made[key].shape != like.shape or made[key].dtype != like.dtype:
                raise UserError(
                    f"{key} of {example['id']} is {made[key].dtype}{list(made[key].shape)}, "
                    f"that of another example {like.dtype}{list(like.shape)}; "
                    "a batch needs equal ones"
                )
        if corrupt:
            made = corruption.corrupt_image(made, position)
            vocab_size = preprocess.tokenizer.vocab_size
            made["text"] = corruption.corrupt_text(made["text"], at, vocab_size)
        return {**made, "mask": np.True_, "bad": np.uint8(0)}

    def row(position: int) -> dict[str, Any]:
        index = order[position]
        which = identity(source, index) % 2**31
        return {
            **make(position, index),
            "position": np.int64(position),
            "index": np.int32(which),
        }

    return Batches(positions, row, start_step, num_threads, prefetch)


TRIES = 64


def _one(source: Any, preprocess: Any) -> dict[str, Any]:
    """A row of any good example, for its shapes. Tries some all over the source: where every one
    is bad, a run would see nothing else."""
    bad, tries = Bad(), min(TRIES, len(source))
    for i in range(tries):
        example: dict[str, Any] = {}
        try:
            example = source[i * len(source) // tries]
            return preprocess.example(example, np.random.default_rng(0))
        except BadExample as error:
            bad.record(error, example.get("id", ""), example.get("shard", ""))
    kinds = ", ".join(f"{count} {kind}" for kind, count in bad.kinds().items())
    raise UserError(
        f"none of {tries} examples from all over the source can be used ({kinds}); {bad.worst()}"
    )


class _Positions:
    """Row among all rows of this process -> position among all rows of all global batches."""

    def __init__(self, batch_size: int, process_index: int, process_count: int, batches: int):
        self._batch_size, self._batches = batch_size, batches
        self.local = batch_size // process_count  # rows of a batch
        self._first_row = process_index * self.local

    def __len__(self) -> int:
        return self._batches * self.local

    def __getitem__(self, index: int) -> int:
        step, row = divmod(index, self.local)
        return step * self._batch_size + self._first_row + row


def eval_batches(
    examples: Sequence,
    fn: Callable[[Any], dict[str, np.ndarray]],
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = NUM_THREADS,
    prefetch: int = PREFETCH,
) -> "Batches":
    """This process's rows of the batches of `examples`, in order, each example once.

    All processes yield equally many batches: the last ones are filled up with zeros. `mask` is
    True for real rows, `index` int32 [n] the place of each in `examples`: on devices rows lie in
    the order of the mesh, which need not be that of the processes. fn(example) -> dict of arrays;
    what it raises is raised here.

    Raises:
      ValueError: processes do not divide the batch, or there are no examples.
    """
    if batch_size % process_count:
        raise ValueError(f"batch_size {batch_size} does not divide over {process_count} processes")
    if not len(examples):
        raise ValueError("there are no examples")
    batches = -(-len(examples) // batch_size)
    positions = _Positions(batch_size, process_index, process_count, batches)
    # Rows that fill up have the shapes of a real one, be it of another process.
    zeros: dict[str, np.ndarray] = {}

    def like(made: dict[str, np.ndarray]) -> None:
        zeros.update({k: np.zeros_like(v) for k, v in made.items()})

    def row(position: int) -> dict[str, Any]:
        index = np.int32(position)
        if position < len(examples):
            made = fn(examples[position])
            if not zeros:
                like(made)
            return {**made, "index": index, "mask": np.True_}
        if not zeros:
            like(fn(examples[0]))
        return {**zeros, "index": index, "mask": np.False_}

    return Batches(positions, row, 0, num_threads, prefetch)


class Batches(Iterator[dict[str, np.ndarray]]):
    """Batches made ahead by threads. `close` ends them; so does the end of the `with` block.

    An exception in a row is raised by the `next` that would have returned its batch, and ends it.
    """

    def __init__(
        self,
        positions: _Positions,
        row: Callable,
        first_batch: int,
        num_threads: int,
        prefetch: int,
    ):
        local = positions.local
        chunk = max(size for size in range(1, min(local, CHUNK) + 1) if local % size == 0)

        def make(index: int) -> dict[str, np.ndarray]:
            rows = [row(positions[index * chunk + i]) for i in range(chunk)]
            return {key: np.stack([made[key] for made in rows]) for key in rows[0]}

        # Grain sees chunks alone: what it does for an element costs as much as a small image.
        chunks = grain.MapDataset.range(len(positions) // chunk).map(make)
        # Grain counts in elements, here chunks; its default of 500 could be too many for memory.
        waiting = max(prefetch * local // chunk, num_threads)
        options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=waiting)
        rest = chunks[first_batch * local // chunk :].to_iter_dataset(options)
        self._iterator = iter(rest.batch(local // chunk, batch_fn=_join))
        self._closed = False

    def __next__(self) -> dict[str, np.ndarray]:
        if self._closed:
            raise StopIteration
        try:
            return next(self._iterator)
        except BaseException:
            self.close()  # Grain would go on with the batch after the one that failed
            raise

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._iterator.close()

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *unused) -> None:
        self.close()


def _join(chunks: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {key: np.concatenate([chunk[key] for chunk in chunks]) for key in chunks[0]}
