"""The order of examples in the endless stream of a run, as a function of (seed, position).

No state is kept between positions, so the stream starts at position 10^9 as fast as at 0.
"""

import functools
import heapq
import threading
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

# Weights are rounded to multiples of 1 / period, with the shortest of 10^4, 10^5, 10^6 in which
# the smallest weight is not rounded to 0.
MIN_PERIOD, MAX_PERIOD = 10_000, 1_000_000


def order_of(source: Any, seed: int) -> Any:
    """Maps a position to an index in the source: by its own order, or by permuted epochs."""
    if hasattr(source, "order"):
        return source.order(seed)
    blocks = getattr(source, "blocks", None)
    if blocks is None:
        return Epochs(len(source), seed)
    return BlockEpochs(blocks, source.window, seed)


class Epochs:
    """Epochs, each a new permutation of all examples."""

    def __init__(self, examples: int, seed: int):
        self._examples, self._seed = examples, seed

    def __getitem__(self, position: int) -> int:
        epoch, index = divmod(position, self._examples)
        return _permuted(index, self._examples, _derive_seed(self._seed, epoch))


class BlockEpochs:
    """Epochs for files that are cheap to read a block at a time, such as row groups of Parquet.

    An epoch permutes the blocks, cuts them into windows of `window` blocks, and permutes the
    examples of each window. So a reader has at most two windows in memory, and examples of a
    block are mixed with those of window - 1 other blocks, which differ between epochs.

    Args:
      blocks: int [k + 1], the first index of each block, then the number of examples.
      window: number of blocks whose examples are permuted together.
    """

    def __init__(self, blocks: np.ndarray, window: int, seed: int):
        self._starts = np.asarray(blocks, np.int64)
        self._window, self._seed = window, seed
        self._examples = int(self._starts[-1])
        self._lock = threading.Lock()
        # Two epochs, because a batch may span both.
        self._layout = functools.lru_cache(maxsize=2)(self._make_layout)

    def __getitem__(self, position: int) -> int:
        epoch, index = divmod(position, self._examples)
        with self._lock:  # without it every thread would compute a new epoch's layout
            blocks, ends = self._layout(epoch)
        window = int(np.searchsorted(ends[self._window - 1 :: self._window], index, "right"))
        first = window * self._window
        last = min(first + self._window, len(blocks))
        start = int(ends[first - 1]) if first else 0
        size = int(ends[last - 1]) - start
        index = start + _permuted(index - start, size, _derive_seed(self._seed, epoch, window))
        block = int(np.searchsorted(ends, index, "right"))
        before = int(ends[block - 1]) if block else 0
        return int(self._starts[blocks[block]]) + index - before

    def _make_layout(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Blocks of an epoch in their order [k], and the number of examples up to each end."""
        blocks = np.random.default_rng((self._seed, epoch)).permutation(len(self._starts) - 1)
        return blocks, np.cumsum(np.diff(self._starts)[blocks])


class Pattern:
    """Maps a position of a mixture to a part and the position in that part's own stream.

    The pattern repeats after `period` positions. In a period each part comes as often as its
    weight says, rounded to 1 / period but at least once. Among the first n positions the count of
    a part never differs by 1 or more from its share, for any number of parts: the j-th of c
    occurrences in a period P lies between j P / c and (j + 1) P / c.

    Raises:
      ValueError: no weight is above 0, or one is negative or not finite.
    """

    def __init__(self, weights: Sequence[float]):
        shares = np.asarray(weights, np.float64)
        if not len(shares) or shares.min() < 0 or not np.isfinite(shares).all() or not shares.any():
            raise ValueError("weights must be at least 0, and one of them above")
        shares /= shares.sum()
        self.period = MIN_PERIOD
        while shares[shares > 0].min() * self.period < 1 and self.period < MAX_PERIOD:
            self.period *= 10
        exact = shares * self.period
        counts = np.maximum(np.floor(exact), shares > 0).astype(np.int64)
        # Largest remainder method; ties go to the earlier part.
        spare = self.period - int(counts.sum())
        for part in np.argsort(counts - exact, kind="stable")[: max(spare, 0)]:
            counts[part] += 1
        counts[np.argmax(counts)] += min(spare, 0)
        self.counts = counts
        self._parts = _spread(counts)
        self._ranks = np.zeros(self.period, np.int64)
        for part, count in enumerate(counts):
            self._ranks[self._parts == part] = np.arange(count)

    def __getitem__(self, position: int) -> tuple[int, int]:
        """(part, position in its stream)."""
        period, place = divmod(position, self.period)
        part = int(self._parts[place])
        return part, period * int(self.counts[part]) + int(self._ranks[place])


def _spread(counts: np.ndarray) -> np.ndarray:
    """Part at each place of a period, int [period].

    Each occurrence of a part has a window of places that it may take. A place goes to the part
    with an open window that closes first (Tijdeman, The chairman assignment problem, 1980).
    """
    period = int(counts.sum())
    opening: list[tuple[float, int]] = [
        (0, part) for part, count in enumerate(counts.tolist()) if count
    ]
    closing: list[tuple[float, int]] = []
    done = [0] * len(counts)
    parts = np.empty(period, np.int64)
    for place in range(period):
        while opening and opening[0][0] <= place:
            _, part = heapq.heappop(opening)
            heapq.heappush(closing, ((done[part] + 1) * period / int(counts[part]), part))
        _, part = heapq.heappop(closing)
        parts[place] = part
        done[part] += 1
        if done[part] < counts[part]:
            heapq.heappush(opening, (done[part] * period / int(counts[part]), part))
    return parts


# Up to this many examples the permutation is stored: the cipher is slow for small sets.
MAX_STORED = 4096


def _permuted(place: int, examples: int, seed: int) -> int:
    """Element `place` of a permutation of range(examples)."""
    if examples <= MAX_STORED:
        return int(_permutation(examples, seed)[place])
    shuffled = grain.experimental.index_shuffle(place, max_index=examples - 1, seed=seed, rounds=4)
    return int(shuffled)


@functools.lru_cache(maxsize=256)
def _permutation(examples: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(examples).astype(np.int32)


@functools.lru_cache(maxsize=1024)
def _derive_seed(*entropy: int) -> int:
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])
