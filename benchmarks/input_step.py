"""The worker that trains on images in memory and on images from files: started by
`benchmarks.input --model`. `loss_worker` has the protocol.

Both feeds go through the same compiled step, that of benchmarks.train, in one process.
"""

import collections
import dataclasses
import json
import pathlib
import sys
import time
from typing import Any

from benchmarks.input_case import FAST
from benchmarks.input_worker import Clock, Counted, open_source
from benchmarks.loss_worker import Failed, serve
from benchmarks.train_case import Case
from benchmarks.train_ours import Ours
from input_pipeline.loader import train_batches
from input_pipeline.transforms.preprocess import make_preprocess
from input_pipeline.transforms.tokenizer import Bytes
from siglip.sharding import to_device
from trainers.loop import IN_FLIGHT

SOURCE = "webdataset"
UNTIMED = 2  # steps: the first batch comes, then threads work ahead as they do later
WARM_UP = 3  # steps of compilation


@dataclasses.dataclass(frozen=True)
class StepJob:
    """What to train, as train_case.Case; the folder of the data; threads of the loader."""

    case: dict[str, Any]
    folder: str
    threads: int


class Fed:
    def __init__(self, job: StepJob):
        self.case, self._threads = Case(**job.case), job.threads
        self._ours, self._round, self._step = Ours(self.case), 0, 0
        self._source = open_source(pathlib.Path(job.folder), SOURCE)
        self._preprocess = make_preprocess(
            Bytes(), res=self.case.res, token_len=self.case.token_len, image=FAST
        )

    def prepare(self) -> dict[str, Any]:
        import jax

        self._train(self._in_memory(), WARM_UP)
        return {
            "loader_s": self._loader_alone(),
            "devices": jax.device_count(),
            "device_kind": jax.devices()[0].device_kind,
        }

    def measure(self, steps: int) -> list[float]:
        """Seconds of a step from memory, of a step from files, and of its wait for the batch."""
        self._round += 1
        in_memory: float = 0
        for from_files in (self._round % 2 == 0, self._round % 2 == 1):
            if not from_files:
                in_memory, _ = self._train(self._in_memory(), steps)
                continue
            with self._stream(Counted(self._preprocess)) as stream:
                real, waited = self._train(stream, steps)
            self._step += UNTIMED + steps
        return [in_memory, real, waited]

    def _in_memory(self):
        while True:
            yield self._ours.host

    def _stream(self, counted: Counted):
        return train_batches(
            self._source,
            counted,
            batch_size=self.case.batch,
            seed=0,
            start_step=self._step,
            num_threads=self._threads,
        )

    def _train(self, batches, steps: int) -> tuple[float, float]:
        """Seconds of a step and of its wait, as trainers.loop makes steps: some are in flight."""
        import jax

        ours, waited, begin = self._ours, 0.0, 0.0
        in_flight = collections.deque()
        for i in range(UNTIMED + steps):
            if i == UNTIMED:
                jax.block_until_ready(ours.state)
                waited, begin = 0.0, time.monotonic()
            asked = time.monotonic()
            batch = next(batches)
            waited += time.monotonic() - asked
            if not batch["mask"].all():
                raise Failed("an image cannot be read")
            batch = to_device({key: batch[key] for key in ours.host}, ours.mesh)
            ours.state, ours.tally, metrics = ours.update(ours.state, ours.tally, batch)
            in_flight.append(metrics["loss"])
            if len(in_flight) > IN_FLIGHT:
                jax.block_until_ready(in_flight.popleft())
        jax.block_until_ready(ours.state)
        return (time.monotonic() - begin) / steps, waited / steps

    def _loader_alone(self) -> float:
        """Seconds of a batch when nothing else runs."""
        counted, images = Counted(self._preprocess), max(256, self.case.batch)
        with self._stream(counted) as stream:
            next(stream)
            clock, before = Clock(), counted.made
            while counted.made < before + images:
                next(stream)
            _, wall = clock.per(counted.made - before)
        return wall * self.case.batch


if __name__ == "__main__":
    fed: list[Fed] = []

    def prepare() -> dict[str, Any]:
        fed.append(Fed(StepJob(**json.loads(sys.argv[1]))))
        return fed[0].prepare()

    serve(prepare, lambda steps: fed[0].measure(steps))
