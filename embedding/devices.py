"""Batches on the devices, and shards that wait for their results."""

import collections
from collections.abc import Callable

import numpy as np
from jaxtyping import Array

from base.errors import UserError
from embedding.reading import PendingRow
from embedding.store import ShardWriter

MAX_IN_FLIGHT = 2  # batches on the devices while the host makes the next


class DeviceQueue:
    """Batches on their way through the devices, in order, and what to do with each result."""

    def __init__(self, embed: Callable[[dict[str, np.ndarray]], Array]):
        self._embed = embed
        self._waiting: collections.deque[tuple[Array | None, Callable]] = collections.deque()
        self._in_flight = 0

    def start(self, batch: dict[str, np.ndarray], then: Callable[[np.ndarray], None]) -> None:
        """Starts a batch; `then` gets its embeddings [batch_size, d]."""
        self._waiting.append((self._embed(batch), then))
        self._in_flight += 1
        self.drain(MAX_IN_FLIGHT)

    def after(self, then: Callable[[], None]) -> None:
        """Calls `then` when all that was started before is done; no device waits for it."""
        self._waiting.append((None, then))

    def drain(self, most: int) -> None:
        """Waits until at most `most` batches are in flight; with 0 also for what comes after."""
        while self._waiting and (self._in_flight > most or most == 0):
            z, then = self._waiting.popleft()
            if z is None:
                then()
            else:
                self._in_flight -= 1
                then(np.array(z))


class ShardEmbedder:
    """A shard whose images and texts go through the devices and then into its files.

    An example has any number of texts, so texts are gathered into batches of their own.
    """

    def __init__(self, writer: ShardWriter, queue: DeviceQueue, batch_size: int, dtype: str):
        self._writer, self._queue = writer, queue
        self._batch_size, self._dtype = batch_size, dtype
        self._tokens: list[np.ndarray] = []  # of texts that no batch has yet

    def add(self, rows: list[tuple[int, PendingRow]], images: dict[str, np.ndarray]) -> None:
        """Takes the next rows, with their indices in the source and a batch of their images."""
        for index, row in rows:
            self._writer.row(
                index=index,
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
            self._queue.start(images, lambda z: self._write("image", z, good))
        while len(self._tokens) >= self._batch_size:
            self._start_texts()

    def end(self) -> None:
        """Starts the last texts; the files get their names once all results are there."""
        if self._tokens:
            self._start_texts()
        self._queue.after(self._writer.finish)

    def _start_texts(self) -> None:
        tokens = self._tokens[: self._batch_size]
        del self._tokens[: self._batch_size]
        batch = np.zeros((self._batch_size, *tokens[0].shape), tokens[0].dtype)
        batch[: len(tokens)] = tokens
        good = np.ones(len(tokens), bool)
        self._queue.start({"text": batch}, lambda z: self._write("text", z, good))

    def _write(self, kind: str, z: np.ndarray, good: np.ndarray) -> None:
        z = z[: len(good)]
        if broken := int((~np.isfinite(z[good]).all(axis=1)).sum()):
            raise UserError(
                f"{broken} of {int(good.sum())} embeddings of kind {kind} are not finite: these "
                "parameters are broken, embed with others"
            )
        z[~good] = 0
        self._writer.append(kind, z.astype(self._dtype))
