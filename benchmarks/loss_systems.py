"""The systems that the loss benchmark compares, and whether they can run here."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

from base.errors import UserError
from benchmarks import loss_jax, loss_jax_worker, loss_torch, loss_torch_worker
from benchmarks.loss_case import LossCase
from benchmarks.loss_worker import ROOT, LossJob, Worker

BASE = "ours-ring"  # the system that ratios of the others are to


@dataclasses.dataclass(frozen=True)
class LossSystem:
    """A way to compute the loss: `options` choose it in the worker, which is "jax" or "torch"."""

    name: str
    what: str
    worker: str
    options: dict[str, Any]
    gpu_only: bool = False
    several_devices: bool = False  # on one device it is the same as another one of the list

    def start(self, case: LossCase, platform: str, folder: str, peer_python: str) -> Worker:
        job = LossJob(self.options, case.devices, case.n, case.d, case.dtype, platform, folder)
        if self.worker == "jax":
            env = loss_jax_worker.environment(job)
            return Worker(sys.executable, "benchmarks.loss_jax_worker", job, env)
        env = loss_torch_worker.environment(job)
        return Worker(peer_python, "benchmarks.loss_torch_worker", job, env)


def every() -> list[LossSystem]:
    """All systems, ours first."""
    ours = [LossSystem(BASE, "this project: one tour of the ring", "jax", {"form": "ours"})]
    if loss_jax.has_exchanges():
        ours = [
            LossSystem(
                f"ours-{exchange}",
                f"this project: {what}",
                "jax",
                {"form": "ours", "exchange": exchange},
                several_devices=exchange != "ring",
            )
            for exchange, what in {
                "ring": "one tour of the ring",
                "bidirectional": "half the texts each way round",
                "gather": "all texts gathered, tile by tile",
            }.items()
        ]
    naive = [
        LossSystem("naive-xla", "JAX: the definition, sharded by XLA", "jax", {"form": "xla-full"}),
        LossSystem(
            "naive-gather",
            "JAX: texts gathered, differentiated by autodiff",
            "jax",
            {"form": "all-gather"},
            several_devices=True,
        ),
        LossSystem(
            "naive-ring",
            "JAX: a ring in a scan, differentiated by autodiff",
            "jax",
            {"form": "ring-autodiff"},
            several_devices=True,
        ),
    ]
    open_clip = [
        LossSystem(
            f"open_clip-{dist_impl}",
            f"open_clip's SigLipLoss, {dist_impl}{' (its default)' * (dist_impl == 'bidir')}",
            "torch",
            {"peer": "open_clip", "dist_impl": dist_impl},
            several_devices=dist_impl != "bidir",
        )
        for dist_impl in ("bidir", "shift", "gather", "reduce")
    ]
    chunked = LossSystem(
        "open_clip-chunked",
        "open_clip's SigLipLoss, bidir, chunk_size=128",
        "torch",
        {"peer": "open_clip", "dist_impl": "bidir", "chunk_size": 128},
    )
    kernels = [
        LossSystem(peer + name, what, "torch", {"peer": peer, **options}, gpu_only=True)
        for peer, name, what, options in (
            ("siglip-kernel", "", "siglip-kernel, its default", {}),
            ("siglip-kernel", "-small", "siglip-kernel, chunk_size=1024", {"chunk_size": 1024}),
            ("siglip-kernel", "-eager", "siglip-kernel's eager form", {"backend": "reference"}),
            ("inf-cl", "", "Inf-CL: the softmax loss, both directions", {}),
        )
    ]
    matmuls = LossSystem(
        "matmuls", "three bare matmuls of the same shapes", "jax", {"form": "matmuls"}
    )
    return [*ours, *naive, *open_clip, chunked, *kernels, matmuls]


def choose(names: str, platform: str) -> list[LossSystem]:
    """The systems that `names` lists, comma-separated: a name, or the part of names before a "-".

    "" lists all, but on CPUs without the bare matmuls, which are no limit there.
    """
    systems = every()
    if not names:
        return [s for s in systems if platform != "cpu" or s.name != "matmuls"]
    chosen: list[LossSystem] = []
    for name in names.split(","):
        matches = [s for s in systems if s.name == name or s.name.startswith(f"{name}-")]
        if not matches:
            known = ", ".join(s.name for s in systems)
            raise UserError(f"--systems: no system {name!r}; there are {known}")
        chosen += [s for s in matches if s not in chosen]
    return [s for s in systems if s in chosen]


def probe_peers(peer_python: str) -> dict[str, Any]:
    """What `loss_torch.probe` finds in the environment of that interpreter.

    Raises:
      UserError: the interpreter does not run.
    """
    try:
        probe = subprocess.run(
            [peer_python, "-m", "benchmarks.loss_torch_worker", "--probe"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"--peer_python {peer_python} does not run: {error}") from None
    if probe.returncode:
        last = (probe.stderr.strip().splitlines() or ["it says nothing"])[-1]
        raise UserError(f"--peer_python {peer_python}: {last}")
    return json.loads(probe.stdout.strip().splitlines()[-1])


def why_not(system: LossSystem, case: LossCase, platform: str, peers: dict[str, Any]) -> str:
    """Why this system cannot run this case here, in one line; "" where it can."""
    if system.several_devices and case.devices == 1:
        return "on one device the same as another row"
    if system.worker == "jax":
        return ""
    peer = system.options["peer"]
    if system.gpu_only and platform != "gpu":
        return f"{peer} needs an NVIDIA GPU, none is here"
    if platform not in ("cpu", "gpu"):
        return f"PyTorch has no {platform}"
    for name in ("torch", peer):
        if name not in peers["versions"]:
            package = {"torch": "torch", **loss_torch.PACKAGES}[name]
            return f"{package} is not installed (requirements-peers.txt, --peer_python)"
    if platform == "gpu" and peers["gpus"] < case.devices:
        return f"its PyTorch sees {peers['gpus']} GPUs, {case.devices} are needed"
    if "backend" in system.options and case.devices > 1:
        return "for one GPU only"
    if "chunk_size" in system.options and peer == "open_clip" and not peers["open_clip_chunks"]:
        return f"SigLipLoss of open_clip {peers['versions'][peer]} has no chunk_size"
    return ""


def default_peer_python() -> str:
    return os.environ.get("SIGLIP_PEER_PYTHON") or sys.executable


def names(systems: Iterable[LossSystem]) -> str:
    return ", ".join(system.name for system in systems)
