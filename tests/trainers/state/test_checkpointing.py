"""Checkpoints: saved, kept, restored, failed. (Damaged ones: test_checkpointing_damage.py.)"""

import contextlib
import json
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint._src.serialization import serialization
from tiny_state import DATA, abstract, assert_same, make_state, on_disk, saved, shardings

from base.errors import UserError
from trainers.state.checkpointing import Checkpoints, SaveError


@pytest.fixture
def make(tmp_path):
    with contextlib.ExitStack() as stack:

        def one(every=10, keep_last=2, keep_every=None):
            made = Checkpoints(tmp_path, every=every, keep_last=keep_last, keep_every=keep_every)
            stack.callback(made.close)
            return made

        yield one


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_restored_onto_any_number_of_devices_bit_for_bit(make, devices):
    state = jax.device_put(make_state(0.1), shardings(4))
    checkpoints = make()
    checkpoints.save(10, state, DATA)
    restored, data, step = checkpoints.restore(abstract(devices))
    assert (step, data) == (10, DATA)
    assert_same(restored, state)
    wanted = shardings(devices)
    assert restored.params["img"]["kernel"].sharding == wanted.params["img"]["kernel"]
    assert restored.opt_state[0].inner_state.mu["img"]["kernel"].dtype == jnp.bfloat16


def test_the_data_position_lies_beside_the_state_in_one_directory(tmp_path):
    directory = saved(tmp_path, 10)
    assert on_disk(directory) == [10]
    assert (directory / "10" / "state").is_dir()
    position = json.loads((directory / "10" / "data" / "metadata").read_text())
    assert position == DATA | {"step": 10}


def test_a_donated_state_is_saved_as_it_was(make):
    """On a CPU the copy to the host may be a view of the very buffer that the next step reuses."""
    donating = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    state = jax.device_put(make_state(rows=512), shardings(8))
    expected = jax.tree.map(lambda x: np.array(x, copy=True), state)
    checkpoints = make()
    checkpoints.save(10, state, DATA)
    for _ in range(4):
        state = donating(state)
    jax.block_until_ready(state)
    restored, _, _ = checkpoints.restore(abstract(8, jax.eval_shape(lambda: make_state(rows=512))))
    assert_same(restored, expected)


def test_due_every_k_steps(make):
    assert [step for step in range(31) if make(every=10).due(step)] == [0, 10, 20, 30]
    assert not any(make(every=None).due(step) for step in range(31))


def test_keeps_the_last_and_the_multiples(tmp_path):
    directory = saved(tmp_path, 5, 10, 15, 20, 25, keep_last=2, keep_every=10)
    assert on_disk(directory) == [10, 20, 25]
    saved(tmp_path, 30, keep_last=1)
    assert on_disk(directory) == [30]
    with pytest.raises(UserError, match=r"config\.checkpoint\.keep_last must be at least 1"):
        saved(tmp_path, keep_last=0)


def test_the_same_step_is_saved_once(make):
    checkpoints = make()
    assert checkpoints.save(10, make_state(), DATA) is True
    assert checkpoints.save(10, make_state(1), DATA) is False
    again = make()
    assert_same(again.restore(abstract())[0], make_state())
    assert again.save(10, make_state(1), DATA) is False


def test_an_older_step_than_the_newest_is_refused_and_not_dropped(tmp_path, make):
    """Orbax alone returns False here, and nobody looks."""
    saved(tmp_path, 10, 20)
    with pytest.raises(SaveError, match="already holds the newer or equal step 20"):
        make().save(15, make_state(15), DATA)


def test_a_save_that_orbax_declines_is_an_error(make, monkeypatch):
    checkpoints = make()
    monkeypatch.setattr(checkpoints._manager, "save", lambda *args, **keywords: False)
    with pytest.raises(SaveError, match="step 10 was not written: Orbax declined"):
        checkpoints.save(10, make_state(), DATA)


def slow_write(monkeypatch, failure=None):
    """Array writes wait for the returned event, then fail where there is a failure."""
    gate, write = threading.Event(), serialization.async_serialize_from_host

    async def wait(*args, **keywords):
        gate.wait(600)
        if failure:
            raise failure
        return await write(*args, **keywords)

    monkeypatch.setattr(serialization, "async_serialize_from_host", wait)
    return gate


def test_a_step_being_written_is_not_the_latest(tmp_path, make, monkeypatch):
    saved(tmp_path, 10)
    checkpoints, gate = make(), slow_write(monkeypatch)
    checkpoints.save(20, make_state(20), DATA)
    assert checkpoints.latest_step() == 10
    assert on_disk(checkpoints.directory) == [10]
    gate.set()
    checkpoints.wait()
    assert checkpoints.latest_step() == 20


FULL_DISK = ValueError("OUT_OF_RANGE: Failed writing\nto a full disk")


def test_a_failed_background_write_surfaces_and_leaves_no_phantom(tmp_path, make, monkeypatch):
    saved(tmp_path, 10)
    checkpoints = make(keep_last=1)
    with monkeypatch.context() as patch:
        slow_write(patch, FULL_DISK).set()
        checkpoints.save(20, make_state(20), DATA)
        with pytest.raises(SaveError) as error:
            checkpoints.wait()
    message = str(error.value)
    assert "checkpoint of step 20 was not written" in message
    assert "Failed writing to a full disk" in message
    assert "newest complete one is step 10" in message and "\n" not in message
    assert checkpoints.latest_step() == 10
    assert checkpoints.save(20, make_state(20), DATA)  # the disk has room again
    assert_same(checkpoints.restore(abstract())[0], make_state(20))
    assert on_disk(checkpoints.directory) == [20]  # 10 was not forgotten meanwhile


def test_a_failed_write_surfaces_at_the_next_save_and_at_close(make, monkeypatch):
    checkpoints = make()
    for act in (lambda: checkpoints.save(30, make_state(), DATA), checkpoints.close):
        with monkeypatch.context() as patch:
            slow_write(patch, FULL_DISK).set()
            checkpoints.save(20, make_state(20), DATA)
            with pytest.raises(SaveError, match=r"step 20 .* there is none"):
                act()


def test_what_was_half_written_is_removed_at_the_start(tmp_path, make):
    directory = saved(tmp_path, 10)
    stale = directory / "15.orbax-checkpoint-tmp"
    shutil.copytree(directory / "10", stale)
    again = make()
    assert again.latest_step() == 10
    again.save(20, make_state(20), DATA)
    again.wait()
    assert not stale.exists()


def test_a_save_of_one_process_compiles_nothing(make, caplog):
    """Orbax would compile a slice of each array for each device that holds a copy."""
    devices = jax.sharding.Mesh(jax.devices(), ("data",))
    state = jax.device_put(make_state(0.1), NamedSharding(devices, PartitionSpec()))
    checkpoints = make()
    with jax.log_compiles(), caplog.at_level("WARNING"):
        jnp.add(np.ones(77), 1)  # a new program, as a check of the check
        checkpoints.save(1, state, DATA)
        checkpoints.wait()
    assert [r.args[0] for r in caplog.records if "Compiling" in r.msg] == ["jit(add)"]
    assert_same(checkpoints.restore(abstract(8))[0], state)


def test_nothing_runs_on_after_the_end(tmp_path):
    """A start that fails right after this would end in a traceback of a thread of Orbax's."""
    (tmp_path / "checkpoints" / "7.orbax-checkpoint-tmp").mkdir(parents=True)
    before = set(threading.enumerate())
    Checkpoints(tmp_path, every=1, keep_last=1, keep_every=None).close()
    assert not [t for t in set(threading.enumerate()) - before if "Signaling" in type(t).__name__]
