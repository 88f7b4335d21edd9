"""big_vision's .npz: 'params/img/...', layers one by one or stacked."""

import pathlib

from siglip.checkpoints import npz_file, spec
from siglip.checkpoints.weights import Weights, stack, unstack

PREFIXES = ("params/", "opt/target/", "")


def read(path: pathlib.Path) -> Weights:
    """
    Raises:
      CheckpointError: it cannot be read, or holds no model of this family.
    """
    leaves = npz_file.read(path)
    for prefix in PREFIXES:
        found = {n.removeprefix(prefix): leaf for n, leaf in leaves.items() if n.startswith(prefix)}
        # Beside parameters, a training checkpoint holds optimizer state and counters.
        found = {
            n: leaf for n, leaf in found.items() if n.split("/")[0] in ("img", "txt", "t", "b")
        }
        if found:
            break
    else:
        found = {}
    found = unstack(found)
    beside = sidecar(path)
    shapes = {name: leaf.shape for name, leaf in found.items()}
    made = spec.load(beside) if beside.exists() else spec.infer(shapes, where=str(path))
    weights = Weights(found, made, str(path), "big_vision")
    weights.check()
    return weights


def sidecar(path: pathlib.Path) -> pathlib.Path:
    """'b16.npz' -> 'b16.siglip.json'."""
    return path.with_name(f"{path.stem}.{spec.FILE}")


def write(weights: Weights, path: pathlib.Path, *, stacked: bool = False) -> None:
    """Writes `path`, and what the model must be given beside it.

    Args:
      stacked: one array per kind of layer, as the SigLIP 2 files have it; else as those of SigLIP.
    """
    leaves = stack(weights.leaves) if stacked else weights.leaves
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = sidecar(path)
    # First, and gone after an error: arrays without their contract would be taken for others'.
    made = spec.with_tokenizer_beside(weights.spec, beside)
    try:
        spec.save(made, beside)
        npz_file.write(path, ((f"params/{name}", leaf) for name, leaf in leaves.items()))
    except BaseException:
        beside.unlink(missing_ok=True)
        if made is not weights.spec and made.tokenizer:
            copy = beside.with_name(made.tokenizer["path"])
            if copy != pathlib.Path((weights.spec.tokenizer or {})["path"]):
                copy.unlink(missing_ok=True)
        raise
