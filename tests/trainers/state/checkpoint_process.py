"""One of two processes that save and restore together; run by test_checkpointing_processes.py."""

import sys

import jax
import numpy as np

index, port, workdir = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, index)

from tiny_state import DATA, abstract, make_state, shardings  # noqa: E402

from trainers.state import checkpointing  # noqa: E402
from trainers.state.restoring import DamagedCheckpoint  # noqa: E402


def spread(value):
    """The state over all four devices; a process holds its half of the kernel."""
    return jax.tree.map(
        lambda x, s: jax.make_array_from_callback(x.shape, s, lambda at: np.asarray(x)[at]),
        make_state(value),
        shardings(4),
    )


def check(state, value):
    def one(got, want):
        for shard in got.addressable_shards:
            np.testing.assert_array_equal(shard.data, np.asarray(want)[shard.index])

    jax.tree.map(one, state, make_state(value))


def make():
    return checkpointing.Checkpoints(workdir, every=10, keep_last=3, keep_every=None)


checkpoints = make()
for step in (10, 20, 30):
    assert checkpoints.save(step, spread(step), DATA | {"step": step})
checkpoints.close()

# 1. Process 0 says which steps there are: process 1 is shown a stale, empty directory.
on_disk, read_step = checkpointing.steps_on_disk, checkpointing.read_step
if index == 1:
    checkpointing.steps_on_disk = lambda root: []
checkpoints = make()
assert checkpoints.latest_step() == 30
state, data, step = checkpoints.restore(abstract(4))
check(state, 30)
assert (data["step"], step) == (30, 30)


# 2. A step that only process 1 cannot read is given up by both, and moved once.
def read(path, wanted):
    if path.name == "30":
        raise DamagedCheckpoint(f"checkpoint {path} cannot be read: on this process only")
    return read_step(path, wanted)


if index == 1:
    checkpointing.read_step = read
state, data, step = checkpoints.restore(abstract(4))
check(state, 20)
assert (data["step"], step) == (20, 20)
assert checkpoints.latest_step() == 20

# 3. The run goes on over the same step.
assert checkpoints.save(30, spread(31), DATA)
checkpoints.close()
print("both agree", flush=True)
