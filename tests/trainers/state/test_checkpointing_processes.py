"""Two processes with two devices each, on one file system."""

import contextlib
import os
import pathlib
import socket
import sys

import processes
from tiny_state import abstract, assert_same, make_state, on_disk

from trainers.state.restoring import restore_state

SCRIPT = pathlib.Path(__file__).with_name("checkpoint_process.py")
ROOT = SCRIPT.parents[3]


def test_two_processes_save_and_restore_as_one(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    with contextlib.ExitStack() as running:
        two = [
            running.enter_context(
                processes.started(
                    [sys.executable, str(SCRIPT), str(index), port, str(tmp_path)], env=environment
                )
            )
            for index in range(2)
        ]
        ends = processes.end_all(two)
    assert all("both agree" in end.stdout for end in ends)
    # Process 0 warns.
    assert sum("going on from step 20" in end.stdout + end.stderr for end in ends) == 1

    # One process with other devices goes on from it.
    assert on_disk(tmp_path / "checkpoints") == [10, 20, 30]
    assert on_disk(tmp_path / "checkpoints-damaged") == [30]
    assert_same(restore_state(tmp_path, abstract(8))[0], make_state(31))
