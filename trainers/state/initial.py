"""config.init: weights to start from, of a run of this project or of a released model."""

import dataclasses
import pathlib
from typing import Any

import jax
from jaxtyping import PyTree

from base.errors import UserError
from siglip import checkpoints
from siglip.checkpoints import adapt, spec
from siglip.checkpoints.errors import CheckpointError
from siglip.checkpoints.weights import Weights, compare, insert, stack
from trainers.setup import Setup
from trainers.step.rules import path_name

PARTS = ("img", "txt", "t", "b")


def initial_params(
    setup: Setup, params: PyTree, source: str | pathlib.Path
) -> tuple[PyTree, list[str]]:
    """The parameters to start from, and what people should know about them.

    Args:
      params: fresh ones, on their devices, of which config.init_only leaves some.
      source: a path or name for checkpoints.read, from config.init.

    Raises:
      UserError: the weights cannot be read, or do not fit the model or its texts.
    """
    config = setup.config
    only = config.init_only or PARTS
    if unknown := [part for part in only if part not in PARTS]:
        raise UserError(f"config.init_only names {unknown[0]!r}, which is none of {PARTS}")
    try:
        weights = checkpoints.read(source)
        left_out = list(weights.notes)
        weights, notes = fitted(setup, _taken(weights, only), only)
        return _merged(weights, params, config.model.scan, only), [*left_out, *notes]
    except CheckpointError as error:
        raise UserError(f"config.init: {error}") from None


def _taken(weights: Weights, only: tuple[str, ...]) -> Weights:
    leaves = {name: leaf for name, leaf in weights.arrays.items() if name.split("/")[0] in only}
    made = weights.spec
    for tower in ("img", "txt"):
        if tower not in only:
            made = dataclasses.replace(made, **{tower: None})
    return dataclasses.replace(weights, arrays=leaves, spec=made)


def fitted(setup: Setup, weights: Weights, only: tuple[str, ...]) -> tuple[Weights, list[str]]:
    """The weights with the positions of this run, after a check of what they expect."""
    config, here = setup.config, spec_of(setup)
    made, notes = weights.spec, list(weights.notes)
    if made.img and here.img and here.res and made.res:
        weights = _named(
            lambda: adapt.to_res(weights, here.res or 0, config.init_positions), "init_positions"
        )
    if made.img and here.img and made.image != here.image and here.image != "embedding":
        notes.append(f"images: trained with {made.image!r}, here config.input.image={here.image!r}")
    if made.txt and here.txt:
        token_len = here.token_len or 0
        weights = _named(
            lambda: adapt.to_token_len(weights, token_len, config.init_text_positions),
            "init_text_positions",
        )
        spec.check_contract(
            weights.spec,
            vocab_size=here.vocab_size or 0,
            token_len=token_len,
            eos_id=here.eos_id,
            pad_id=here.pad_id,
            where=weights.source,
        )
        if made.text != here.text:
            notes.append(f"texts: trained with {made.text!r}, here config.input.text={here.text!r}")
    return weights, notes


def _named(change: Any, key: str) -> Weights:
    """change(), whose message names the key of the config."""
    try:
        return change()
    except CheckpointError as error:
        raise CheckpointError(f"{error} (config.{key})") from None


def _merged(weights: Weights, params: PyTree, scan: bool, only: tuple[str, ...]) -> PyTree:
    """`params` with what is in the weights, each array straight onto its devices."""
    leaves = stack(weights.arrays) if scan else weights.arrays
    fresh = {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(params)}
    wanted = {name: x.shape for name, x in fresh.items() if name.split("/")[0] in only}
    have = {name: leaf.shape for name, leaf in leaves.items()}
    told = f"img={weights.spec.img}, txt={weights.spec.txt}, see config.init_only"
    compare(have, wanted, where=f"{weights.source} ({told})")
    tree: dict[str, Any] = {}
    for name, x in fresh.items():
        if name in leaves:
            array = leaves[name].read().astype(x.dtype)
            x = jax.make_array_from_callback(x.shape, x.sharding, lambda at, a=array: a[at])
        insert(tree, name, x)
    return tree


# What this run is, for whoever reads its checkpoints


def spec_of(setup: Setup) -> spec.Spec:
    """siglip.json of a run."""
    config, preprocess = setup.config, setup.preprocess
    img, txt = (_given(config.model[tower]) for tower in ("img", "txt"))
    img.pop("drop_patches", None)  # in training only
    txt["vocab_size"], txt["out_dim"] = setup.model.txt.vocab_size, setup.model.txt.out_dim or 0
    squares = img["variant"] != "precomputed" and not img.get("naflex_grid")
    # What a text of nothing becomes shows both, whatever the steps are.
    empty = preprocess.text("")
    return spec.Spec(
        img=img,
        txt=txt,
        bias=setup.model.b_init is not None,
        res=config.input.res if squares else None,
        token_len=config.input.token_len,
        vocab_size=preprocess.tokenizer.vocab_size,
        eos_id=int(empty[0]),
        pad_id=int(empty[-1]),
        image=_program(config.input.image),
        text=_program(config.input.text),
        tokenizer=config.input.tokenizer.to_dict(),
    )


def _given(block: Any) -> dict[str, Any]:
    """Without what is not set."""
    return {key: value for key, value in block.to_dict().items() if value not in (None, 0.0)}


def _program(steps: str | tuple) -> str:
    return steps if isinstance(steps, str) else " | ".join(map(str, steps))


def save_spec(setup: Setup, folder: pathlib.Path) -> None:
    """Writes siglip.json, and the tokenizer's file beside it."""
    file = folder / spec.FILE
    try:
        spec.save(spec.with_tokenizer_beside(spec_of(setup), file), file)
    except (CheckpointError, OSError) as error:
        raise UserError(f"{file} cannot be written: {error}") from None
