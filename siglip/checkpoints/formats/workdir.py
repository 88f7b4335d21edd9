"""Workdirs of this project: <workdir>/checkpoints/<step>/state, and <workdir>/siglip.json.

Training reads them straight onto its devices (trainers/state/restoring.py); all else reads them
with this module.
"""

import dataclasses
import pathlib
from typing import Any

import numpy as np

from base.words import one_line
from siglip.checkpoints import spec
from siglip.checkpoints.errors import CheckpointError
from siglip.checkpoints.files.lazy_array import of_array
from siglip.checkpoints.spec import Spec
from siglip.checkpoints.weights import Weights, split, unstack

FOLDER = "checkpoints"  # in the workdir


def steps_on_disk(root: pathlib.Path) -> list[int]:
    """Committed steps, newest first. A step still being written has another name, until one rename
    commits it."""
    if not root.is_dir():
        return []
    committed = (int(p.name) for p in root.iterdir() if p.name.isdecimal() and p.is_dir())
    return sorted(committed, reverse=True)


def locate(path: str | pathlib.Path, *, key: str = "checkpoint") -> pathlib.Path:
    """The step directory that `path` names: itself, or the newest one of a workdir.

    Args:
      key: the name of the setting that holds the path, for the message.

    Raises:
      CheckpointError: there is no step.
    """
    given = pathlib.Path(path).absolute()
    if given.name.isdecimal() and (given / "state").is_dir():
        return given
    if not given.exists():
        raise CheckpointError(
            f"{key} = '{path}': no such directory; give a workdir, or one step of it"
        )
    for root in (given / FOLDER, given):
        if steps := steps_on_disk(root):
            return root / str(steps[0])
    raise CheckpointError(
        f"{key} = '{path}' holds no checkpoint; give a workdir with {FOLDER}/<step> in it, or "
        "the directory of one step"
    )


def is_one(path: pathlib.Path) -> bool:
    """Whether `path` is a workdir, its folder of checkpoints, or one step."""
    own = path.name.isdecimal() and (path / "state").is_dir()
    return own or any(steps_on_disk(root) for root in (path / FOLDER, path))


def read(path: pathlib.Path) -> Weights:
    """The towers of one step, with a note on other subtrees of its parameters, which are left.

    Raises:
      CheckpointError: there is no step, it is damaged, or the workdir has no siglip.json.
    """
    contract = read_contract(path)
    step = locate(path)
    arrays = {name: of_array(array, f"{step}: {name}") for name, array in _restore(step).items()}
    weights, notes = split(Weights(unstack(arrays), contract, str(step), "workdir"))
    weights.check()
    return dataclasses.replace(weights, notes=notes)


def read_contract(path: pathlib.Path) -> Spec:
    """The contract of a run, from its siglip.json.

    Raises:
      CheckpointError: there is no step, or the workdir has no siglip.json.
    """
    step = locate(path)
    file = step.parents[1] / spec.FILE
    if not file.exists():
        raise CheckpointError(
            f"{file} is not there, which says what the model is; `python main.py --workdir "
            f"{step.parents[1]} --eval_only` writes it"
        )
    return spec.load(file)


def _restore(step: pathlib.Path) -> dict[str, np.ndarray]:
    import jax
    import orbax.checkpoint as ocp

    handler: Any = ocp.PyTreeCheckpointHandler()
    try:
        saved = handler.metadata(step / "state").tree["params"]
        args: Any = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
        item = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), saved)
        restored = handler.restore(
            step / "state",
            args=ocp.args.PyTreeRestore(
                item={"params": item}, restore_args={"params": args}, partial_restore=True
            ),
        )["params"]
    except (MemoryError, PermissionError):
        raise
    except Exception as error:  # whatever broken files raise in Orbax
        message = one_line(error, with_type=True)
        raise CheckpointError(f"checkpoint {step} cannot be read: {message}") from error
    flat = jax.tree_util.tree_leaves_with_path(restored)
    return {"/".join(str(k.key) for k in path): np.asarray(array) for path, array in flat}
