"""Processes that tests start: each has a deadline, and one that fails shows all that it printed."""

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

# Seconds. Only what hangs takes so long, also on a busy machine; less than the time-out of pytest.
DEADLINE = 1500.0


@contextlib.contextmanager
def started(
    command: Sequence[Any], *, deadline: bool = True, **options: Any
) -> Iterator[subprocess.Popen[str]]:
    """A process with pipes for stdout and stderr, killed at the end of the block.

    It is also killed after DEADLINE, unless the block limits its waits itself. That ends every wait
    for it, for its end or for a line of output. It leads a group: what it has started ends with it.
    """
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    with subprocess.Popen(command, text=True, process_group=0, **options) as process:
        try:
            with limited(process) if deadline else contextlib.nullcontext():
                yield process
        finally:
            _kill(process)


@contextlib.contextmanager
def limited(process: subprocess.Popen[str]) -> Iterator[None]:
    """A block in which the process is killed after DEADLINE."""
    expired = threading.Event()

    def expire() -> None:
        expired.set()
        _kill(process)

    timer = threading.Timer(DEADLINE, expire)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
    # Also where a test takes any exit code, or that of a kill.
    assert not expired.is_set(), f"{process.args} was killed after {DEADLINE} s"


def run(
    command: Sequence[Any], *, code: int = 0, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end; what it printed. Raises AssertionError as `end` does."""
    with started(command, **options) as process:
        return end(process, code)


def end(process: subprocess.Popen[str], code: int = 0) -> subprocess.CompletedProcess[str]:
    """Waits for the end of a process; the output that was not read before.

    Raises:
      AssertionError: with the output, for an exit code other than `code`. -9 is that of a process
        that was killed, such as after DEADLINE.
    """
    out, err = process.communicate()
    printed = f"exit code {process.returncode}, not {code}\n{(out or '')[-9000:]}\n{err or ''}"
    assert process.returncode == code, printed
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def end_all(two: Sequence[subprocess.Popen[str]]) -> list[subprocess.CompletedProcess[str]]:
    """Waits for processes that depend on each other. Raises AssertionError as `end` does, with the
    output of all: the reason may be in another's."""
    printed = [process.communicate() for process in two]
    shown = "".join(
        f"exit code {process.returncode}\n{out[-9000:]}\n{err}\n"
        for process, (out, err) in zip(two, printed)
    )
    assert all(process.returncode == 0 for process in two), shown
    return [
        subprocess.CompletedProcess(process.args, 0, out, err)
        for process, (out, err) in zip(two, printed)
    ]


def read_until(process: subprocess.Popen[str], text: str) -> str:
    """Reads lines of stdout up to one with the text, and returns that one.

    Raises:
      AssertionError: with the output, if the process ends without it.
    """
    seen = []
    for line in process.stdout or ():
        if text in line:
            return line
        seen.append(line)
    err = process.stderr.read() if process.stderr else ""
    raise AssertionError(f"no {text!r} in\n{''.join(seen)}\n{err}")


def wait_until(condition: Callable[[], Any], process: subprocess.Popen[str]) -> None:
    """Waits until the condition holds. Raises AssertionError if the process ends before that."""
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def _kill(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # the group has gone
        os.killpg(process.pid, signal.SIGKILL)
