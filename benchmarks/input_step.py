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
from benchmarks.input_worker import CountingPreprocess, CpuClock, open_source
from benchmarks.loss_worker import Failed, serve
from benchmarks.train_case import TrainCase
from benchmarks.train_ours import Ours
from input_pipeline.loader import train_batches
from input_pipeline.transforms.preprocess import make_preprocess
from input_pipeline.transforms.tokenizer import Bytes
from siglip.sharding import to_device
from trainers.loop import IN_FLIGHT

SOURCE = "webdataset"
UNTIMED = 2  # steps until the threads of the loader work ahead as they do later
WARM_UP = 3  # steps of compilation


@dataclasses.dataclass(frozen=True)
class StepJob:
    """The job of this worker: a TrainCase as a dict, the data, and the loader's threads."""

    case: dict[str, Any]
    folder: str
    threads: int


class StepBenchmark:
    """The training step of a case, on a batch in memory and on batches from files."""

    def __init__(self, job: StepJob):
        self.case, self._threads = TrainCase(**job.case), job.threads
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
        from_memory: float = 0
        for from_files in (self._round % 2 == 0, self._round % 2 == 1):
            if not from_files:
                from_memory, _ = self._train(self._in_memory(), steps)
                continue
            with self._stream(CountingPreprocess(self._preprocess)) as stream:
                from_disk, waited = self._train(stream, steps)
            self._step += UNTIMED + steps
        return [from_memory, from_disk, waited]

    def _in_memory(self):
        while True:
            yield self._ours.host

    def _stream(self, counted: CountingPreprocess):
        return train_batches(
            self._source,
            counted,
            batch_size=self.case.batch,
            seed=0,
            start_step=self._step,
            num_threads=self._threads,
        )

    def _train(self, batches, steps: int) -> tuple[float, float]:
        """Seconds of a step and of its wait; some steps are in flight, as in trainers.loop."""
        import jax

        ours, waited, begin = self._ours, 0.0, 0.0
        in_flight = collections.deque()
        for i in range(UNTIMED + steps):
            if i == UNTIMED:
                jax.block_until_ready(ours.state)
                waited, begin = 0.0, time.monotonic()
            requested = time.monotonic()
            batch = next(batches)
            waited += time.monotonic() - requested
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
        counted, images = CountingPreprocess(self._preprocess), max(256, self.case.batch)
        with self._stream(counted) as stream:
            next(stream)
            clock, before = CpuClock(), counted.rows
            while counted.rows < before + images:
                next(stream)
            _, wall = clock.per(counted.rows - before)
        return wall * self.case.batch


if __name__ == "__main__":
    step_benchmarks: list[StepBenchmark] = []

    def prepare() -> dict[str, Any]:
        step_benchmarks.append(StepBenchmark(StepJob(**json.loads(sys.argv[1]))))
        return step_benchmarks[0].prepare()

    serve(prepare, lambda steps: step_benchmarks[0].measure(steps))
