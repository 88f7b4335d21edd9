"""Runs each system under measurement in a process, so that rounds can alternate between them.

The benchmark sends a command a line, and the worker answers with a line of JSON:
  prepare    -> {"memory_bytes", "errors", "loss", ...}: everything is compiled, and ran once
  measure k  -> {"seconds": [k numbers]}
  quit
A worker that cannot go on answers {"failed": why}. The standard library alone, because workers of
other environments use it too.
"""

import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]


class Failed(Exception):
    """A worker could not go on; the text is why, in one line."""


@dataclasses.dataclass(frozen=True)
class LossJob:
    """The job of a worker, which gets it as JSON on its command line.

    `options` choose one of the worker's systems. `platform` is "cpu" or "gpu". `folder` has
    the inputs and, where there is one, the reference.
    """

    options: dict[str, Any]
    devices: int
    n: int
    d: int
    dtype: str
    platform: str
    folder: str


def serve(prepare: Callable[[], dict], measure: Callable[[int], list[float]]) -> None:
    """Answers commands from standard input until it ends. What libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(content: dict) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    for line in sys.stdin:
        command, *arguments = line.split()
        if command == "quit":
            return
        try:
            if command == "prepare":
                answer(prepare())
            else:
                answer({"seconds": measure(int(arguments[0]))})
        except Exception as error:
            answer({"failed": why(error)})


def why(error: BaseException) -> str:
    """An exception in one line of at most 200 characters."""
    text = " ".join(str(error).split())
    if isinstance(error, Failed):
        return text
    if "out of memory" in text.lower() or "RESOURCE_EXHAUSTED" in text:
        return "out of memory"
    return f"{type(error).__name__}: {text}"[:200]


class Worker:
    """The benchmark's end of one worker process."""

    def __init__(self, python: str, module: str, job: LossJob, env: dict[str, str]):
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 close() closes it
        self._process = subprocess.Popen(
            [python, "-m", module, json.dumps(dataclasses.asdict(job))],
            cwd=ROOT,
            env=os.environ | env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            bufsize=1,
        )

    def prepare(self, timeout_s: float = 900) -> dict:
        return self._ask("prepare", timeout_s)

    def measure(self, repeats: int, timeout_s: float = 900) -> list[float]:
        return self._ask(f"measure {repeats}", timeout_s)["seconds"]

    def _ask(self, command: str, timeout_s: float) -> dict:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        try:
            stdin.write(command + "\n")
            stdin.flush()
        except OSError:
            raise Failed(self._last_words()) from None
        with selectors.DefaultSelector() as ready:
            ready.register(stdout, selectors.EVENT_READ)
            if not ready.select(timeout_s):
                raise Failed(f"no answer in {timeout_s:.0f} s")
        line = stdout.readline()
        if not line:
            raise Failed(self._last_words())
        answer = json.loads(line)
        if "failed" in answer:
            raise Failed(answer["failed"])
        return answer

    def _last_words(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        self._log.seek(0)
        lines = collections.deque((line for line in self._log if line.strip()), maxlen=1)
        last_line = f": {' '.join(lines[0].split())}"[:200] if lines else ""
        return f"the process ended with code {self._process.poll()}{last_line}"

    def close(self) -> None:
        """Ends the process, at once if it does not end by itself."""
        with contextlib.suppress(OSError, ValueError):
            assert self._process.stdin is not None
            self._process.stdin.close()  # the loop over standard input ends
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()


def timed(step: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of each of `repeats` calls, on a clock that processes of a machine share."""
    seconds = []
    for _ in range(repeats):
        begin = time.monotonic()
        step()
        seconds.append(time.monotonic() - begin)
    return seconds
