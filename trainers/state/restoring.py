"""Reading checkpoints: which one, does it fit the model, straight onto the devices.

A checkpoint is a directory <workdir>/checkpoints/<step>/ with the items `state` (a pytree of
arrays) and `data` (the data position, JSON). Wherever a path is taken, it is a workdir or the
directory of one step. All processes call the functions here together.
"""

import functools
import pathlib
import sys
from typing import Any

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from base.errors import UserError
from base.words import one_line
from siglip.checkpoints.errors import CheckpointError
from siglip.checkpoints.formats import workdir as workdir_format
from siglip.checkpoints.weights import compare
from trainers.step.rules import path_name


@functools.cache
def _handlers() -> tuple[Any, Any]:
    """For the tree of arrays and for JSON; made late, because they start the jax backend.

    The bare handlers: a Checkpointer around them waits for all processes after a restore, where
    one that met a damaged file would never arrive. (Any: they take a pathlib.Path, but do not say
    so.)
    """
    return ocp.PyTreeCheckpointHandler(), ocp.JsonCheckpointHandler()


class DamagedCheckpoint(Exception):
    """A step directory that is there but cannot be read. The message is one line."""


def locate(path: str | pathlib.Path, *, key: str = "checkpoint") -> pathlib.Path:
    """The step directory that `path` means: itself, or the newest of a workdir."""
    try:
        return workdir_format.locate(path, key=key)
    except CheckpointError as error:
        raise UserError(str(error)) from None


def restore_state(path: str | pathlib.Path, abstract_state: PyTree) -> tuple[PyTree, dict, int]:
    """(state, data, step) of another run. See `read_step`; damage is a UserError here, because
    nothing of somebody else's run is set aside."""
    found = locate(path, key="config.resume")
    try:
        state, data = read_step(found, abstract_state)
    except DamagedCheckpoint as damage:
        raise UserError(f"{damage}; give the directory of another step") from damage
    return state, data, int(found.name)


def restore_params(path: str | pathlib.Path, abstract_params: PyTree) -> PyTree:
    """Only the weights (`state.params`) of a checkpoint; the rest is not read. Raises UserError."""
    found = locate(path, key="config.init")
    try:
        return _read_state(found, {"params": abstract_params}, partial=True)["params"]
    except DamagedCheckpoint as damage:
        raise UserError(f"{damage}; give the directory of another step") from damage


def read_step(path: pathlib.Path, abstract_state: PyTree) -> tuple[PyTree, dict]:
    """(state, data) of one step directory.

    `abstract_state` is a tree of ShapeDtypeStructs; every array goes straight onto their
    shardings, whatever devices it was saved from (without a sharding: the first device).

    Raises UserError where the arrays differ from `abstract_state` in name, shape or dtype, and
    DamagedCheckpoint where they cannot be read.
    """
    state = _read_state(path, abstract_state)
    json_args = ocp.args.JsonRestore()
    _, from_json = _handlers()
    return state, _or_damaged(path, lambda: from_json.restore(path / "data", args=json_args))


def _read_state(path: pathlib.Path, abstract: PyTree, partial: bool = False) -> PyTree:
    tree, _ = _handlers()
    saved = _or_damaged(path, lambda: tree.metadata(path / "state").tree)
    _check_fits(path, saved, abstract, partial)
    abstract = jax.tree.map(_placed, abstract)
    args = ocp.args.PyTreeRestore(
        item=abstract,
        restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
        partial_restore=partial,
    )
    return _or_damaged(path, lambda: tree.restore(path / "state", args=args))


def _placed(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _or_damaged(path: pathlib.Path, read: Any) -> Any:
    """read(), with what broken files raise turned into DamagedCheckpoint. A machine without
    memory or permission says nothing about the files, so those errors pass."""
    _silence_late_reads()
    try:
        return read()
    except (MemoryError, PermissionError):
        raise
    except Exception as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise
        raise DamagedCheckpoint(
            f"checkpoint {path} cannot be read: {one_line(error, with_type=True)}"
        ) from error


@functools.cache  # once in a process
def _silence_late_reads() -> None:
    """Orbax reads arrays in parallel. When one fails, the others finish later and find their event
    loop gone: Python would print a page about each of them, after our one line."""
    previous = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if unraisable.object is not None or str(unraisable.exc_value) != "Event loop is closed":
            previous(unraisable)

    sys.unraisablehook = hook


def _check_fits(path: pathlib.Path, saved: PyTree, wanted: PyTree, partial: bool) -> None:
    """UserError with the arrays that differ. Nothing is cast: f32 weights read as bf16 would
    train on without a word."""
    have, want = _described(saved), _described(wanted)
    if partial:
        have = {name: what for name, what in have.items() if name.startswith("params/")}
    try:
        compare(have, want, where=f"checkpoint {path}", what="shape or dtype")
    except CheckpointError as error:
        raise UserError(str(error)) from None


def _described(tree: PyTree) -> dict[str, str]:
    """{'params/img/...': 'float32[768,768]'}, for abstract arrays and Orbax' metadata alike."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_name(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}
