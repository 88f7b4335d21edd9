"""big_vision's .npz: 'params/img/...', layers one by one or stacked."""

import pathlib

from siglip.checkpoints import spec
from siglip.checkpoints.files import npz_file
from siglip.checkpoints.files.lazy_array import Leaf
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
        found = _tower_alone(leaves)
    found = unstack(found)
    towers = {name.split("/")[0] for name in found} & {"img", "txt"}
    if len(towers) == 1:  # whose temperature is of no use
        found = {n: leaf for n, leaf in found.items() if n not in ("t", "b")}
    beside = sidecar(path)
    shapes = {name: leaf.shape for name, leaf in found.items()}
    made = spec.load(beside) if beside.exists() else spec.infer(shapes, where=str(path))
    notes = []
    if made.img and not beside.exists() and not made.preset and not made.txt:
        notes.append(
            f"how images were prepared cannot be seen from a tower alone; {made.image!r} is taken"
        )
    weights = Weights(found, made, str(path), "big_vision", tuple(notes))
    weights.check()
    return weights


def _tower_alone(leaves: dict[str, Leaf]) -> dict[str, Leaf]:
    """A file of one tower, whose names begin with its parts."""
    parts = {
        "img": ("embedding", "pos_embedding", "Transformer", "MAPHead_0", "head", "cls"),
        "txt": ("Embed_0", "pos_embedding", "Encoder_0", "head", "MAPHead_0", "embed_projection"),
    }
    for prefix in PREFIXES:
        names = [n for n in leaves if n.startswith(prefix)]
        for tower, known in parts.items():
            mine = [n for n in names if n.removeprefix(prefix).split("/")[0] in known]
            if any(n.startswith(f"{prefix}{known[0]}/") for n in mine):
                return {f"{tower}/{n.removeprefix(prefix)}": leaves[n] for n in mine}
    return {}


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
