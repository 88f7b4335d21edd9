"""The worker that measures other projects' input: started by `benchmarks.input`, in the peer's
Python except for the PIL path.

All of them decode to 224 x 224 pixels by threads and do without texts. They read images from
memory, except for webdataset and tf.data. Of this project it imports only modules that need the
standard library alone. `loss_worker` has the protocol; the measurement is [CPU seconds, seconds] of
an image.
"""

# pyright: reportMissingImports=false

import concurrent.futures
import importlib
import io
import itertools
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from benchmarks.input_case import CHUNK, RES, InputJob
from benchmarks.loss_worker import Failed, serve

MODULES = ("PIL", "open_clip", "torch", "torchvision", "webdataset", "tensorflow")


def seconds_per_image(images: int, work: Callable[[], Any]) -> list[float]:
    cpu, wall = time.process_time(), time.monotonic()
    work()
    return [(time.process_time() - cpu) / images, (time.monotonic() - wall) / images]


class Threads:
    """Prepares images by threads, in chunks: `transform` prepares one, `stack` joins a chunk."""

    def __init__(self, job: InputJob, transform: Callable[[bytes], Any], stack: Callable):
        self._transform, self._stack, self._batch = transform, stack, job.batch
        self._pool = concurrent.futures.ThreadPoolExecutor(job.threads)
        self.images: Iterator[bytes] = iter(())  # endless

    def measure(self, batches: int) -> list[float]:
        count = batches * self._batch
        return seconds_per_image(count, lambda: self._make(itertools.islice(self.images, count)))

    def _make(self, images: Iterable[bytes]) -> None:
        shapes = set(self._pool.map(self._chunk, _chunks(images)))
        if not shapes <= {(RES, RES, 3), (3, RES, RES)}:
            raise Failed(f"it makes images of {shapes}")

    def _chunk(self, images: list[bytes]) -> tuple[int, ...]:
        chunk = self._stack([self._transform(image) for image in images])
        return tuple(chunk.shape[1:])  # of an image; the copy that a batch takes is spared


def _chunks(images: Iterable[bytes]) -> Iterator[list[bytes]]:
    iterator = iter(images)
    while chunk := list(itertools.islice(iterator, CHUNK)):
        yield chunk


def pil(job: InputJob) -> Threads:
    """The steps of image_transform of open_clip's SigLIP models, up to the array."""
    import numpy as np
    from PIL import Image

    def transform(data: bytes) -> Any:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        return np.asarray(image.resize((RES, RES), Image.Resampling.BICUBIC))

    peer = Threads(job, transform, np.stack)
    peer.images = itertools.cycle(_read(job))
    return peer


def open_clip(job: InputJob) -> Threads:
    """open_clip's transform as it is: normalised float32."""
    return _open_clip(job, to_uint8=False)


def open_clip_uint8(job: InputJob) -> Threads:
    """open_clip's transform without its last two steps, ToTensor and Normalize."""
    return _open_clip(job, to_uint8=True)


def _open_clip(job: InputJob, to_uint8: bool) -> Threads:
    if job.import_first:
        importlib.import_module(job.import_first)
    import numpy as np
    import torch
    from open_clip.transform import image_transform
    from PIL import Image

    torch.set_num_threads(1)  # as in the workers of its loader
    # "squash" and (0.5, ...) are what its configs of SigLIP say; its default would resize to
    # 299 x 224 and cut off the sides.
    half = (0.5, 0.5, 0.5)
    whole = image_transform(RES, is_train=False, mean=half, std=half, resize_mode="squash")
    steps = whole.transforms[:-2]

    def transform(data: bytes) -> Any:
        image = Image.open(io.BytesIO(data))
        if not to_uint8:
            return whole(image)
        for step in steps:
            image = step(image)
        return np.asarray(image)

    peer = Threads(job, transform, np.stack if to_uint8 else torch.stack)
    peer.images = itertools.cycle(_read(job))
    return peer


def webdataset(job: InputJob) -> Threads:
    import webdataset as wds

    peer = pil(job)
    shards = sorted(str(path) for path in pathlib.Path(job.folder, "webdataset").glob("*.tar"))
    samples = wds.WebDataset(shards, shardshuffle=False).repeat()
    peer.images = (sample["jpg"] for sample in samples)
    return peer


class TfData:
    """Reads TFRecord files, decoded and resized by TensorFlow's own threads."""

    def __init__(self, job: InputJob):
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        import tensorflow as tf

        tf.config.set_visible_devices([], "GPU")
        self._tf, self._job = tf, job
        self._file = pathlib.Path(job.folder, "tfrecord", "train.tfrecord")
        if not self._file.exists():
            self._write()

    def measure(self, batches: int) -> list[float]:
        dataset = self._dataset(batches)  # traced here, which is not part of reading
        return seconds_per_image(batches * self._job.batch, lambda: self._read(dataset))

    def _read(self, dataset: Any) -> None:
        for batch in dataset:
            if batch.shape[1:] != (RES, RES, 3) or batch.dtype != self._tf.uint8:
                raise Failed(f"it makes {batch.dtype}{batch.shape}")

    def _dataset(self, batches: int) -> Any:
        tf, threads = self._tf, self._job.threads

        def decode(record: Any) -> Any:
            feature = {"image": tf.io.FixedLenFeature([], tf.string)}
            image = tf.io.parse_single_example(record, feature)["image"]
            pixels = tf.image.resize(tf.io.decode_jpeg(image, channels=3), (RES, RES))
            return tf.cast(pixels, tf.uint8)

        options = tf.data.Options()
        options.threading.private_threadpool_size = threads
        records = tf.data.TFRecordDataset(str(self._file)).repeat()
        images = records.take(batches * self._job.batch).map(decode, num_parallel_calls=threads)
        return images.batch(self._job.batch).prefetch(2).with_options(options)

    def _write(self) -> None:
        tf = self._tf
        self._file.parent.mkdir(exist_ok=True)
        part = self._file.with_suffix(".part")
        with tf.io.TFRecordWriter(str(part)) as writer:
            for image in _read(self._job):
                value = tf.train.Feature(bytes_list=tf.train.BytesList(value=[image]))
                features = tf.train.Features(feature={"image": value})
                writer.write(tf.train.Example(features=features).SerializeToString())
        part.replace(self._file)


def _read(job: InputJob) -> list[bytes]:
    return [path.read_bytes() for path in sorted(pathlib.Path(job.folder, "files").glob("*.jpg"))]


PEERS: dict[str, Callable[[InputJob], Threads | TfData]] = {
    "pil": pil,
    "open_clip": open_clip,
    "open_clip_uint8": open_clip_uint8,
    "webdataset": webdataset,
    "tf_data": TfData,
}


def make(job: InputJob) -> Threads | TfData:
    try:
        return PEERS[job.options["peer"]](job)
    except ImportError as error:
        raise Failed(f"not installed in {pathlib.Path(sys.executable).name}: {error}") from None


def versions() -> dict[str, str]:
    """Versions of the imported modules; their packages may have several names."""
    imported = {name: sys.modules[name] for name in MODULES if name in sys.modules}
    return {name: getattr(module, "__version__", "unknown") for name, module in imported.items()}


if __name__ == "__main__":
    peers: list[Threads | TfData] = []

    def prepare() -> dict[str, Any]:
        peers.append(make(InputJob(**json.loads(sys.argv[1]))))
        peers[0].measure(1)
        return {"versions": versions()}

    serve(prepare, lambda batches: peers[0].measure(batches))
