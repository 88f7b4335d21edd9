"""Checkpoints of a run: written in the background, kept by a policy, restored from the newest
that can be read."""

import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from base.errors import UserError
from base.words import one_line
from siglip.checkpoints.formats.workdir import FOLDER, steps_on_disk
from trainers.state.restoring import DamagedCheckpoint, read_step


class SaveError(RuntimeError):
    """A checkpoint was not written. The message names the step and the newest complete one."""


def _handler() -> ocp.PyTreeCheckpointHandler:
    """Writes trees of arrays.

    Orbax cuts an array that several devices hold alike into a slice for each of them, so that many
    hosts share the work: a compiled program for each array and device before the first checkpoint.
    One host alone would compile them for nothing.
    """
    if jax.process_count() > 1:
        return ocp.PyTreeCheckpointHandler()
    arrays = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


class Checkpoints:
    """The checkpoints of one workdir. Every process builds it and calls its methods together.

    Args:
      workdir: they lie in <workdir>/checkpoints/<step>.
      every: steps between two saves (see `due`); None: only on request.
      keep_last: how many of the newest stay, at least one.
      keep_every: steps that are multiples of it stay too, for ever; None: no others.

    What an earlier life left half written is removed here.
    """

    def __init__(
        self,
        workdir: str | pathlib.Path,
        *,
        every: int | None,
        keep_last: int,
        keep_every: int | None,
    ) -> None:
        if keep_last < 1:
            raise UserError(f"config.checkpoint.keep_last must be at least 1, not {keep_last}")
        self.every = every
        self.directory = pathlib.Path(workdir).absolute() / FOLDER
        keep: list[Any] = [ocp.checkpoint_managers.LatestN(keep_last)]
        if keep_every:
            keep.append(ocp.checkpoint_managers.EveryNSteps(keep_every))
        self._manager = ocp.CheckpointManager(
            self.directory,
            item_handlers={"state": _handler(), "data": ocp.JsonCheckpointHandler()},
            options=ocp.CheckpointManagerOptions(
                preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(keep),
                cleanup_tmp_directories=True,
            ),
        )
        self._newest: int | None = None  # saved or restored by this object
        self._pending: int | None = None  # being written

    def due(self, step: int) -> bool:
        """Is it time for a periodic save?"""
        return bool(self.every) and step % self.every == 0

    def save(self, step: int, state: PyTree, data: dict) -> bool:
        """Start to write `state` and the data position (JSON) as one checkpoint.

        Returns once the arrays are copied to the host, so `state` may be donated to the next step;
        False where this very step was saved or restored before, so there is nothing to do.
        Raises SaveError, also for the write before this one (then call it again).
        """
        self.wait()
        if step == self._newest:
            return False
        if (newest := max(self._manager.all_steps(), default=-1)) >= step:
            raise SaveError(
                f"checkpoint of step {step} was not written: {self.directory} already holds the "
                f"newer or equal step {newest}; move it away, or use another workdir"
            )
        items = ocp.args.Composite(state=ocp.args.PyTreeSave(state), data=ocp.args.JsonSave(data))
        self._pending = step
        try:
            started = self._manager.save(step, args=items, force=True)
        except Exception as error:
            self._raise_save_error(error)
        if not started:
            raise SaveError(f"checkpoint of step {step} was not written: Orbax declined it")
        self._newest = step
        return True

    def wait(self) -> None:
        """Until the last save is on disk. Raises SaveError where it failed."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._raise_save_error(error)
        self._pending = None

    def close(self) -> None:
        """Waits (and raises) as `wait`, then ends the background threads."""
        try:
            self.wait()
            # Orbax waits for the removal of half written steps before a save only; a program that
            # ends without one would be ended with a traceback from that thread.
            self._manager._maybe_await_cleanup_tmp_directory()
        finally:
            self._manager.close()

    def latest_step(self) -> int | None:
        """The newest complete step as process 0 sees the disk, None without any. A step that is
        still being written, or whose writing failed, is none."""
        return next(iter(self._steps()), None)

    def restore(self, abstract_state: PyTree, step: int | None = None) -> tuple[PyTree, dict, int]:
        """(state, data, step), each array straight onto the sharding of its ShapeDtypeStruct.

        1. With `step`: that one or an error.
        2. Otherwise the newest that can be read. Damaged newer ones are moved, never deleted, to
           <workdir>/checkpoints-damaged/, with a warning; but only once an older one has been
           read, because if none can, the files are likely not what is broken.

        Raises UserError where there is none, none can be read, or it does not fit the model.
        """
        self.wait()
        steps = self._steps() if step is None else [step]
        damages: dict[int, str] = {}
        for candidate in steps:
            restored, damage = self._try(candidate, abstract_state)
            if restored:
                self._set_aside(damages, candidate)
                self._newest = candidate
                return *restored, candidate
            damages[candidate] = damage
        if damages:
            raise UserError(
                f"no checkpoint can be restored; {next(iter(damages.values()))}; "
                f"to start anew move {self.directory} away"
            )
        raise UserError(f"no checkpoint in {self.directory}")

    def _try(self, step: int, abstract_state: PyTree) -> tuple[tuple[PyTree, dict] | None, str]:
        restored, damage = None, "another process could not read it"
        try:
            restored = read_step(self.directory / str(step), abstract_state)
        except DamagedCheckpoint as error:
            damage = str(error)
        return (restored, "") if _everywhere(restored is not None) else (None, damage)

    def _set_aside(self, damages: dict[int, str], instead: int) -> None:
        if not damages:
            return
        for step, damage in damages.items():
            if jax.process_index() == 0:
                moved = _free_path(self.directory.with_name(f"{FOLDER}-damaged") / str(step))
                moved.parent.mkdir(exist_ok=True)
                (self.directory / str(step)).rename(moved)
                logging.warning("%s; moved to %s, going on from step %d", damage, moved, instead)
        _everywhere(True)  # wait for the renames
        self._manager.reload()

    def _steps(self) -> list[int]:
        """Complete steps, newest first, as process 0 sees them."""
        steps = np.asarray(steps_on_disk(self.directory), np.int32)
        if jax.process_count() > 1:
            mine = jax.process_index() == 0
            count = int(multihost_utils.broadcast_one_to_all(np.int32(len(steps))))
            steps = steps if mine else np.zeros(count, np.int32)
            steps = np.asarray(multihost_utils.broadcast_one_to_all(steps))
        return steps.tolist()

    def _raise_save_error(self, error: Exception) -> None:
        failed, self._pending, self._newest = self._pending, None, None
        self._manager.reload()  # the disk decides what is there
        left = max(self._manager.all_steps(), default=None)
        why = one_line(error, with_type=True)
        raise SaveError(
            f"checkpoint of step {failed} was not written to {self.directory}: {why}; "
            + (f"the newest complete one is step {left}" if left is not None else "there is none")
        ) from error


def _everywhere(value: bool) -> bool:
    """Is it True in every process?"""
    if jax.process_count() == 1:
        return value
    return bool(np.all(multihost_utils.process_allgather(np.int32(value))))


def _free_path(path: pathlib.Path) -> pathlib.Path:
    tries = [path, *(path.with_name(f"{path.name}.{i}") for i in range(1, 1000))]
    return next(candidate for candidate in tries if not candidate.exists())
