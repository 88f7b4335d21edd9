"""Starts from the weights of config.init: a run of this project or a released model."""

import dataclasses
import pathlib
from typing import Any

import jax
from jaxtyping import PyTree

from base.errors import UserError
from base.nested import insert
from siglip import checkpoints
from siglip.checkpoints import adapt, spec
from siglip.checkpoints.errors import CheckpointError
from siglip.checkpoints.weights import Weights, compare, stack
from siglip.leaf_names import leaves
from siglip.towers.two_towers import PARTS, TOWERS
from trainers.setup import Setup


def initial_params(
    setup: Setup, params: PyTree, source: str | pathlib.Path
) -> tuple[PyTree, list[str]]:
    """The parameters to start from, and notes on them for the log.

    Args:
      params: freshly initialised ones on their devices, kept where config.init_only says so.
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
        weights, notes = fit(setup, _select(weights, only))
        return _replace(params, weights, config.model.scan, only), notes
    except CheckpointError as error:
        raise UserError(f"config.init: {error}") from None


def _select(weights: Weights, only: tuple[str, ...]) -> Weights:
    """The weights with the parts `only`."""
    arrays = {name: x for name, x in weights.arrays.items() if name.split("/")[0] in only}
    absent = {tower: None for tower in TOWERS if tower not in only}
    trained = dataclasses.replace(weights.spec, **absent)
    return dataclasses.replace(weights, arrays=arrays, spec=trained)


def fit(setup: Setup, weights: Weights) -> tuple[Weights, list[str]]:
    """The weights with positions resized for this run, and where its preprocessing differs.

    Raises:
      CheckpointError: positions cannot be resized, or the run's texts do not fit the text tower.
    """
    config, run = setup.config, spec_of(setup)
    trained, notes = weights.spec, list(weights.notes)
    if trained.img and run.img and run.res and trained.res:
        weights = _with_key(
            lambda: adapt.to_res(weights, run.res or 0, config.init_positions), "init_positions"
        )
    if trained.img and run.img and trained.image != run.image and run.image != "embedding":
        notes.append(
            f"images: trained with {trained.image!r}, here config.input.image={run.image!r}"
        )
    if trained.txt and run.txt:
        token_len = run.token_len or 0
        weights = _with_key(
            lambda: adapt.to_token_len(weights, token_len, config.init_text_positions),
            "init_text_positions",
        )
        spec.check_contract(
            weights.spec,
            vocab_size=run.vocab_size or 0,
            token_len=token_len,
            eos_id=run.eos_id,
            pad_id=run.pad_id,
            where=weights.source,
        )
        if trained.text != run.text:
            notes.append(
                f"texts: trained with {trained.text!r}, here config.input.text={run.text!r}"
            )
    return weights, notes


def _with_key(change: Any, key: str) -> Weights:
    """change(), whose errors name the key of the config."""
    try:
        return change()
    except CheckpointError as error:
        raise CheckpointError(f"{error} (config.{key})") from None


def _replace(params: PyTree, weights: Weights, scan: bool, only: tuple[str, ...]) -> PyTree:
    """`params` with the arrays of the weights, each put straight onto its devices."""
    arrays = stack(weights.arrays) if scan else weights.arrays
    fresh = leaves(params)
    expected = {name: x.shape for name, x in fresh.items() if name.split("/")[0] in only}
    shapes = {name: array.shape for name, array in arrays.items()}
    towers = f"img={weights.spec.img}, txt={weights.spec.txt}, see config.init_only"
    compare(shapes, expected, where=f"{weights.source} ({towers})")
    tree: dict[str, Any] = {}
    for name, x in fresh.items():
        if name in arrays:
            array = arrays[name].read().astype(x.dtype)
            x = jax.make_array_from_callback(x.shape, x.sharding, lambda at, a=array: a[at])
        insert(tree, name, x, "/")
    return tree


# The description of this run's model, which lies beside its checkpoints


def spec_of(setup: Setup) -> spec.Spec:
    """The content of siglip.json of a run."""
    config, preprocess = setup.config, setup.preprocess
    img, txt = (_without_unset(config.model[tower]) for tower in TOWERS)
    for block, key in ((img, "drop_patches"), (img, "group"), (txt, "group")):
        block.pop(key, None)  # concerns training only
    txt["vocab_size"], txt["out_dim"] = setup.model.txt.vocab_size, setup.model.txt.out_dim or 0
    squares = img["variant"] != "precomputed" and not img.get("naflex_grid")
    # The empty text consists of these two ids, whatever the steps are.
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
        image=_as_text(config.input.image),
        text=_as_text(config.input.text),
        tokenizer=config.input.tokenizer.to_dict(),
    )


def _without_unset(block: Any) -> dict[str, Any]:
    """The block without keys that are None or 0."""
    return {key: value for key, value in block.to_dict().items() if value not in (None, 0.0)}


def _as_text(steps: str | tuple) -> str:
    return steps if isinstance(steps, str) else " | ".join(map(str, steps))


def save_spec(setup: Setup, folder: pathlib.Path) -> None:
    """Writes siglip.json, and the tokenizer's file beside it."""
    file = folder / spec.FILE
    try:
        spec.save(spec.with_tokenizer_beside(spec_of(setup), file), file)
    except (CheckpointError, OSError) as error:
        raise UserError(f"{file} cannot be written: {error}") from None
