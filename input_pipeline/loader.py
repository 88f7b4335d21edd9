"""Batches in an order that is a function of (seed, step) alone.

Which example stands where depends on nothing else: not on threads, not on how many processes read
(each reads only its rows of the global batch), not on where reading began. So the position of a
run is one integer, the step, and starting at step 10^6 costs as much as starting at 0.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np

# One thread makes one batch, not one example: Python's cost per example of a hand-over between
# threads would exceed that of decoding a small image. Batches wait in the prefetch buffer.
NUM_THREADS = 8
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
) -> "Batches":
    """An endless iterator of this process's rows of the global batches from `start_step` on.

    Every epoch is a permutation of the source, a new one each; a batch may begin in one epoch and
    end in the next. Process p has rows [p n, (p+1) n) of each batch, n = batch_size /
    process_count. What is random in an example (its caption, its crop) comes from a generator
    seeded by (seed, global position).

    Args:
      source: __len__ and __getitem__(i) -> example; safe to call from threads.
      preprocess: see transforms.Preprocess.
      num_threads: batches that are made at a time.
      prefetch: batches that wait for the step.

    Yields:
      image uint8 [n, res, res, 3], text int32 [n, token_len], mask bool [n] (False: the image did
      not decode), position int64 [n] (global position in the stream of all epochs).

    Raises:
      ValueError: processes do not divide the batch, or there are no examples.
    """
    if batch_size % process_count:
        raise ValueError(f"batch_size {batch_size} does not divide over {process_count} processes")
    if not len(source):
        raise ValueError("the source has no examples")
    local = batch_size // process_count
    order = _Order(len(source), seed, batch_size, local, process_index * local)

    def example(position: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng((seed, position))
        made = preprocess.example(source[order.index(position)], rng)
        return {**made, "position": np.int64(position)}

    batches = grain.MapDataset.source(order).map(example).batch(local)
    return Batches(batches[start_step:], num_threads, prefetch)


class _Order:
    """Row of this process -> global position -> index in the source."""

    def __init__(self, examples: int, seed: int, batch_size: int, local: int, first_row: int):
        self._examples, self._seed = examples, seed
        self._batch_size, self._local, self._first_row = batch_size, local, first_row

    def __len__(self) -> int:
        return 2**40 // self._batch_size * self._local  # endless for every purpose

    def __getitem__(self, row: int) -> int:
        step, row = divmod(row, self._local)
        return step * self._batch_size + self._first_row + row

    def index(self, position: int) -> int:
        epoch, place = divmod(position, self._examples)
        last = self._examples - 1
        shuffled = grain.experimental.index_shuffle(
            place, max_index=last, seed=_epoch_seed(self._seed, epoch), rounds=4
        )
        return int(shuffled)


@functools.lru_cache(maxsize=16)
def _epoch_seed(seed: int, epoch: int) -> int:
    return int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])


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
    True for real rows. fn(example) -> dict of arrays; what it raises is raised here.

    Raises:
      ValueError: processes do not divide the batch, or there are no examples.
    """
    if batch_size % process_count:
        raise ValueError(f"batch_size {batch_size} does not divide over {process_count} processes")
    if not len(examples):
        raise ValueError("there are no examples")
    local = batch_size // process_count

    def batch(number: int) -> dict[str, np.ndarray]:
        first = number * batch_size + process_index * local
        # A process without real rows still needs their shapes: it makes the first example.
        real = range(first, min(first + local, len(examples))) or range(1)
        rows = [fn(examples[i]) for i in real]
        padding = local - len(rows)
        stacked = {}
        for key in rows[0]:
            column = np.stack([row[key] for row in rows])
            stacked[key] = np.pad(column, [(0, padding)] + [(0, 0)] * (column.ndim - 1))
        mask = first + np.arange(local) < len(examples)
        if first >= len(examples):
            stacked = {key: np.zeros_like(column) for key, column in stacked.items()}
        return {**stacked, "mask": mask}

    numbers = grain.MapDataset.range(-(-len(examples) // batch_size))
    return Batches(numbers.map(batch), num_threads, prefetch)


class Batches(Iterator[dict[str, np.ndarray]]):
    """Batches made ahead by threads. `close` ends them; so does the end of the `with` block."""

    def __init__(self, batches: grain.MapDataset, num_threads: int, prefetch: int):
        # Grain's default of 500 elements would be 500 batches here.
        options = grain.ReadOptions(
            num_threads=num_threads, prefetch_buffer_size=max(prefetch, num_threads)
        )
        self._iterator = iter(batches.to_iter_dataset(options))
        self._closed = False

    def __next__(self) -> dict[str, np.ndarray]:
        if self._closed:
            raise StopIteration
        return next(self._iterator)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._iterator.close()

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *unused) -> None:
        self.close()
