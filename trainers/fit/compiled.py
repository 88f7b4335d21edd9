"""Compiles a lowered step for devices that may not be here; memory, and the line when too large."""

import dataclasses
import os
import re
import sys
import tempfile
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any, BinaryIO

import jax

from siglip.chips import GiB, find_chip

QUICK = {"exec_time_optimization_effort": -1.0}  # of TPUs: bytes nearly right, cycles wrong
# No card is here to time kernels on.
WITHOUT_TUNING = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0}
JAX_SHARE = 0.75  # of a GPU's memory is JAX's, unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise
SPARE = 0.08  # of the memory that should stay free: other versions of XLA need more or less


@dataclasses.dataclass(frozen=True)
class Memory:
    """What a program needs on each device, in bytes.

    Attributes:
      peak: at the worst moment, arguments included.
      limit: what the device lets a program have; 0 where that is not known.
      arguments: state and batch; of the state the results lie in the same place.
      temporaries: what XLA reports, which is more than is in use at a time.
      largest: (bytes, shape) of the largest buffers of a program that does not fit.
    """

    peak: int
    limit: int
    arguments: int = 0
    temporaries: int = 0
    largest: tuple[tuple[int, str], ...] = ()

    @property
    def fits(self) -> bool:
        return not self.limit or self.peak <= self.limit

    @property
    def spare(self) -> float:
        """The share of the limit that is left; negative if the program does not fit."""
        return 1 - self.peak / self.limit if self.limit else 1.0

    def __str__(self) -> str:
        if not self.limit and self.peak < GiB:
            return f"{self.peak / 2**20:.0f} MiB a device"
        of = f" of {self.limit / GiB:.1f}" if self.limit else ""
        spare = f", {self.spare:.0%} to spare" if self.limit and self.fits else ""
        return f"{self.peak / GiB:.1f}{of} GiB a device{spare}"


def memory_of(compiled: Any, device: Any) -> Memory:
    """The memory of a compiled program on devices of this kind; 0 where XLA does not say."""
    stats = compiled.memory_analysis()
    if stats is None:
        return Memory(0, 0)
    arguments, temporaries = stats.argument_size_in_bytes, stats.temp_size_in_bytes
    outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
    peak = stats.peak_memory_in_bytes
    if device.platform == "cpu":  # its peak lacks the temporaries
        peak = arguments + outputs + temporaries
    return Memory(peak, _limit(device), arguments, temporaries)


def _limit(device: Any) -> int:
    """Bytes that a program can have on a device; 0 if that is not known."""
    chip = find_chip(device)
    if device.platform != "gpu":
        return chip.memory if chip else 0
    if _is_here(device) and (limit := (device.memory_stats() or {}).get("bytes_limit")):
        return limit
    share = os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION") or JAX_SHARE
    return int(chip.memory * float(share)) if chip else 0


@contextmanager
def buffers_reported(environ: MutableMapping[str, str]) -> Iterator[BinaryIO]:
    """A block in which libtpu writes into a file what takes the memory of a program that is too
    large, and much else. Enter it before libtpu loads. Python's own stderr stays where it is."""
    for name in ("TPU_STDERR_LOG_LEVEL", "TPU_MIN_LOG_LEVEL"):
        environ.setdefault(name, "0")
    terminal, python = os.dup(2), sys.stderr
    with tempfile.TemporaryFile() as log, os.fdopen(os.dup(2), "w", buffering=1) as sys.stderr:
        os.dup2(log.fileno(), 2)
        try:
            yield log
        finally:
            sys.stderr.flush()
            sys.stderr = python
            os.dup2(terminal, 2)
            os.close(terminal)


def compile_step(
    lowered: Any, device: Any, *, quick: bool = False, log: BinaryIO | None = None
) -> Any | Memory:
    """The compiled program, or the Memory of one that does not fit.

    Args:
      device: one of those that the program is lowered for.
      quick: seconds in the place of minutes on TPUs. Memory is up to a tenth too high, collectives
        are nearly the same, XLA's estimates of time are wrong.
      log: of buffers_reported.
    """
    options: dict[str, Any] = {}
    if device.platform == "tpu" and quick:
        options = QUICK
    elif device.platform == "gpu" and not _is_here(device):
        options = WITHOUT_TUNING
    begin = log.seek(0, os.SEEK_END) if log else 0
    cached = jax.config.values["jax_enable_compilation_cache"]
    try:
        # A program for a device that is not here cannot be read from the cache again.
        jax.config.update("jax_enable_compilation_cache", cached and _is_here(device))
        return lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        text = ""
        if log:
            log.seek(begin)
            text = log.read().decode(errors="replace")
        memory = needed(str(error), text)
        if memory is None:
            raise
        return memory
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)


def _is_here(device: Any) -> bool:
    return device.platform in {d.platform for d in jax.local_devices()}


_SIZE = r"([\d.]+)([KMGT]?)"
_NEEDED = (
    rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)",
    rf"Used {_SIZE} of {_SIZE} hbm",
)
_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


def needed(message: str, log: str = "") -> Memory | None:
    """The Memory that a program needs which does not fit a TPU's main memory, by the compiler's
    error; None of any other error, such as of a kernel too large for the vector memory.

    Args:
      message: of the error, such as "HLO temporaries (65.33G) exceeds available HBM (30.75G)".
      log: what libtpu wrote on stderr, with its table of buffers.
    """
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    for pattern in _NEEDED:
        if match := re.search(pattern, message):
            peak, limit = (int(float(match[i]) * 2 ** _UNITS[match[i + 1]]) for i in (1, 3))
            return Memory(peak, limit, largest=_buffers(log))
    return None


def shortage(message: str) -> str:
    """' (65.3 GiB of 30.8)' of an error about memory; '' where it has no numbers."""
    if memory := needed(message):
        return f" ({memory.peak / GiB:.1f} GiB of {memory.limit / GiB:.1f})"
    match = re.search(r"allocat\w+ (\d+) bytes", message)  # of a GPU or a CPU
    return f" (a buffer of {int(match[1]) / GiB:.1f} GiB)" if match else ""


def _buffers(log: str) -> tuple[tuple[int, str], ...]:
    """(bytes, shape) of the ten largest buffers of libtpu's report."""
    rows = re.findall(rf"^ *[\d.]+\w+\([^)]*\); *{_SIZE}i?B; *\d+; *\d+; (.+)$", log, re.MULTILINE)
    sizes = [(int(float(n) * 2 ** _UNITS[unit]), shape.strip()) for n, unit, shape in rows]
    return tuple(sorted(sizes, reverse=True)[:10])
