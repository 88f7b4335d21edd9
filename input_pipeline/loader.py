"""Batches in an order that is a function of (seed, step) alone.

Neither the number of threads, nor the number of processes (each reads only its rows of the global
batch), nor the step where reading began changes which example is in which row. So the position of
a run is one integer, the step, and starting at step 10^6 costs as much as starting at 0.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import cv2
import grain
import numpy as np

from base.errors import UserError
from input_pipeline.bad_examples import BadExamples
from input_pipeline.errors import KINDS, BadExample
from input_pipeline.mixture import identity
from input_pipeline.order import order_of
from input_pipeline.transforms.corrupt import Corruption

# A thread makes CHUNK rows at a time: not a whole batch, not one row. With whole batches all
# threads finish together, so the first batch takes num_threads times as long and num_threads
# batches are in memory; with single rows the hand-over between threads costs more than decoding a
# small image. On 2 cores, for whole batches, chunks, single rows: 256 photos to 224 px with 8
# threads: first batch after 3.0, 0.8, 0.8 s, 500, 165, 100 MB of memory, 760, 700, 740 images per
# CPU second; 512 images of 32 px with 2 threads: 5,500, 7,000, 4,600 images/s.
CHUNK = 32
NUM_THREADS = 8  # with more, the Python code of a row, which holds the GIL, is the limit
PREFETCH = 4


@runtime_checkable
class Examples(Protocol):
    """A source, a list or an array: anything that has a length and examples by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> Any: ...


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
    bad: BadExamples | None = None,
) -> "Batches":
    """An endless iterator of this process's rows of the global batches from `start_step` on.

    Every epoch is a new permutation of the source (order.py: also for files that are read in
    blocks, and for mixtures); a batch may begin in one epoch and end in the next. Process p has
    rows [p n, (p+1) n) of each batch, n = batch_size / process_count. The random choices of an
    example (its caption, its crop) come from a generator seeded by (seed, global position).

    A bad example becomes a row of zeros in its place, so that it does not change the order of the
    others: one damaged file among millions must not end a run.

    Args:
      source: a sequence of examples, see input_pipeline/sources.
      preprocess: a transforms.preprocess.Preprocess.
      num_threads: threads, each of which makes a chunk of a batch.
      prefetch: batches that are made ahead of the step.
      corrupt: steps of config.input.corrupt, see transforms/corrupt.py.
      bad: the BadExamples that are recorded into.

    Yields:
      image uint8 [n, res, res, 3], text int32 [n, token_len], mask bool [n] (False: a bad
      example), bad uint8 [n] (0: good, else 1 + the place of its kind in KINDS), position int64
      [n] (global position in the stream of all epochs), index int32 [n] (identity of the example
      in the source, modulo 2**31).

    Raises:
      ValueError: processes do not divide the batch, or there are no examples.
      UserError: none of the examples tried at the start can be used. `next` raises what the
        source raises.
    """
    positions = _Positions(batch_size, process_index, process_count, 2**40 // batch_size)
    if not len(source):
        raise ValueError("the source has no examples")
    bad = BadExamples() if bad is None else bad
    order = order_of(source, seed)
    corruption = Corruption(corrupt, seed=seed, batch_size=batch_size)
    zeros = {key: np.zeros_like(value) for key, value in _sample(source, preprocess).items()}

    def preprocessed(position: int, index: int) -> dict[str, Any]:
        example: dict[str, Any] = {}
        try:
            example = source[index]
            fields = preprocess.example(example, np.random.default_rng((seed, position)))
            if (text_position := corruption.text_position(position)) != position:
                index, example = order[text_position], {}
                example = source[index]
                # The generator of its own row draws the caption that its own row has.
                text_rng = np.random.default_rng((seed, text_position))
                fields["text"] = preprocess.text(preprocess.caption(example, text_rng))
        except BadExample as error:
            bad.record(error, example.get("id", f"[{index}]"), example.get("shard", ""))
            return {**zeros, "mask": np.False_, "bad": np.uint8(1 + KINDS.index(error.kind))}
        for key, like in zeros.items():
            if fields[key].shape != like.shape or fields[key].dtype != like.dtype:
                raise UserError(
                    f"{key} of {example['id']} is {fields[key].dtype}{list(fields[key].shape)}, "
                    f"that of another example {like.dtype}{list(like.shape)}; "
                    "a batch needs equal ones"
                )
        if corrupt:
            vocab_size = preprocess.tokenizer.vocab_size
            fields["image"] = corruption.corrupt_image(fields["image"], position)
            fields["text"] = corruption.corrupt_text(fields["text"], text_position, vocab_size)
        return {**fields, "mask": np.True_, "bad": np.uint8(0)}

    def row(position: int) -> dict[str, Any]:
        index = order[position]
        return {
            **preprocessed(position, index),
            "position": np.int64(position),
            "index": np.int32(identity(source, index) % 2**31),
        }

    return Batches(positions, row, start_step, num_threads, prefetch)


TRIES = 64  # examples that are tried at the start of training


def _sample(source: Any, preprocess: Any) -> dict[str, Any]:
    """The row of some good example, whose shapes all others must have.

    Tries examples spread over the whole source.

    Raises:
      UserError: all of them are bad, so a run would see hardly anything else.
    """
    bad, tries = BadExamples(), min(TRIES, len(source))
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
    """Maps the k-th row of this process to its position in the stream of global batches."""

    def __init__(self, batch_size: int, process_index: int, process_count: int, batches: int):
        if batch_size % process_count:
            raise ValueError(
                f"batch_size {batch_size} does not divide over {process_count} processes"
            )
        self._batch_size, self._batches = batch_size, batches
        self.local = batch_size // process_count  # rows of a batch in this process
        self._first_row = process_index * self.local

    def __len__(self) -> int:
        return self._batches * self.local

    def __getitem__(self, index: int) -> int:
        step, row = divmod(index, self.local)
        return step * self._batch_size + self._first_row + row


def eval_batches(
    examples: Examples,
    fn: Callable[[Any], dict[str, np.ndarray]],
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = NUM_THREADS,
    prefetch: int = PREFETCH,
) -> "Batches":
    """This process's rows of the batches of `examples`, in order, each example once.

    All processes yield equally many batches; missing rows of the last ones are zeros. fn(example)
    returns a dict of arrays; to it are added `mask` (True: a real row) and `index` int32 [n], the
    example's place in `examples`: on devices rows lie in the order of the mesh, which need not be
    that of the processes. `next` raises what fn raises.

    Raises:
      ValueError: processes do not divide the batch, or there are no examples.
    """
    if not len(examples):
        raise ValueError("there are no examples")
    batches = -(-len(examples) // batch_size)
    positions = _Positions(batch_size, process_index, process_count, batches)
    # Padding rows have the shapes of a real row, which may belong to another process.
    zeros: dict[str, np.ndarray] = {}

    def set_zeros(fields: dict[str, np.ndarray]) -> None:
        zeros.update({key: np.zeros_like(value) for key, value in fields.items()})

    def row(position: int) -> dict[str, Any]:
        index = np.int32(position)
        if position < len(examples):
            fields = fn(examples[position])
            if not zeros:
                set_zeros(fields)
            return {**fields, "index": index, "mask": np.True_}
        if not zeros:
            set_zeros(fn(examples[0]))
        return {**zeros, "index": index, "mask": np.False_}

    return Batches(positions, row, 0, num_threads, prefetch)


class Batches(Iterator[dict[str, np.ndarray]]):
    """Batches made ahead by threads, until `close` or the end of the `with` block.

    An exception in a row is raised by the `next` that would have returned its batch; the iterator
    then has ended.

    Turns OpenCV's own threads off in this process: they would compete with the loader's for the
    same cores.
    """

    def __init__(
        self,
        positions: _Positions,
        row: Callable,
        first_batch: int,
        num_threads: int,
        prefetch: int,
    ):
        cv2.setNumThreads(0)
        local = positions.local
        chunk = max(size for size in range(1, min(local, CHUNK) + 1) if local % size == 0)

        def make_chunk(index: int) -> dict[str, np.ndarray]:
            rows = [row(positions[index * chunk + i]) for i in range(chunk)]
            return {key: np.stack([fields[key] for fields in rows]) for key in rows[0]}

        # Chunks are Grain's elements: its overhead for an element costs as much as a small image.
        chunks = grain.MapDataset.range(len(positions) // chunk).map(make_chunk)
        # Grain's buffer counts chunks; its default of 500 could be too many for memory.
        buffer_size = max(prefetch * local // chunk, num_threads)
        options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=buffer_size)
        remaining = chunks[first_batch * local // chunk :].to_iter_dataset(options)
        self._iterator = iter(remaining.batch(local // chunk, batch_fn=_concatenate))
        self._closed = False

    def __next__(self) -> dict[str, np.ndarray]:
        if self._closed:
            raise StopIteration
        try:
            return next(self._iterator)
        except BaseException:
            self.close()  # Grain would continue with the batch after the failed one
            raise

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._iterator.close()

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *unused) -> None:
        self.close()


def _concatenate(chunks: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {key: np.concatenate([chunk[key] for chunk in chunks]) for key in chunks[0]}
