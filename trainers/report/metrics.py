"""The log of a run: metrics.jsonl for programs, TensorBoard event files for people."""

import json
import math
import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore

from base import whole_file
from base.nested import flatten

Images = UInt8[np.ndarray, "n h w c"] | Float[np.ndarray, "n h w c"]


class MetricsWriter:
    """Writes <workdir>/metrics.jsonl and event files; the methods have the names of clu's writers.

    metrics.jsonl has one JSON object of numbers per event, {"step": 10, "loss": 9.5, ...}, flushed
    at once. JSON knows no NaN: numbers that are not finite become the strings "nan", "inf", "-inf",
    which Python's float() reads back. With is_main False nothing is written at all.
    """

    def __init__(self, workdir: str | pathlib.Path, *, is_main: bool = True) -> None:
        self._is_main = is_main
        self._path = pathlib.Path(workdir) / "metrics.jsonl"
        self._events: EventsWriter | None = None
        self._skip_from: int | None = None
        if is_main:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._drop_lines(lambda step: False)  # only a line that a kill cut off
            self._file = self._path.open("a", encoding="utf-8")

    def rewind(self, step: int) -> None:
        """Drops what an earlier life logged after `step`, where this one goes on (-1: all of it).

        Those steps run again, and log again. metrics.jsonl is replaced in one move, so that a crash
        leaves the old or the new one. Event files are never changed: a record makes TensorBoard
        skip what they have after `step`.
        """
        if self._is_main:
            self._file.close()
            self._drop_lines(lambda other: other > step)
            self._file = self._path.open("a", encoding="utf-8")
            self._skip_from = step + 1

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Writes numbers, or arrays of one number."""
        if self._is_main:
            numbers = {name: float(np.asarray(value)) for name, value in scalars.items()}
            self._append(step, {name: _jsonable(number) for name, number in numbers.items()})
            for name, number in numbers.items():
                if math.isfinite(number):  # tensorboardX prints a complaint into the progress row
                    self._add(step, summary.scalar(name, number))

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Writes texts, which TensorBoard shows as Markdown, to TensorBoard only."""
        if self._is_main:
            for name, text in texts.items():
                self._add(step, summary.text(name, text))

    def write_images(self, step: int, images: Mapping[str, Images]) -> None:
        """Writes batches of images, uint8 or floats in [0, 1], to TensorBoard only."""
        if self._is_main:
            for name, batch in images.items():
                self._add(step, summary.image(name, np.asarray(batch), dataformats="NHWC"))

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Writes the config for TensorBoard's table of runs; nested keys become 'a.b'."""
        if self._is_main:
            flat = {
                name: value if isinstance(value, bool | int | float) else str(value)
                for name, value in flatten(hparams).items()
            }
            experiment, start, _ = summary.hparams(flat, {})
            for part in (experiment, start):  # the third would say that the run has ended
                self._add(0, part)

    def flush(self) -> None:
        """Forces all to disk, so that a power cut loses nothing."""
        if self._is_main:
            self._file.flush()
            os.fsync(self._file.fileno())
            if self._events is not None:
                self._events.flush()  # fsync included

    def close(self) -> None:
        if self._is_main and not self._file.closed:
            self.flush()
            self._file.close()
            if self._events is not None:
                self._events.close()

    def _append(self, step: int, event: Mapping[str, Any]) -> None:
        # One write per line: a kill leaves whole lines but for the last, which _drop_lines cuts.
        self._file.write(json.dumps({"step": int(step), **event}) + "\n")
        self._file.flush()

    def _add(self, step: int, part: Any) -> None:
        # Not tensorboardX.SummaryWriter: its flush() does not wait for the events in its queue.
        if self._events is None:  # only now, as its first record is the step of rewind()
            # By default the name is unique to a second only; a restart within it would overwrite.
            self._events = EventsWriter(
                str(self._path.parent / "events"), filename_suffix=f".{time.time_ns()}"
            )
            if (first := self._skip_from) is not None:
                self._event(step=first, session_log=SessionLog(status=SessionLog.START))
        self._event(step=step, summary=part)

    def _event(self, **fields: Any) -> None:
        assert self._events is not None
        self._events.write_event(Event(wall_time=time.time(), **fields))

    def _drop_lines(self, drop: Any) -> None:
        """Rewrites the file with its complete lines, without those whose step `drop` holds for."""
        if not self._path.exists():
            return
        with self._path.open("rb") as old, whole_file.create(self._path) as new:
            for line in old:
                step = _step_of(line)
                if step is not None and not drop(step):
                    new.write(line)


def _step_of(line: bytes) -> int | None:
    """The step of a line; None where a kill or a power cut left it incomplete."""
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError):
        return None


def _jsonable(number: float) -> float | str:
    return number if math.isfinite(number) else str(number)
