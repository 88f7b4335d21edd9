"""Hugging Face folders of SiglipModel, Siglip2Model (NaFlex) and their towers alone.

transformers itself is not needed: names and layouts are in names.py, and config.json and the
processor's files, which are plain JSON, in hf_config.py.
"""

import dataclasses
import pathlib
from collections.abc import Mapping

import numpy as np

from base import whole_file
from siglip.checkpoints import spec
from siglip.checkpoints.files import safetensors_file
from siglip.checkpoints.files.lazy_array import LazyArray, of_array
from siglip.checkpoints.formats import hf_config, hf_tokenizer, names
from siglip.checkpoints.spec import Spec
from siglip.checkpoints.weights import Weights, compare
from siglip.towers.text import make_text

# Buffers that older versions of transformers saved.
IGNORED = ("embeddings.position_ids",)
HEAD = ("weight", "bias")


def read(folder: pathlib.Path) -> Weights:
    """The model of a folder.

    Raises:
      CheckpointError: files are missing or damaged, or are not of this family.
    """
    contract, theirs = _open(folder)
    shapes = contract.shapes()
    entries = list(names.huggingface(shapes, **_prefixes(contract, theirs)))
    in_file = {name: array.shape for name, array in theirs.items()}
    in_model = {entry.theirs: names.their_shape(entry, shapes) for entry in entries}
    for scalar in ("logit_scale", "logit_bias"):
        if in_file.get(scalar) == ():
            in_model[scalar] = ()
    compare(in_file, in_model, where=str(folder))
    ours = {
        name: array
        for entry in entries
        for name, array in names.to_ours(entry, theirs[entry.theirs], shapes)
    }
    return Weights({name: ours[name] for name in shapes}, contract, str(folder), "huggingface")


def read_contract(folder: pathlib.Path) -> Spec:
    """The contract of the model that `read` gives, from headers and JSON files.

    Raises:
      CheckpointError: files are missing or damaged, or are not of this family.
    """
    return _open(folder)[0]


def _open(folder: pathlib.Path) -> tuple[Spec, dict[str, LazyArray]]:
    """The contract, and the arrays by their names in the files, without fillers."""
    contract = hf_config.spec_of(folder)
    theirs = safetensors_file.read_folder(folder)
    theirs = {name: array for name, array in theirs.items() if not name.endswith(IGNORED)}
    if (folder / spec.FILE).exists():
        theirs = _without_fillers(theirs, contract)
    has_head = "head.weight" in {name.removeprefix("text_model.") for name in theirs}
    if contract.txt and has_head:
        out_dim = contract.txt.get("out_dim") or make_text(**contract.txt).width
        contract = dataclasses.replace(contract, txt={**contract.txt, "out_dim": out_dim})
    return dataclasses.replace(contract, bias="logit_bias" in theirs), theirs


def _without_fillers(theirs: dict[str, LazyArray], contract: Spec) -> dict[str, LazyArray]:
    """The arrays without those that `write` added because transformers has no model without them
    (a bias of 0, the identity as a head), unless somebody has trained them since."""
    fillers: list[str] = []
    logit_bias = theirs.get("logit_bias")
    if logit_bias and not contract.bias and not logit_bias.read().any():
        fillers.append("logit_bias")
    prefix = _prefixes(contract, theirs).get("text", "text_model.")
    head = [f"{prefix}head.{part}" for part in HEAD]
    if contract.txt and not contract.txt.get("out_dim") and all(name in theirs for name in head):
        weight, bias = (theirs[name].read() for name in head)
        if np.array_equal(weight, np.eye(len(weight), dtype=weight.dtype)) and not bias.any():
            fillers += head
    return {name: array for name, array in theirs.items() if name not in fillers}


def _prefixes(contract: Spec, theirs: Mapping[str, LazyArray]) -> dict[str, str]:
    """Keywords of names.huggingface: a tower alone is saved with its prefix or without, depending
    on who wrote it."""
    if contract.img and contract.txt:
        return {}
    key, prefix = ("vision", "vision_model.") if contract.img else ("text", "text_model.")
    return {} if any(name.startswith(prefix) for name in theirs) else {key: ""}


def write(weights: Weights, folder: pathlib.Path) -> tuple[str, ...]:
    """Writes a folder for AutoModel, AutoProcessor and AutoTokenizer, whole or not at all.

    Returns:
      A note for each thing that is not exact in it.

    Raises:
      CheckpointError: transformers has no such model.
    """
    with whole_file.create_folder(folder) as scratch:
        return _write(weights, scratch)


def _write(weights: Weights, folder: pathlib.Path) -> tuple[str, ...]:
    contract, notes = weights.spec, []
    hf_config.check_expressible(contract, "transformers")
    ours = dict(weights.arrays)
    if contract.txt and "txt/head/kernel" not in ours:
        width = make_text(**contract.txt).width
        dtype = ours["txt/pos_embedding"].dtype
        ours["txt/head/kernel"] = of_array(np.eye(width, dtype=dtype), "the identity")
        ours["txt/head/bias"] = of_array(np.zeros(width, dtype), "zeros")
        notes.append("the text tower has no head: an identity was written")
    if contract.img and contract.txt and "b" not in ours:
        ours["b"] = of_array(np.zeros(1, ours["t"].dtype), "zero")
        notes.append("the model has no bias: 0 was written")
    shapes = {name: array.shape for name, array in ours.items()}
    theirs = {e.theirs: names.to_theirs(e, ours) for e in names.huggingface(shapes)}
    safetensors_file.write(folder / "model.safetensors", theirs, {"format": "pt"})
    dtypes = {str(array.dtype) for array in theirs.values()}
    config = hf_config.config_of(contract, dtypes.pop() if len(dtypes) == 1 else "float32")
    hf_config.write_json(config, folder / "config.json")
    if contract.img:
        processor, exact = hf_config.processor_of(contract)
        hf_config.write_json(processor, folder / "preprocessor_config.json")
        if not exact:
            notes.append(
                f"images are prepared by {contract.image!r} here, by Pillow's bilinear resize "
                "there: not equal to the pixel"
            )
    if contract.txt:
        contract, more = hf_tokenizer.write(contract, folder)
        notes += more
    spec.save(spec.with_tokenizer_beside(contract, folder / spec.FILE), folder / spec.FILE)
    return tuple(notes)
