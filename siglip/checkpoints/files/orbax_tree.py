"""Trees of arrays that Orbax has written, read onto devices or into host memory."""

import functools
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from base.words import one_line
from siglip.checkpoints.errors import CheckpointError
from siglip.leaf_names import leaves, path_name


class DamagedCheckpoint(CheckpointError):
    """A checkpoint that is there but cannot be read. The message is one line."""


@functools.cache
def _handlers() -> tuple[Any, Any]:
    """Orbax's handlers of a tree of arrays and of JSON; made late, as they start the jax backend.

    A Checkpointer around them would wait for all processes after a restore, where one that met a
    damaged file would never arrive. (Any: they take a pathlib.Path, but do not say so.)
    """
    import orbax.checkpoint as ocp

    return ocp.PyTreeCheckpointHandler(), ocp.JsonCheckpointHandler()


def saved(step: pathlib.Path) -> dict[str, Any]:
    """Name -> metadata (shape, dtype) of the arrays of one step.

    Raises:
      DamagedCheckpoint: they cannot be read.
    """
    handler, _ = _handlers()
    return leaves(_or_damaged(step, lambda: handler.metadata(step / "state").tree))


def to_devices(step: pathlib.Path, abstract: Any, *, partial: bool = False) -> Any:
    """The arrays of one step as a tree like `abstract`, each straight onto its sharding.

    Args:
      abstract: a tree of ShapeDtypeStructs, whatever devices the arrays were saved from; without a
        sharding they go to the first device.
      partial: other arrays of the step are left.

    Raises:
      DamagedCheckpoint: they cannot be read.
    """
    import orbax.checkpoint as ocp

    abstract = jax.tree.map(_placed, abstract)
    args = ocp.checkpoint_utils.construct_restore_args(abstract)
    return _restore(step, abstract, args, partial=partial)


def some_to_devices(step: pathlib.Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays of one step by name, each straight onto the sharding of its ShapeDtypeStruct.

    Raises:
      DamagedCheckpoint: they cannot be read.
    """
    import orbax.checkpoint as ocp

    handler, _ = _handlers()
    tree = _or_damaged(step, lambda: handler.metadata(step / "state").tree)
    placed = {name: _placed(leaf) for name, leaf in wanted.items()}
    args = ocp.checkpoint_utils.construct_restore_args(placed)

    def in_file(values: dict[str, Any], other: Any) -> Any:
        """A tree of the file's structure, with the values of the arrays that are wanted."""
        return jax.tree_util.tree_map_with_path(
            lambda path, _: values.get(path_name(path), other), tree
        )

    item, args = in_file(placed, ocp.PLACEHOLDER), in_file(args, ocp.RestoreArgs())
    restored = leaves(_restore(step, item, args, partial=False))
    return {name: restored[name] for name in wanted}


def _placed(leaf: Any) -> Any:
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def to_host(step: pathlib.Path, abstract: Any) -> Any:
    """Some arrays of one step in host memory, as a tree like `abstract`.

    Raises:
      DamagedCheckpoint: they cannot be read.
    """
    import orbax.checkpoint as ocp

    args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), abstract)
    item = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), abstract)
    return _restore(step, item, args, partial=True)


def _restore(step: pathlib.Path, item: Any, restore_args: Any, *, partial: bool) -> Any:
    import orbax.checkpoint as ocp

    handler, _ = _handlers()
    args = ocp.args.PyTreeRestore(item=item, restore_args=restore_args, partial_restore=partial)
    return _or_damaged(step, lambda: handler.restore(step / "state", args=args))


def json_item(step: pathlib.Path, item: str) -> dict[str, Any]:
    """A JSON item of one step, such as 'data'.

    Raises:
      DamagedCheckpoint: it cannot be read.
    """
    import orbax.checkpoint as ocp

    _, handler = _handlers()
    return _or_damaged(step, lambda: handler.restore(step / item, args=ocp.args.JsonRestore()))


def _or_damaged(step: pathlib.Path, read: Callable[[], Any]) -> Any:
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
        message = one_line(error, with_type=True)
        raise DamagedCheckpoint(f"checkpoint {step} cannot be read: {message}") from error


@functools.cache  # once in a process
def _silence_late_reads() -> None:
    """Orbax reads arrays in parallel. When one fails, the others finish later and find their event
    loop gone: Python would print a page about each of them, after our one line."""
    previous = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if unraisable.object is not None or str(unraisable.exc_value) != "Event loop is closed":
            previous(unraisable)

    sys.unraisablehook = hook
