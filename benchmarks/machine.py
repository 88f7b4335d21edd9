"""Describes this machine, for the record of where a result was measured."""

import datetime
import importlib.metadata
import os
import pathlib
import platform
import subprocess
from typing import Any

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def describe(packages: tuple[str, ...] = PACKAGES) -> dict[str, Any]:
    """Date, processor, accelerators, versions. It starts JAX's backend if nothing has yet.

    Returns a dict that JSON can hold:
      date: local time, to the minute, with its offset from UTC.
      commit: of this code, with "+" where files differ from it; None outside a git checkout.
      cpu, cores, memory_gib: the processor's name, the cores and the memory this process may use.
      load: processes that ran or waited in the last minute, before the benchmark itself.
      platform: "cpu", "gpu" or "tpu"; accelerator: name and number of JAX's devices, None on a CPU.
      os, python: names and versions.
      versions: of the installed ones among `packages`.
    """
    import jax

    devices = jax.devices()
    on_cpu = devices[0].platform == "cpu"
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="minutes"),
        "commit": _commit(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory_gib": _memory_gib(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "platform": devices[0].platform,
        "accelerator": None if on_cpu else f"{len(devices)} x {devices[0].device_kind}",
        "os": platform.platform(terse=True),
        "python": platform.python_version(),
        "versions": versions(packages),
    }


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Versions of the packages that are installed, without importing them."""
    installed = {}
    for name in packages:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def one_line(machine: dict[str, Any]) -> str:
    """'2 cores of Intel Xeon, 23 GiB, no accelerator; jax 0.10.2; 2026-11-21', for a table."""
    chips = machine["accelerator"] or "no accelerator"
    packages = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"{machine['cores']} cores of {machine['cpu']}, {machine['memory_gib']} GiB, {chips}; "
        f"Python {machine['python']}, {packages}; {machine['date'][:10]}"
    )


def _cpu() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_gib() -> int | None:
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30)
    except (ValueError, OSError, AttributeError):
        return None


def _commit() -> str | None:
    root = pathlib.Path(__file__).resolve().parent

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", *args], cwd=root, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
