"""Released formats in and out: big_vision's .npz, Hugging Face's and open_clip's safetensors, and
this project's own checkpoints. Nothing is ever unpickled."""

import pathlib
from typing import Any

from siglip import presets
from siglip.checkpoints.errors import CheckpointError
from siglip.checkpoints.formats import (
    big_vision,
    hub,
    huggingface,
    open_clip_format,
    random_weights,
    workdir,
)
from siglip.checkpoints.spec import Spec
from siglip.checkpoints.weights import Weights, split

__all__ = ["FORMATS", "CheckpointError", "Spec", "Weights", "contract_of", "read", "write"]

# Formats that `write` knows.
FORMATS = {
    "huggingface": huggingface.write,
    "big_vision": big_vision.write,
    "open_clip": open_clip_format.write,
}


def read(source: str | pathlib.Path) -> Weights:
    """The model at a path, whatever its format, or a released one by name.

    Arrays are read when they are used. `source` is
    * an .npz of big_vision;
    * a folder of Hugging Face's transformers, or of open_clip, or the .safetensors in it;
    * a workdir of this project, or one step of it;
    * the name of a preset (presets.PRESETS), or 'random:NAME' for that model with random weights.

    Raises:
      CheckpointError: there is nothing, it is damaged, or it is no SigLIP model. One line.
    """
    format, place = _locate(source)
    return format.read(place)


def contract_of(source: str | pathlib.Path) -> Spec:
    """The contract of the model that `read(source)` gives: its towers' sizes, `res`, `token_len`,
    tokenizer, vocabulary and preprocessing.

    It is cheap: siglip.json, config.json and headers of arrays are read, nothing is downloaded
    (a preset that is not in the cache has no tokenizer), and no jax backend is started, so that a
    trainer may complete its config from it before it calls jax.distributed.initialize. Whether
    the arrays fit the contract is what `read` checks.

    Raises:
      CheckpointError: there is nothing, it is damaged, or it is no SigLIP model. One line.
    """
    format, place = _locate(source)
    return format.read_contract(place)


def _locate(source: str | pathlib.Path) -> tuple[Any, Any]:
    """The module of formats/ that reads `source`, and what its functions take."""
    name, path = str(source), pathlib.Path(source)
    if name.startswith(random_weights.PREFIX):
        return random_weights, name
    if path.is_file():
        if path.suffix == ".npz":
            return big_vision, path
        if path.suffix == ".safetensors":
            # By its name: a folder may hold the files of both, or another model's beside them.
            theirs = path.name.startswith("model") and (path.parent / "config.json").exists()
            return (huggingface, path.parent) if theirs else (open_clip_format, path)
        raise CheckpointError(
            f"{path} ends in neither .npz nor .safetensors; nothing else is read (a .bin, .pt or "
            ".pkl is a pickle, which can run any program: convert it to safetensors)"
        )
    if path.is_dir():
        if workdir.is_one(path):
            return workdir, path
        if (path / open_clip_format.MODEL).exists():
            return open_clip_format, path
        if (path / "config.json").exists():
            return huggingface, path
        raise CheckpointError(
            f"{path} holds neither a run of this project ({workdir.FOLDER}/<step>) nor config.json "
            f"(Hugging Face) nor {open_clip_format.MODEL}"
        )
    if path.suffix in (".npz", ".safetensors") or path.is_absolute():
        raise CheckpointError(f"{path}: there is no such file or folder")
    try:
        return hub, presets.find(name)
    except ValueError as error:
        if name.startswith(".") or (len(path.parts) > 1 and path.parts[0] != "google"):
            raise CheckpointError(f"{path}: there is no such file or folder") from None
        raise CheckpointError(f"{name} is no path here, and as a released model: {error}") from None


def write(
    weights: Weights, path: str | pathlib.Path, format: str, **options: bool
) -> tuple[str, ...]:
    """Writes a model in one of FORMATS, the towers and the temperature of it.

    Returns:
      A note for each thing that is not exact there or was left out.

    Raises:
      CheckpointError: `path` is there already, or the format has no such model.
    """
    path = pathlib.Path(path)
    if path.exists():
        raise CheckpointError(f"{path} is there already; choose another name, or delete it")
    if format not in FORMATS:
        raise CheckpointError(f"format {format!r} is none of {', '.join(FORMATS)}")
    weights, left_out = split(weights)
    return (*left_out, *FORMATS[format](weights, path, **options))
