"""Decides whether this process is one of several and how it finds the others, and joins them.

jax.distributed.initialize() without arguments fails on a single host, waits for ever in an ssh
login into a SLURM allocation, hides all GPUs but one from a process that owns a whole node, and
listens on every network interface. So `decide`, a pure function of the environment, returns its
arguments and the reason for them, and `start` calls it.
"""

import dataclasses
import os
import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping

from base.errors import UserError

JAX_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
SLURM_VARIABLES = (
    "SLURM_JOB_ID",
    "SLURM_STEP_NODELIST",
    "SLURM_NTASKS",
    "SLURM_PROCID",
    "SLURM_LOCALID",
)
GCE_WORKERS = (
    "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"
    "worker-network-endpoints"
)


@dataclasses.dataclass(frozen=True)
class Decision:
    """The arguments for jax.distributed.initialize, and the reason for them.

    Attributes:
      why: the reason, for the log.
      join: False for one process on its own.
      auto: jax finds coordinator, number and id by itself (Cloud TPU knows them).
      coordinator, num_processes, process_id: 'host:port' of process 0, and which one this is.
      bind: address that process 0 listens on; None for all interfaces.
      local_device_ids: devices of the host that belong to this process; None for all.
    """

    why: str
    join: bool = True
    auto: bool = False
    coordinator: str | None = None
    num_processes: int = 1
    process_id: int = 0
    bind: str | None = None
    local_device_ids: list[int] | None = None

    def __str__(self) -> str:
        if not self.join:
            return f"distributed: no, one process ({self.why})"
        if self.auto:
            return f"distributed: yes, jax finds the other processes ({self.why})"
        return (
            f"distributed: process {self.process_id} of {self.num_processes}, "
            f"coordinator {self.coordinator} ({self.why})"
        )


def start(decision: Decision, *, heartbeat_timeout: int = 100) -> None:
    """Prints the decision and joins the other processes; before any other use of jax's devices.

    Args:
      heartbeat_timeout: seconds after which a silent process counts as dead and ends the others.
    """
    print(decision, flush=True)
    if not decision.join:
        return
    import jax

    if decision.auto:
        jax.distributed.initialize(heartbeat_timeout_seconds=heartbeat_timeout)
        return
    jax.distributed.initialize(
        coordinator_address=decision.coordinator,
        num_processes=decision.num_processes,
        process_id=decision.process_id,
        local_device_ids=decision.local_device_ids,
        coordinator_bind_address=decision.bind,
        # With detection jax would give a SLURM process only one device of its host.
        cluster_detection_method="deactivate",
        heartbeat_timeout_seconds=heartbeat_timeout,
    )


def leave(decision: Decision, code: int) -> int:
    """Ends this process at once, after an error that the others may not have.

    Such an error is a file that only this host lacks. A regular exit would wait up to five minutes
    for the others, which may be waiting for this process. A process on its own gets `code` back.
    """
    if not decision.join:
        return code
    import jax

    sys.stdout.flush()
    sys.stderr.flush()
    if (jax.process_index() if decision.auto else decision.process_id) == 0:
        time.sleep(5)  # the others die with the coordinator, so let them print their errors
    os._exit(code)


def decide(
    environ: Mapping[str, str],
    *,
    mode: str = "auto",
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    gce_workers: Callable[[], int] | None = None,
) -> Decision:
    """Which wins: (1) mode 'off', (2) the flags, (3) JAX_* variables, (4) SLURM, (5) Cloud TPU.

    Args:
      environ: environment variables, after `import jax` (which marks Cloud TPU machines there).
      mode: 'auto' or 'off'.
      coordinator_address, num_processes, process_id: flags; single ones complete JAX_* variables.
      gce_workers: how many hosts the TPU slice of this machine has, asked only on a Cloud TPU
        machine whose environment does not say.

    Raises:
      UserError: flags or JAX_* variables are incomplete or contradict themselves.
    """
    flags = (coordinator_address, num_processes, process_id)
    if mode == "off":
        if any(flag is not None for flag in flags):
            raise UserError("--distributed=off contradicts --coordinator_address and its like")
        return Decision("--distributed=off", join=False)
    if any(flag is not None for flag in flags) or any(v in environ for v in JAX_VARIABLES):
        return _from_flags(environ, flags)
    if "SLURM_JOB_ID" in environ:
        return _from_slurm(environ)
    if "TPU_ML_PLATFORM" in environ and "TPU_SKIP_MDS_QUERY" not in environ:
        return _from_tpu(environ, gce_workers or _ask_gce)
    return Decision("nothing asks for more", join=False)


def _from_flags(environ: Mapping[str, str], flags: tuple) -> Decision:
    names = ("coordinator_address", "num_processes", "process_id")
    values = [
        environ.get(variable) if flag is None else flag
        for flag, variable in zip(flags, JAX_VARIABLES)
    ]
    if missing := [
        f"--{name} (or {variable})"
        for name, variable, value in zip(names, JAX_VARIABLES, values)
        if value in (None, "")
    ]:
        raise UserError(f"of several processes, each needs {' and '.join(missing)} too")
    address, count, index = map(str, values)
    try:
        count, index = int(count), int(index)
    except ValueError:
        raise UserError(f"num_processes={count}, process_id={index}: must be numbers") from None
    if not 0 <= index < count:
        raise UserError(f"process_id={index} must be one of 0 to num_processes - 1 = {count - 1}")
    if not re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^:\[\]]+):\d+", address):
        raise UserError(f"coordinator_address={address} must be host:port, as 10.0.0.1:1234")
    why = "JAX_* variables" if all(flag is None for flag in flags) else "flags"
    return Decision(
        why,
        coordinator=address,
        num_processes=count,
        process_id=index,
        bind=_loopback(address, environ),
    )


def _from_slurm(environ: Mapping[str, str]) -> Decision:
    if missing := [variable for variable in SLURM_VARIABLES if variable not in environ]:
        return Decision(f"a SLURM job without srun: no {', '.join(missing)}", join=False)
    tasks = int(environ["SLURM_NTASKS"])
    if tasks == 1:
        return Decision("a SLURM step of one task", join=False)
    # The same port as jax would take, in the upper 4096 so that jobs on a node seldom collide.
    port = environ.get("JAX_COORDINATOR_PORT") or 61440 + int(environ["SLURM_JOB_ID"]) % 4096
    nodes = int(environ.get("SLURM_STEP_NUM_NODES") or environ.get("SLURM_NNODES") or 0)
    if nodes == 1:
        address = f"127.0.0.1:{port}"
    else:
        address = f"{_first_host(environ['SLURM_STEP_NODELIST'])}:{port}"
    return Decision(
        f"SLURM step of {tasks} tasks",
        coordinator=address,
        num_processes=tasks,
        process_id=int(environ["SLURM_PROCID"]),
        bind=_loopback(address, environ),
        local_device_ids=_slurm_devices(environ, tasks, nodes),
    )


def _slurm_devices(environ: Mapping[str, str], tasks: int, nodes: int) -> list[int] | None:
    # A task that has its node for itself uses all its devices. One that was given one GPU of its
    # own (--gpus-per-task) sees it as number 0, whatever its local id.
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if tasks == nodes or (visible is not None and "," not in visible):
        return None
    return [int(environ["SLURM_LOCALID"])]


def _first_host(nodes: str) -> str:
    """'node[001-015,020],host2' -> 'node001'."""
    match = re.match(r"([^,\[]+)(?:\[(\w+))?", nodes)
    if not match:
        raise UserError(f"SLURM_STEP_NODELIST={nodes} names no host")
    return match[1] + (match[2] or "")


def _from_tpu(environ: Mapping[str, str], gce_workers: Callable[[], int]) -> Decision:
    listed = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
    slices = int(environ.get("MEGASCALE_NUM_SLICES") or 1)
    workers = len(listed.split(",")) if listed else gce_workers()
    if workers * slices == 1:
        return Decision("a Cloud TPU machine on its own", join=False)
    return Decision(f"Cloud TPU with {workers * slices} hosts", auto=True)


def _ask_gce() -> int:
    request = urllib.request.Request(GCE_WORKERS, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return len(answer.read().decode().split(","))
    except (urllib.error.URLError, TimeoutError):
        return 1  # no metadata server: not a pod


def _loopback(address: str, environ: Mapping[str, str]) -> str | None:
    """The loopback address that process 0 listens on; None where jax decides."""
    host, _, port = address.rpartition(":")
    if "JAX_COORDINATOR_BIND_ADDRESS" in environ:
        return None
    if host == "localhost" or host.startswith("127."):
        return f"127.0.0.1:{port}"
    return address if host == "[::1]" else None
