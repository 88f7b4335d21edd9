"""Two processes with two devices each do what one process with four does, and stop together."""

import contextlib
import re
import signal
import socket

import numpy as np
import processes
import pytest
import tiny_run
from tiny_run import Tiny

import main as program

STEPS = 40
FLAGS = (
    f"--config.total={STEPS} steps",
    "--config.checkpoint.every=15 steps",
    "--config.evals.val.every=20 steps",
    "--config.evals.retrieval.every=30 steps",
)
EVALS = "val+retrieval"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return Tiny(tmp_path_factory.mktemp("tiny"))


@contextlib.contextmanager
def two_started(tiny, workdir):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = (*FLAGS, "--config.mesh.cpu_devices=2", f"--coordinator_address=127.0.0.1:{port}")
    commands = [
        tiny.command(workdir, *common, "--num_processes=2", f"--process_id={i}", evals=EVALS)
        for i in range(2)
    ]
    with tiny.started(commands[0]) as first, tiny.started(commands[1]) as second:
        yield first, second


@pytest.mark.slow
def test_two_processes_are_one_and_stop_at_the_same_step(tiny, tmp_path):
    one = tmp_path / "one"
    tiny.ended(tiny.command(one, *FLAGS, "--config.mesh.cpu_devices=4", evals=EVALS))

    # SIGTERM to one of the two: both save the same step.
    two = tmp_path / "two"
    with two_started(tiny, two) as running:
        processes.read_until(running[0], f"step  7/{STEPS}")
        running[1].send_signal(signal.SIGTERM)
        said = [processes.end(process, program.INTERRUPTED).stderr for process in running]
    stopped = [re.search(r"stopped at step (\d+) of \d+, saved in (\S+); ", err) for err in said]
    assert stopped[0][0] == stopped[1][0]
    step = int(stopped[0][1])
    assert 7 < step < STEPS and max(tiny_run.on_disk(two)) == step
    assert tiny_run.steps_with(two, "loss")[-1] == step

    # The same command goes on, and only process 0 has anything to say or to write.
    with two_started(tiny, two) as running:
        out, other = (processes.end(process, program.DONE).stdout for process in running)
    assert f"going on from step {step} of {two}" in out and "devices: 4 cpu" in out
    assert "memory of a step: " in out
    said = [line for line in other.splitlines() if not line.startswith("[Gloo]")]  # jaxlib's
    assert len(said) == 1 and said[0].startswith("distributed: process 1 of 2, ")
    assert len(list(two.glob("events.out.tfevents.*"))) == 2  # one a life

    assert tiny_run.steps_with(two, "loss") == list(range(1, STEPS + 1))
    np.testing.assert_allclose(tiny_run.losses(two), tiny_run.losses(one), rtol=1e-5)
    for key in ("val/loss", "retrieval/t2i_R@1"):
        assert tiny_run.steps_with(two, key) == tiny_run.steps_with(one, key)
    results, expected = tiny_run.results(two), tiny_run.results(one)
    for got in (results, expected):
        assert got["val"]["loss"].pop("value") == pytest.approx(
            tiny_run.events(one)[-1]["val/loss"]
        )
    assert results == expected
