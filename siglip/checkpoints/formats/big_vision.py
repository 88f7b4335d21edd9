"""big_vision's .npz: 'params/img/...', layers one by one or stacked."""

import dataclasses
import pathlib
from collections.abc import Mapping

from siglip.checkpoints import spec
from siglip.checkpoints.files import npz_file
from siglip.checkpoints.files.lazy_array import LazyArray
from siglip.checkpoints.spec import Spec
from siglip.checkpoints.weights import Weights, split, stack, unstack
from siglip.towers.two_towers import PARTS, TOWERS

# Where parameters lie: saved alone, in a training checkpoint, and without a prefix.
PREFIXES = ("params/", "opt/target/", "")
# First parts of the names of a tower that was saved alone; the first one tells which tower it is.
ALONE = {
    "img": ("embedding", "pos_embedding", "Transformer", "MAPHead_0", "head", "cls"),
    "txt": ("Embed_0", "pos_embedding", "Encoder_0", "head", "MAPHead_0", "embed_projection"),
}


def read(path: pathlib.Path) -> Weights:
    """The model of an .npz.

    Raises:
      CheckpointError: it cannot be read, or holds no model of this family.
    """
    contract, arrays = _open(path)
    notes = []
    if contract.img and not contract.txt and not contract.preset and not sidecar(path).exists():
        notes.append(
            "how images were prepared cannot be seen from a tower alone; "
            f"{contract.image!r} is taken"
        )
    weights, left_out = split(Weights(arrays, contract, str(path), "big_vision"))
    weights.check()
    return dataclasses.replace(weights, notes=(*notes, *left_out))


def read_contract(path: pathlib.Path) -> Spec:
    """The contract of the model that `read` gives, from headers and the file beside it.

    Raises:
      CheckpointError: it cannot be read, or holds no model of this family.
    """
    return _open(path)[0]


def _open(path: pathlib.Path) -> tuple[Spec, dict[str, LazyArray]]:
    in_file = npz_file.read(path)
    for prefix in PREFIXES:
        arrays = {n.removeprefix(prefix): x for n, x in in_file.items() if n.startswith(prefix)}
        if not prefix:  # beside them, a training checkpoint holds optimizer state and counters
            arrays = {name: array for name, array in arrays.items() if _is_part(name)}
        if any(map(_is_part, arrays)):
            break
    else:
        arrays = _tower_alone(in_file)
    arrays = unstack(arrays)
    towers = {name.split("/")[0] for name in arrays} & set(TOWERS)
    if len(towers) == 1:  # the temperature is of no use without the other tower
        arrays = {name: array for name, array in arrays.items() if name not in ("t", "b")}
    beside = sidecar(path)
    if beside.exists():
        return spec.load(beside), arrays
    shapes = {name: array.shape for name, array in arrays.items() if _is_part(name)}
    return spec.infer(shapes, where=str(path)), arrays


def _is_part(name: str) -> bool:
    return name.split("/")[0] in PARTS


def _tower_alone(in_file: Mapping[str, LazyArray]) -> dict[str, LazyArray]:
    """The arrays of a file of one tower, whose names begin with its parts, as 'img/...'."""
    for prefix in PREFIXES:
        names = [name for name in in_file if name.startswith(prefix)]
        for tower, parts in ALONE.items():
            own = [name for name in names if name.removeprefix(prefix).split("/")[0] in parts]
            if any(name.startswith(f"{prefix}{parts[0]}/") for name in own):
                return {f"{tower}/{name.removeprefix(prefix)}": in_file[name] for name in own}
    return {}


def sidecar(path: pathlib.Path) -> pathlib.Path:
    """'b16.npz' -> 'b16.siglip.json'."""
    return path.with_name(f"{path.stem}.{spec.FILE}")


def write(weights: Weights, path: pathlib.Path, *, stacked: bool = False) -> tuple[str, ...]:
    """Writes `path`, and the contract of the model beside it. Nothing is inexact: no notes.

    Args:
      stacked: one array for each kind of layer, as in the SigLIP 2 files; else one for each layer,
        as in those of SigLIP.
    """
    arrays = stack(weights.arrays) if stacked else weights.arrays
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = sidecar(path)
    # The contract is written first and removed after an error: without it, the arrays could be
    # taken for those of another model.
    contract = spec.with_tokenizer_beside(weights.spec, beside)
    try:
        spec.save(contract, beside)
        npz_file.write(path, ((f"params/{name}", array) for name, array in arrays.items()))
    except BaseException:
        beside.unlink(missing_ok=True)
        if contract is not weights.spec and contract.tokenizer:
            copy = beside.with_name(contract.tokenizer["path"])
            if copy != pathlib.Path((weights.spec.tokenizer or {})["path"]):
                copy.unlink(missing_ok=True)
        raise
    return ()
