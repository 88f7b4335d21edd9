"""What JAX must be told before it starts: XLA's flags, and where compiled programs are kept."""

import hashlib
import os
import pathlib
import stat
from collections.abc import MutableMapping

import jax

# Emulated devices share the cores: on a busy machine one may be late by more than the 40 s after
# which XLA gives a collective up and aborts.
PATIENCE = "--xla_cpu_collective_call_terminate_timeout_seconds=600"
# NVIDIA: sends of the ring start before the matmuls that hide them, and end after.
OVERLAP = "--xla_gpu_enable_latency_hiding_scheduler=true"
LARGEST = 2 * 2**30  # bytes of kept programs; those not used for longest go first
NVIDIA = pathlib.Path("/proc/driver/nvidia/version")


def set_flags(environ: MutableMapping[str, str], *, cpu_devices: int, nvidia: bool) -> None:
    """Puts XLA_FLAGS before those of the user, which win."""
    flags = [flag for flag, wanted in ((PATIENCE, cpu_devices), (OVERLAP, nvidia)) if wanted]
    environ["XLA_FLAGS"] = " ".join([*flags, environ.get("XLA_FLAGS", "")]).strip()


def keep_programs(environ: MutableMapping[str, str]) -> pathlib.Path | None:
    """A run that goes on, or is repeated, loads its programs instead of compiling them.

    They are kept in a folder that only the user can write to, as whoever writes there runs code in
    the user's name: in JAX_COMPILATION_CACHE_DIR where it is set ('' for nowhere), else below
    XDG_CACHE_HOME or ~/.cache, apart for machines of different processors. Returns the folder;
    None where nothing is kept.
    """
    if "JAX_COMPILATION_CACHE_DIR" in environ:
        return None  # JAX has read it
    try:
        home = pathlib.Path(environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
        home.mkdir(parents=True, exist_ok=True)
        folder = home / "siglip-jax" / _processor()
        for private in (folder.parent, folder):
            private.mkdir(exist_ok=True, mode=0o700)
            private.chmod(0o700)
            found = private.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
                return None
    except (OSError, RuntimeError):  # no home, a read-only one, somebody else's folder
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", LARGEST)
    return folder


def _processor() -> str:
    """Programs for CPUs hold instructions that another processor may not have."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else [os.uname().machine]
    features = sorted({line for line in lines if line.startswith(("flags", "Features", "x86"))})
    return hashlib.sha256("\n".join(features).encode()).hexdigest()[:12]
