"""One process or several: decided from recorded environments; two real processes on a CPU."""

import contextlib
import re
import socket
import sys

import processes
import pytest

from base.errors import UserError
from trainers.machine.distributed import Decision, decide

SRUN = {  # srun --nodes=3 --ntasks-per-node=4, third task
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "node[007-009]",
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_NTASKS": "12",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "2",
}
SSH_LOGIN = {"SLURM_JOB_ID": "4097", "SLURM_NTASKS": "12"}  # pam_slurm_adopt gives only some
SBATCH = SSH_LOGIN | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_NODELIST": "node[1-3]"}
JAX = {
    "JAX_COORDINATOR_ADDRESS": "127.0.0.1:1234",
    "JAX_NUM_PROCESSES": "2",
    "JAX_PROCESS_ID": "1",
}
TPU = {"TPU_ML_PLATFORM": "JAX"}


def no_tpu() -> int:
    raise AssertionError("the metadata server was asked on a machine that is no TPU")


def decided(environ, workers=no_tpu, **flags) -> Decision:
    return decide({"PATH": "/bin", **environ}, gce_workers=workers, **flags)


@pytest.mark.parametrize(
    ("environ", "why"),
    [
        ({}, "nothing asks for more"),
        ({"TPU_SKIP_MDS_QUERY": "1"}, "nothing asks for more"),  # jax sets it where no TPU is
        (SSH_LOGIN, "no SLURM_STEP_NODELIST, SLURM_PROCID, SLURM_LOCALID"),
        (SBATCH, "a SLURM job without srun: no SLURM_STEP_NODELIST"),
        (SRUN | {"SLURM_NTASKS": "1"}, "a SLURM step of one task"),
        (TPU | {"TPU_WORKER_HOSTNAMES": "localhost"}, "a Cloud TPU machine on its own"),
    ],
)
def test_one_process_is_not_initialised_and_says_why(environ, why):
    decision = decided(environ)
    assert not decision.join and why in str(decision)
    assert str(decision).startswith("distributed: no, one process (")


def test_slurm_steps_find_each_other():
    decision = decided(SRUN)
    assert (decision.join, decision.auto) == (True, False)
    assert decision.coordinator == "node007:61441" and decision.bind is None
    assert (decision.num_processes, decision.process_id) == (12, 2)
    assert str(decision) == (
        "distributed: process 2 of 12, coordinator node007:61441 (SLURM step of 12 tasks)"
    )


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("node001", "node001"), ("node001,host2", "node001"), ("n[1,7-15],host2", "n1")],
)
def test_the_first_host_of_a_slurm_list_is_the_coordinator(nodes, first):
    assert decided(SRUN | {"SLURM_STEP_NODELIST": nodes}).coordinator == f"{first}:61441"


def test_a_slurm_step_on_one_node_stays_on_loopback():
    decision = decided(SRUN | {"SLURM_STEP_NUM_NODES": "1", "JAX_COORDINATOR_PORT": "99"})
    assert decision.coordinator == decision.bind == "127.0.0.1:99"


@pytest.mark.parametrize(
    ("environ", "devices"),
    [
        ({}, [2]),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, [2]),
        ({"CUDA_VISIBLE_DEVICES": "2"}, None),  # --gpus-per-task: its GPU is number 0 to it
        ({"SLURM_STEP_NUM_NODES": "12", "SLURM_LOCALID": "0"}, None),  # a node to itself
    ],
)
def test_a_slurm_task_takes_the_devices_that_are_its_own(environ, devices):
    assert decided(SRUN | environ).local_device_ids == devices


def test_flags_win_over_everything_and_complete_the_environment():
    flags = {"coordinator_address": "10.0.0.1:1", "num_processes": 3, "process_id": 0}
    decision = decided(SRUN | JAX, **flags)
    assert (decision.coordinator, decision.num_processes) == ("10.0.0.1:1", 3)
    assert decision.bind is None and decision.why == "flags"
    decision = decided(JAX, process_id=0)
    assert (decision.coordinator, decision.process_id) == ("127.0.0.1:1234", 0)


def test_jax_variables_are_enough_and_win_over_slurm():
    decision = decided(SRUN | JAX)
    assert (decision.num_processes, decision.process_id) == (2, 1)
    assert str(decision) == (
        "distributed: process 1 of 2, coordinator 127.0.0.1:1234 (JAX_* variables)"
    )


@pytest.mark.parametrize(
    ("address", "bind"),
    [
        ("127.0.0.1:5", "127.0.0.1:5"),
        ("localhost:5", "127.0.0.1:5"),
        ("[::1]:5", "[::1]:5"),
        ("10.0.0.1:5", None),
    ],
)
def test_a_coordinator_on_loopback_listens_there_only(address, bind):
    assert decided(JAX | {"JAX_COORDINATOR_ADDRESS": address}).bind == bind
    chosen = {"JAX_COORDINATOR_ADDRESS": address, "JAX_COORDINATOR_BIND_ADDRESS": "1.2.3.4:5"}
    assert decided(JAX | chosen).bind is None  # jax reads that one itself


@pytest.mark.parametrize(
    ("environ", "flags", "told"),
    [
        ({}, {"num_processes": 2}, "--coordinator_address (or JAX_COORDINATOR_ADDRESS) and --proc"),
        ({"JAX_PROCESS_ID": "1"}, {}, "--num_processes (or JAX_NUM_PROCESSES)"),
        (JAX, {"process_id": 2}, "process_id=2 must be one of 0 to num_processes - 1 = 1"),
        (
            JAX | {"JAX_NUM_PROCESSES": "two"},
            {},
            "num_processes=two, process_id=1: must be numbers",
        ),
        (JAX, {"coordinator_address": "node1"}, "coordinator_address=node1 must be host:port"),
        (JAX, {"mode": "off", "process_id": 1}, "--distributed=off contradicts"),
    ],
)
def test_what_is_incomplete_or_contradicts_itself_is_refused(environ, flags, told):
    with pytest.raises(UserError) as error:
        decided(environ, **flags)
    assert told in str(error.value) and "\n" not in str(error.value)


def test_off_is_off():
    assert not decided(SRUN | JAX, mode="off").join


@pytest.mark.parametrize(
    ("environ", "workers", "hosts"),
    [
        ({"TPU_WORKER_HOSTNAMES": "a,b,c,d"}, no_tpu, 4),
        ({"TPU_PROCESS_ADDRESSES": "a:1,b:1"}, no_tpu, 2),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, no_tpu, 2),
        ({}, lambda: 8, 8),
        ({}, lambda: 1, None),
    ],
)
def test_tpu_pods_are_left_to_jax(environ, workers, hosts):
    decision = decided(TPU | environ, workers)
    assert (decision.join, decision.auto) == (hosts is not None, hosts is not None)
    if hosts:
        assert f"Cloud TPU with {hosts} hosts" in str(decision)


PROCESS = """
import os, sys
import jax
from jax.experimental import multihost_utils
from trainers.machine import distributed

jax.config.update("jax_num_cpu_devices", 2)
decision = distributed.decide(os.environ)
distributed.start(decision, heartbeat_timeout=3000)
total = multihost_utils.process_allgather(jax.numpy.array([jax.process_index() + 1])).sum()
port = int(os.environ["JAX_COORDINATOR_ADDRESS"].split(":")[1])
listens = [
    line.split()[1]
    for table in ("tcp", "tcp6")
    for line in open(f"/proc/net/{table}").readlines()[1:]
    if line.split()[3] == "0A" and line.split()[1].endswith(f":{port:04X}")
]
print("result", int(total), jax.device_count(), *listens)
if str(jax.process_index()) in sys.argv:
    distributed.leave(decision, 2)
if len(sys.argv) > 1:
    try:
        multihost_utils.process_allgather(jax.numpy.array([1]))
    except Exception:
        distributed.leave(decision, 1)  # as main.py does
"""


def two_processes(*args: str) -> tuple[int, list[tuple[int, str, str]]]:
    """The port and (exit code, stdout, stderr) of each."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {
        "PATH": "/bin",
        "PYTHONPATH": ":".join(sys.path),
        "JAX_PLATFORMS": "cpu",
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": "2",
    }
    command = [sys.executable, "-c", PROCESS, *args]
    with contextlib.ExitStack() as running:
        two = [
            running.enter_context(processes.started(command, env=env | {"JAX_PROCESS_ID": str(i)}))
            for i in range(2)
        ]
        shown = [process.communicate() for process in two]
    return port, [(process.returncode, *out) for process, out in zip(two, shown)]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/net to see who listens where")
def test_two_processes_on_a_cpu_meet_on_loopback():
    port, ends = two_processes()
    # Just one listener, on 127.0.0.1 (which the kernel writes backwards).
    listener = rf"(0{{16}}FFFF0000)?0100007F:{port:04X}"
    for i, (code, out, err) in enumerate(ends):
        assert code == 0 and f"distributed: process {i} of 2" in out, err
        assert re.search(rf"result 3 4 {listener}\n", out), out + err


@pytest.mark.slow
@pytest.mark.parametrize("leaver", [0, 1])
def test_a_process_with_a_mistake_of_its_own_ends_all_soon_and_keeps_its_exit_code(leaver):
    # The deadline of a process is below the heartbeat's: nobody waits that one out.
    _, ends = two_processes(str(leaver))
    assert ends[leaver][0] == 2 and ends[1 - leaver][0] != 0, ends
