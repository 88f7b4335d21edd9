"""Which example stands where in the endless stream of a run: a function of (seed, position).

Nothing is kept between two positions, so the stream starts at position 10^9 as fast as at 0.
"""

import functools
import heapq
import threading
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

# Weights are resolved to 1 / period: the shortest of 10^4, 10^5, 10^6 that resolves the smallest.
LEAST_PERIOD, MOST_PERIOD = 10_000, 1_000_000


def order_of(source: Any, seed: int) -> Any:
    """Position -> index in the source: the source's own order, else epochs of permutations."""
    if hasattr(source, "order"):
        return source.order(seed)
    blocks = getattr(source, "blocks", None)
    if blocks is None:
        return Epochs(len(source), seed)
    return BlockEpochs(blocks, source.window, seed)


class Epochs:
    """Every epoch is a permutation of all examples, a new one each."""

    def __init__(self, examples: int, seed: int):
        self._examples, self._seed = examples, seed

    def __getitem__(self, position: int) -> int:
        epoch, place = divmod(position, self._examples)
        return _shuffled(place, self._examples, _seed_of(self._seed, epoch))


class BlockEpochs:
    """Epochs for files that are cheap to read a block at a time, such as row groups of Parquet.

    Every epoch is a permutation of the blocks; `window` of them, as they follow each other there,
    are permuted together. So a reader needs no more than two windows in memory, and examples of a
    block still meet those of window - 1 others, which change with the epoch.

    Args:
      blocks: [k + 1] starts of the blocks, then the number of examples.
      window: blocks that are mixed.
    """

    def __init__(self, blocks: np.ndarray, window: int, seed: int):
        self._starts = np.asarray(blocks, np.int64)
        self._window, self._seed = window, seed
        self._examples = int(self._starts[-1])
        self._lock = threading.Lock()
        # Two epochs: a batch may lie in both.
        self._laid_out = functools.lru_cache(maxsize=2)(self._lay_out)

    def __getitem__(self, position: int) -> int:
        epoch, place = divmod(position, self._examples)
        with self._lock:  # else every thread would lay out a new epoch
            blocks, ends = self._laid_out(epoch)
        window = int(np.searchsorted(ends[self._window - 1 :: self._window], place, "right"))
        first = window * self._window
        last = min(first + self._window, len(blocks))
        start = int(ends[first - 1]) if first else 0
        size = int(ends[last - 1]) - start
        place = start + _shuffled(place - start, size, _seed_of(self._seed, epoch, window))
        block = int(np.searchsorted(ends, place, "right"))
        before = int(ends[block - 1]) if block else 0
        return int(self._starts[blocks[block]]) + place - before

    def _lay_out(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The blocks of an epoch in their order, and the place where each of them ends."""
        blocks = np.random.default_rng((self._seed, epoch)).permutation(len(self._starts) - 1)
        return blocks, np.cumsum(np.diff(self._starts)[blocks])


class Pattern:
    """Which part of a mixture a position belongs to, and which position of that part it is.

    A period holds each part as often as its weight says (to 1 / period, but at least once), and
    then repeats. Within it the count of every part stays within one of its share, for any number
    of parts: the j-th position of a part with c of P lies between j P / c and (j + 1) P / c.

    Raises:
      ValueError: no weight is above 0, or one is below or not finite.
    """

    def __init__(self, weights: Sequence[float]):
        shares = np.asarray(weights, np.float64)
        if not len(shares) or shares.min() < 0 or not np.isfinite(shares).all() or not shares.any():
            raise ValueError("weights must be at least 0, and one of them above")
        shares /= shares.sum()
        self.period = LEAST_PERIOD
        while shares[shares > 0].min() * self.period < 1 and self.period < MOST_PERIOD:
            self.period *= 10
        exact = shares * self.period
        counts = np.maximum(np.floor(exact), shares > 0).astype(np.int64)
        # Largest remainders; equal ones in the order of the parts.
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
        """(part, position in the stream of that part)."""
        period, place = divmod(position, self.period)
        part = int(self._parts[place])
        return part, period * int(self.counts[part]) + int(self._ranks[place])


def _spread(counts: np.ndarray) -> np.ndarray:
    """Part of each place of a period: of the parts whose next window has opened, the one whose
    window closes first (Tijdeman, The chairman assignment problem, 1980)."""
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


FEW = 4096  # examples whose permutation is rather kept: the cipher is slow for small sets


def _shuffled(place: int, examples: int, seed: int) -> int:
    if examples <= FEW:
        return int(_permutation(examples, seed)[place])
    shuffled = grain.experimental.index_shuffle(place, max_index=examples - 1, seed=seed, rounds=4)
    return int(shuffled)


@functools.lru_cache(maxsize=256)
def _permutation(examples: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(examples).astype(np.int32)


@functools.lru_cache(maxsize=1024)
def _seed_of(*entropy: int) -> int:
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])
