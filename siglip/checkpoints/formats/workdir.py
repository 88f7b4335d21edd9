"""This project's own checkpoints: <workdir>/checkpoints/<step>/state, beside <workdir>/siglip.json.

Training reads them straight onto its devices (trainers/state/restoring.py); this is for all else.
"""

import pathlib
from typing import Any

import numpy as np

from siglip.checkpoints import spec
from siglip.checkpoints.errors import CheckpointError
from siglip.checkpoints.files.lazy_array import of_array
from siglip.checkpoints.weights import Weights, unstack

FOLDER = "checkpoints"  # in the workdir


def steps_on_disk(root: pathlib.Path) -> list[int]:
    """Committed steps, newest first. A step still being written has another name, until one rename
    commits it."""
    if not root.is_dir():
        return []
    committed = (int(p.name) for p in root.iterdir() if p.name.isdecimal() and p.is_dir())
    return sorted(committed, reverse=True)


def locate(path: str | pathlib.Path, *, key: str = "checkpoint") -> pathlib.Path:
    """The step directory that `path` means: itself, or the newest of a workdir.

    Raises:
      CheckpointError: there is none; `key` says in the message where the path was given.
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
    """The parameters of one step, without the optimizer's state.

    Raises:
      CheckpointError: there is none, it is damaged, or the run has never said what it is.
    """
    step = locate(path)
    file = step.parents[1] / spec.FILE
    if not file.exists():
        raise CheckpointError(
            f"{file} is not there, which says what the model is; `python main.py --workdir "
            f"{step.parents[1]} --eval_only` writes it"
        )
    made = spec.load(file)
    arrays = _restore(step)
    leaves = {name: of_array(array, f"{step}: {name}") for name, array in arrays.items()}
    leaves = unstack(leaves)
    weights = Weights(leaves, made, str(step), "workdir")
    weights.check()
    return weights


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
        told = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise CheckpointError(f"checkpoint {step} cannot be read: {told}") from error
    flat = jax.tree_util.tree_leaves_with_path(restored)
    return {"/".join(str(k.key) for k in path): np.asarray(array) for path, array in flat}
