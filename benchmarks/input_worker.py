"""The worker that measures this project's input, and the bare decoder: started by
`benchmarks.input`. `loss_worker` has the protocol; the measurement is [CPU seconds, seconds] of an
image.
"""

import glob
import json
import pathlib
import sys
import threading
import time
from typing import Any

import cv2
import numpy as np
import simplejpeg

from benchmarks.input_case import PATHS, RES, SOURCES, TOKEN_LEN, InputJob
from benchmarks.loss_worker import Failed, serve
from input_pipeline.loader import Batches, train_batches
from input_pipeline.sources.in_memory import Memory
from input_pipeline.sources.registry import SOURCES as CLASSES
from input_pipeline.transforms.preprocess import make_preprocess
from input_pipeline.transforms.tokenizer import Bytes
from trainers.machine.host_memory import keep_freed_memory


class CpuClock:
    """Measures CPU seconds of this process, all its threads included, and seconds."""

    def __init__(self):
        self._cpu, self._wall = time.process_time(), time.monotonic()

    def per(self, images: int) -> list[float]:
        """[CPU seconds, seconds] of each of the images since the start."""
        cpu, wall = time.process_time(), time.monotonic()
        return [(cpu - self._cpu) / images, (wall - self._wall) / images]


class CountingPreprocess:
    """A Preprocess that counts its rows.

    Threads work ahead of the batches that are asked for, so the images of a stretch of time are
    those that were prepared in it, not those that were handed over.
    """

    def __init__(self, preprocess: Any):
        self.tokenizer, self.rows = preprocess.tokenizer, 0
        self._preprocess, self._lock = preprocess, threading.Lock()

    def example(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        row = self._preprocess.example(example, rng)
        with self._lock:
            self.rows += 1
        return row


class Loader:
    """The whole way: read, decode, resize, tokenize, batch, by input_pipeline.loader."""

    def __init__(self, job: InputJob):
        keep_freed_memory()  # as main.py does
        self._batch, self._threads, self._step = job.batch, job.threads, 0
        self._source = open_source(pathlib.Path(job.folder), job.options["source"])
        self._preprocess = make_preprocess(
            Bytes(), res=RES, token_len=TOKEN_LEN, image=job.options["image"]
        )

    def stream(self, counted: CountingPreprocess) -> Batches:
        return train_batches(
            self._source,
            counted,
            batch_size=self._batch,
            seed=0,
            start_step=self._step,
            num_threads=self._threads,
        )

    def measure(self, batches: int) -> list[float]:
        """Seconds of an image, over the rows that threads prepare after the first batch."""
        counted = CountingPreprocess(self._preprocess)
        with self.stream(counted) as stream:
            self._next(stream)
            clock, before = CpuClock(), counted.rows
            while counted.rows < before + batches * self._batch:
                self._next(stream)
            seconds = clock.per(counted.rows - before)
        _settle(counted)  # the next system has the cores to itself
        return seconds

    def _next(self, stream: Batches) -> None:
        batch = next(stream)
        self._step += 1  # the next round goes on with other images
        if not batch["mask"].all():
            raise Failed("an image cannot be read")


class Bare:
    """The bare decoder: one thread in a loop, from memory."""

    def __init__(self, job: InputJob):
        keep_freed_memory()
        self._images, self._batch = read_images(pathlib.Path(job.folder)), job.batch
        self._resize = job.options["resize"]
        self._at = 0
        cv2.setNumThreads(0)

    def measure(self, batches: int) -> list[float]:
        count, clock = batches * self._batch, CpuClock()
        for i in range(self._at, self._at + count):
            pixels = simplejpeg.decode_jpeg(self._images[i % len(self._images)], "RGB")
            if self._resize:
                cv2.resize(pixels, (RES, RES), interpolation=cv2.INTER_LINEAR)
        self._at += count
        return clock.per(count)


def open_source(folder: pathlib.Path, name: str) -> Any:
    """One of input_case.SOURCES; '': all images in memory."""
    if not name:
        images = read_images(folder)
        return Memory(images=images, texts=[row["caption"] for row in _rows(folder)])
    source, settings = SOURCES[name]
    paths = {key: _path(folder, settings[key]) for key in PATHS if key in settings}
    return CLASSES[source](**{**settings, **paths})


def _path(folder: pathlib.Path, name: str) -> str:
    # The user's folder is a name, not a pattern.
    return f"{glob.escape(str(folder))}/{name}" if "*" in name else str(folder / name)


def read_images(folder: pathlib.Path) -> list[bytes]:
    return [(folder / "files" / row["image"]).read_bytes() for row in _rows(folder)]


def _rows(folder: pathlib.Path) -> list[dict[str, str]]:
    return [
        json.loads(line) for line in (folder / "files" / "pairs.jsonl").read_text().splitlines()
    ]


def _settle(counted: CountingPreprocess) -> None:
    """Waits until the threads have finished their work ahead."""
    before = -1
    while counted.rows != before:
        before = counted.rows
        time.sleep(0.1)


if __name__ == "__main__":
    systems: list[Loader | Bare] = []

    def prepare() -> dict[str, Any]:
        job = InputJob(**json.loads(sys.argv[1]))
        systems.append(Bare(job) if "resize" in job.options else Loader(job))
        systems[0].measure(1)
        return {}

    serve(prepare, lambda batches: systems[0].measure(batches))
