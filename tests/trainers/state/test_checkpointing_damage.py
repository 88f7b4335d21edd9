"""Damaged checkpoints: the previous complete step, the bad one set aside, nothing deleted."""

import contextlib
import logging
import shutil

import pytest
from tiny_state import DATA, abstract, assert_same, make_state, on_disk, saved

from base.errors import UserError
from trainers.state.checkpointing import Checkpoints


def opened(workdir):
    return contextlib.closing(Checkpoints(workdir, every=10, keep_last=3, keep_every=None))


def truncate_data(folder):
    for path in (folder / "state").rglob("d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def drop_manifest(folder):
    for path in (folder / "state").rglob("manifest.ocdbt"):
        path.unlink()


def cut_metadata(folder):
    path = folder / "state" / "_METADATA"
    path.write_text(path.read_text()[:40])


def drop_state(folder):
    shutil.rmtree(folder / "state")


def drop_data(folder):
    shutil.rmtree(folder / "data")


def drop_all(folder):
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.mark.parametrize(
    "damage", [truncate_data, drop_manifest, cut_metadata, drop_state, drop_data, drop_all]
)
def test_a_damaged_newest_step_is_set_aside_for_the_previous_one(tmp_path, damage, caplog):
    directory = saved(tmp_path, 10, 20, 30, keep_last=3)
    damage(directory / "30")
    damage(directory / "20")
    before = sorted(path.name for path in (directory / "30").rglob("*"))
    with opened(tmp_path) as checkpoints:
        with caplog.at_level(logging.WARNING):
            state, data, step = checkpoints.restore(abstract())
        assert (step, data["step"]) == (10, 10)
        assert_same(state, make_state(10))
        aside = tmp_path / "checkpoints-damaged"
        assert on_disk(aside) == [20, 30]
        assert sorted(path.name for path in (aside / "30").rglob("*")) == before
        for bad in ("20", "30"):
            assert f"{directory / bad} cannot be read" in caplog.text
            assert f"moved to {aside / bad}, going on from step 10" in caplog.text
        assert checkpoints.latest_step() == 10
        assert checkpoints.save(20, make_state(20), DATA)  # the run goes on over the same steps
        checkpoints.wait()
        assert on_disk(directory) == [10, 20]


def test_set_aside_twice_keeps_both(tmp_path):
    for _ in range(2):
        directory = saved(tmp_path, *([] if (tmp_path / "checkpoints").exists() else [10]), 20)
        drop_state(directory / "20")
        with opened(tmp_path) as checkpoints:
            checkpoints.restore(abstract())
    aside = tmp_path / "checkpoints-damaged"
    assert sorted(path.name for path in aside.iterdir()) == ["20", "20.1"]


def test_if_no_step_can_be_read_nothing_is_moved_and_nothing_starts_anew(tmp_path):
    directory = saved(tmp_path, 10, 20)
    truncate_data(directory / "10")
    truncate_data(directory / "20")
    with opened(tmp_path) as checkpoints, pytest.raises(UserError) as error:
        checkpoints.restore(abstract())
    message = str(error.value)
    assert "no checkpoint can be restored" in message and f"{directory / '20'} cannot" in message
    assert "\n" not in message and len(message) < 700
    assert on_disk(directory) == [10, 20]


def test_a_named_step_is_that_one_or_an_error(tmp_path):
    directory = saved(tmp_path, 10, 20)
    truncate_data(directory / "20")
    with opened(tmp_path) as checkpoints:
        assert_same(checkpoints.restore(abstract(), step=10)[0], make_state(10))
        with pytest.raises(UserError, match="20 cannot be read"):
            checkpoints.restore(abstract(), step=20)
    assert on_disk(directory) == [10, 20]


def test_restore_without_a_checkpoint_says_so(tmp_path):
    with opened(tmp_path) as checkpoints, pytest.raises(UserError, match="no checkpoint in"):
        checkpoints.restore(abstract())


@pytest.mark.parametrize(
    "error", [MemoryError("x"), PermissionError("x"), RuntimeError("RESOURCE_EXHAUSTED: x")]
)
def test_no_memory_and_no_permission_are_not_damage(tmp_path, error, monkeypatch):
    def fail(*args, **keywords):
        raise error

    directory = saved(tmp_path, 10, 20)
    monkeypatch.setattr("orbax.checkpoint.PyTreeCheckpointHandler.restore", fail)
    with opened(tmp_path) as checkpoints, pytest.raises(type(error)):
        checkpoints.restore(abstract())
    assert on_disk(directory) == [10, 20]
