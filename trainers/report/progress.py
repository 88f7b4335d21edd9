"""One readable line about a running training: a row on a terminal, lines elsewhere."""

import resource
import sys
from typing import TextIO

import jax

from base.progress import StatusLine
from base.words import duration
from trainers.report.clock import Clock


class TrainingProgress:
    """The status line of a training, drawn with the numbers of its clock.

    It goes to stderr where that is a terminal, else to stdout; with is_main False nowhere.
    """

    def __init__(self, clock: Clock, *, is_main: bool = True, stream: TextIO | None = None) -> None:
        self._clock, self._is_main = clock, is_main
        self._line = StatusLine(stream or (sys.stderr if sys.stderr.isatty() else sys.stdout))

    def update(self, *, loss: float, lr: float) -> None:
        """Shows the clock's step. Every process may call it."""
        if self._is_main:
            self._line.show(progress_line(self._clock, loss=loss, lr=lr, memory=memory()))

    def note(self, text: str) -> None:
        """Prints lines that stay, above the status line."""
        if self._is_main:
            self._line.note(text)

    def close(self) -> None:
        """Ends the line, so that what follows begins on one of its own."""
        self._line.close()


def progress_line(clock: Clock, *, loss: float, lr: float, memory: dict[str, float]) -> str:
    """'step 1200/5000  24% | loss 9.8765 | ...'; '-' stands for what is not measured yet."""
    rates, (eta, complete) = clock.rates(), clock.eta()
    width = len(str(clock.total_steps))
    share = clock.step / clock.total_steps if clock.total_steps else 1.0
    total, per_device = (rates.get(f"examples_per_s{part}") for part in ("", "_per_device"))
    parts = [
        f"step {clock.step:{width}}/{clock.total_steps} {share:4.0%}",
        f"loss {loss:.4f}",
        f"lr {lr:.2e}",
        f"{_count(total)} ex/s ({_count(per_device)}/device)",
        "data-wait " + (f"{rates['data_wait']:.0%}" if "data_wait" in rates else "-"),
        _memory_part(memory),
        f"ETA {'' if complete or eta is None else '>'}{duration(eta)}",
    ]
    return " | ".join(parts)


def memory() -> dict[str, float]:
    """The memory in use, in GB (1e9 bytes).

    Returns:
      {'device_memory_gb': peak of the fullest local device, 'device_memory_limit_gb': ...} where
      the platform reports it (GPU, TPU), else {'process_memory_gb': ...}.
    """
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
