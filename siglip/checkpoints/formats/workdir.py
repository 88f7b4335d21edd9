"""Workdirs of this project: <workdir>/checkpoints/<step>/state, and <workdir>/siglip.json.

Training restores its state straight onto its devices (trainers/state/restoring.py); all else reads
the parameters with this module.
"""

import collections
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from base.nested import insert
from siglip.checkpoints import spec
from siglip.checkpoints.errors import CheckpointError
from siglip.checkpoints.files import orbax_tree
from siglip.checkpoints.files.lazy_array import of_array
from siglip.checkpoints.spec import Spec
from siglip.checkpoints.weights import Weights, unstack
from siglip.leaf_names import leaves
from siglip.towers.two_towers import PARTS

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
    """The towers of one step, with a note on what else its state holds, which is left.

    Raises:
      CheckpointError: there is no step, it is damaged, or the workdir has no siglip.json.
    """
    contract = read_contract(path)
    step = locate(path)
    arrays, notes = _read_arrays(step)
    lazy = {name: of_array(array, f"{step}: {name}") for name, array in arrays.items()}
    weights = Weights(unstack(lazy), contract, str(step), "workdir", notes)
    weights.check()
    return weights


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


def is_in_subtrees(name: str, subtrees: Iterable[str]) -> bool:
    """Whether the leaf 'params/SUBTREE/...' of a state is in one of some subtrees of parameters."""
    branch, _, rest = name.partition("/")
    return branch == "params" and rest.partition("/")[0] in subtrees


def left_out(
    step: pathlib.Path,
    saved: Iterable[str],
    subtrees: Iterable[str],
    averaged: Iterable[str] = (),
) -> tuple[str, ...]:
    """A note on what of a state is neither in these subtrees of parameters nor the usual state of
    the optimizer; () where that is all.

    Args:
      saved: names of the leaves: 'params/decoder/...', 'averaged/img/...', 'carried/...'.
      averaged: subtrees whose moving averages are used too.
    """
    counts: collections.Counter[str] = collections.Counter()
    for name in saved:
        branch, _, rest = name.partition("/")
        if branch == "params":
            if not is_in_subtrees(name, subtrees):
                counts[f"params/{rest.partition('/')[0]}"] += 1
        elif branch == "averaged" and rest.partition("/")[0] in averaged:
            continue
        elif branch not in ("step", "opt_state"):
            counts[branch] += 1
    if not counts:
        return ()
    shown = ", ".join(f"{what} ({count} arrays)" for what, count in counts.items())
    return (f"{step} also holds {shown}, which were left out",)


def _read_arrays(step: pathlib.Path) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """The arrays of PARTS by name, and notes on all others."""
    saved = orbax_tree.saved(step)
    tree: dict[str, Any] = {}
    for name, leaf in saved.items():
        if is_in_subtrees(name, PARTS):
            insert(tree, name, leaf, "/")
    arrays = leaves(orbax_tree.to_host(step, tree).get("params", {}) if tree else {})
    return {n: np.asarray(a) for n, a in arrays.items()}, left_out(step, saved, PARTS)
