"""One readable line about a running training: a row on a terminal, lines elsewhere."""

import resource
import shutil
import sys
from typing import TextIO

import jax

from trainers.report.clock import Clock


class TrainingProgress:
    """Prints the clock's line: a single updating row on a terminal, plain lines elsewhere.

    It goes to stderr where that is a terminal, else to stdout; with is_main False nowhere.
    """

    def __init__(self, clock: Clock, *, is_main: bool = True, stream: TextIO | None = None) -> None:
        self._clock, self._is_main = clock, is_main
        self._stream = stream or (sys.stderr if sys.stderr.isatty() else sys.stdout)
        self._live = self._stream.isatty()
        self._row = ""

    def update(self, *, loss: float, lr: float) -> None:
        """Show the clock's step. Every process may call it."""
        if not self._is_main:
            return
        line = progress_line(self._clock, loss=loss, lr=lr, memory=memory())
        if self._live:
            self._row = line[: shutil.get_terminal_size().columns - 1]
            self._write("\r" + self._row + "\x1b[K")
        else:
            self._write(line + "\n")

    def note(self, text: str) -> None:
        """Whole lines that stay, above the row."""
        if self._is_main:
            self._write(f"\r\x1b[K{text}\n{self._row}" if self._row else text + "\n")

    def close(self) -> None:
        """The row stays as it is; what follows begins on a line of its own."""
        if self._row:
            self._write("\n")
            self._row = ""

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def progress_line(clock: Clock, *, loss: float, lr: float, memory: dict[str, float]) -> str:
    """'step 1200/5000  24% | loss 9.8765 | ...'; '-' stands for what is not measured yet."""
    rates, (eta, complete) = clock.rates(), clock.eta()
    width = len(str(clock.total_steps))
    share = clock.step / clock.total_steps if clock.total_steps else 1.0
    speed, each = (rates.get(f"examples_per_s{part}") for part in ("", "_per_device"))
    parts = [
        f"step {clock.step:{width}}/{clock.total_steps} {share:4.0%}",
        f"loss {loss:.4f}",
        f"lr {lr:.2e}",
        f"{_count(speed)} ex/s ({_count(each)}/device)",
        "data-wait " + (f"{rates['data_wait']:.0%}" if "data_wait" in rates else "-"),
        _memory_part(memory),
        f"ETA {'' if complete or eta is None else '>'}{_duration(eta)}",
    ]
    return " | ".join(parts)


def memory() -> dict[str, float]:
    """GB (1e9 bytes) as {'device_memory_gb': peak of the fullest local device,
    'device_memory_limit_gb': ...} where the platform tells (GPU, TPU), else of this process."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    if peaks := [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]:
        limits = [s["bytes_limit"] for s in stats if "bytes_limit" in s]
        limit = {"device_memory_limit_gb": min(limits) / 1e9} if limits else {}
        return {"device_memory_gb": max(peaks) / 1e9} | limit
    return {"process_memory_gb": _resident_bytes() / 1e9}


def _resident_bytes() -> int:
    try:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * resource.getpagesize()
    except OSError:  # macOS: the peak instead, in bytes there
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _memory_part(memory: dict[str, float]) -> str:
    if "process_memory_gb" in memory:
        return f"process memory {memory['process_memory_gb']:.1f} GB"
    limit = memory.get("device_memory_limit_gb")
    of = f"/{limit:.1f}" if limit else ""
    return f"device memory {memory['device_memory_gb']:.1f}{of} GB"


def _count(number: float | None) -> str:
    if number is None:
        return "-"
    return f"{number:,.0f}" if number >= 100 else f"{number:.1f}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02}h"
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"
