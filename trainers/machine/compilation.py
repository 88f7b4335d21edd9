"""Settings that JAX needs before it starts: XLA's flags, and the cache of compiled programs."""

import hashlib
import os
import pathlib
import stat
from collections.abc import MutableMapping

import jax

# Emulated devices share the cores: on a busy machine one may be late by more than the 40 s after
# which XLA gives a collective up and aborts.
COLLECTIVE_TIMEOUT = "--xla_cpu_collective_call_terminate_timeout_seconds=600"
# NVIDIA: sends of the ring start before the matmuls that hide them, and end after.
LATENCY_HIDING = "--xla_gpu_enable_latency_hiding_scheduler=true"
CACHE_BYTES = 2 * 2**30  # JAX evicts the programs that were not used for longest
NVIDIA = pathlib.Path("/proc/driver/nvidia/version")


def set_flags(environ: MutableMapping[str, str], *, cpu_devices: int, nvidia: bool) -> None:
    """Puts this project's XLA_FLAGS before those of the user, which win."""
    flags = [
        flag
        for flag, wanted in ((COLLECTIVE_TIMEOUT, cpu_devices), (LATENCY_HIDING, nvidia))
        if wanted
    ]
    environ["XLA_FLAGS"] = " ".join([*flags, environ.get("XLA_FLAGS", "")]).strip()


def keep_programs(environ: MutableMapping[str, str]) -> pathlib.Path | None:
    """Caches compiled programs, so that a run that goes on or is repeated loads them.

    The cache is JAX_COMPILATION_CACHE_DIR where that is set ('' for none), else a folder below
    XDG_CACHE_HOME or ~/.cache, one for each kind of processor. Only the user can write to that
    folder, because whoever does runs code in the user's name.

    Returns:
      The folder; None where JAX_COMPILATION_CACHE_DIR decides, or there is no safe folder.
    """
    if "JAX_COMPILATION_CACHE_DIR" in environ:
        return None  # JAX has read it
    try:
        home = pathlib.Path(environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
        home.mkdir(parents=True, exist_ok=True)
        folder = home / "siglip-jax" / _processor()
        for directory in (folder.parent, folder):
            directory.mkdir(exist_ok=True, mode=0o700)
            directory.chmod(0o700)
            status = directory.lstat()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
                return None
    except (OSError, RuntimeError):  # no home, a read-only one, somebody else's folder
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", CACHE_BYTES)
    return folder


def _processor() -> str:
    """A hash of the processor's features: another one may lack instructions of a program."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else [os.uname().machine]
    features = sorted({line for line in lines if line.startswith(("flags", "Features", "x86"))})
    return hashlib.sha256("\n".join(features).encode()).hexdigest()[:12]
