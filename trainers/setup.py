"""Makes the objects of a run from its complete config."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from base.errors import UserError
from evaluators import EVALUATORS
from evaluators.strict_source import StrictSource
from input_pipeline.sources.registry import SOURCES
from input_pipeline.transforms.preprocess import Preprocess
from siglip.checkpoints.spec import is_mc4
from siglip.losses.definitions import Loss
from siglip.objectives.objective import Objective
from siglip.sharding import make_mesh, params_sharding
from siglip.towers.precomputed import Precomputed
from siglip.towers.two_towers import TOWERS, TwoTowers, make_model
from siglip.towers.vit import Patches, images_of
from trainers.data import chosen, make_input, mistakes_of, without
from trainers.objectives import initial_bias, make_objectives
from trainers.step.train_state import init_params


@dataclasses.dataclass(frozen=True)
class Setup:
    """The objects that training and evaluation share."""

    config: Any
    mesh: jax.sharding.Mesh
    preprocess: Preprocess
    model: TwoTowers
    objectives: dict[str, Objective]
    loss_fn: Loss | None  # of the first contrastive objective, for the loss evaluator

    @property
    def inputs(self) -> tuple[Any, np.ndarray]:
        """One image and one text, whose shapes decide those of the parameters."""
        text = np.zeros((1, self.config.input.token_len), np.int32)
        if self.preprocess.embeddings:
            return np.zeros((1, self.model.img.width), np.float32), text
        return _gray(self.preprocess), text

    def abstract_towers(self) -> Any:
        """Shapes of the parameters of the towers, t and b, which evaluators need."""
        with mistakes_of("model"):
            return jax.eval_shape(self.model.init, jax.random.key(0), *self.inputs)["params"]

    def abstract_params(self) -> Any:
        """Shapes of all parameters, those that objectives add included."""
        self.abstract_towers()  # first, so that a mistake in the model is not blamed on objectives
        with mistakes_of("objectives"):
            key = jax.random.key(0)
            return jax.eval_shape(
                lambda: init_params(self.model, self.objectives, key, self.inputs)
            )


def make_setup(config: Any, devices: Sequence[Any] | None = None) -> Setup:
    """Makes mesh, preprocessing, model and objectives.

    Args:
      devices: of the mesh; None for all of JAX's.

    Raises:
      UserError: values of the config do not fit each other.
    """
    with mistakes_of("mesh"):
        mesh = make_mesh(devices, **without(config.mesh, "cpu_devices"))
    preprocess = make_input(config)
    tokenizer = preprocess.tokenizer
    blocks = without(config.model)
    vocab_size = blocks["txt"].get("vocab_size") or tokenizer.vocab_size
    if is_mc4(rows=vocab_size, vocab_size=tokenizer.vocab_size):
        preprocess.rows = vocab_size
    elif vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"config.model.txt.vocab_size is {vocab_size}, but the tokenizer has "
            f"{tokenizer.vocab_size} ids; leave it unset to take the tokenizer's"
        )
    blocks["txt"]["vocab_size"] = vocab_size
    blocks["b_init"] = initial_bias(config)
    with mistakes_of("model"):
        model = make_model(list(mesh.devices.flat), **blocks)
    _check_images(preprocess, model.img)
    objectives, loss_fn = make_objectives(config, model, mesh)
    return Setup(config, mesh, preprocess, model, objectives, loss_fn)


def _gray(preprocess: Preprocess) -> Any:
    """A gray image as the image tower takes it, a batch of one; all images have its shape."""
    gray = np.full((preprocess.res, preprocess.res, 3), 127, np.uint8)
    fields = preprocess.pixels({"image": gray, "id": "gray"})
    return images_of({key: value[None] for key, value in fields.items()})


def _check_images(preprocess: Preprocess, img: Any) -> None:
    """Checks that config.input.image yields what the image tower takes.

    Also gives the preprocessing the tower's width, so that it refuses other embeddings by name.

    Raises:
      UserError: it yields something else.
    """
    if isinstance(img, Precomputed) != preprocess.embeddings:
        raise UserError(
            "config.model.img.variant='precomputed' and config.input.image='embedding' go "
            "together: the one takes embeddings in the place of images, the other reads them"
        )
    if preprocess.embeddings:
        preprocess.width = img.width
        return
    grid = img.naflex_grid
    if preprocess.patches and grid is None:
        raise UserError(
            "config.input.image ends in naflex, but this image tower takes squares; set "
            "config.model.img.naflex_grid (16 in the released models)"
        )
    if grid is not None and not preprocess.patches:
        raise UserError(
            f"config.model.img.naflex_grid={grid} makes a tower of patches, but "
            "config.input.image makes squares; set config.input.image='hf-naflex', or end its "
            "steps with `naflex`"
        )
    if grid is None and (rest := preprocess.res % img.patch_size):
        # As in the released So400m/14 at 384 pixels.
        logging.warning(
            "config.input.res=%d: the last %d rows and columns of pixels are in no patch of %d",
            preprocess.res,
            rest,
            img.patch_size,
        )
    image, p = _gray(preprocess), img.patch_size
    if isinstance(image, Patches) and image.values.shape[-1] != p * p * 3:
        side = round((image.values.shape[-1] / 3) ** 0.5)
        raise UserError(
            f"config.input.image makes patches of {side} pixels a side, config.model.img.variant "
            f"takes patches of {p}; end the image with `naflex(patch_size={p})`"
        )


def make_evaluators(setup: Setup) -> dict[str, Any]:
    """Name -> evaluator. Opens their sources, so that a missing file shows before training."""
    evaluators = {}
    for name, block in setup.config.evals.items():
        if block.params == "averaged" and not set(TOWERS) & set(setup.config.average.what):
            what = ",".join(setup.config.average.what)
            raise UserError(
                f"config.evals.{name}.params=averaged, but the run keeps no averages of a tower; "
                "set config.average.what, such as img,txt,t,b" + (f", not {what!r}" if what else "")
            )
        if block.type == "loss" and setup.loss_fn is None:
            raise UserError(
                f"config.evals.{name}.type=loss measures the loss of a contrastive objective, and "
                "config.objectives has none"
            )
        try:
            evaluators[name] = EVALUATORS[block.type](
                setup.model,
                setup.mesh,
                setup.preprocess,
                StrictSource(chosen(SOURCES, block.source)),
                setup.loss_fn,
                **without(block, "type", "source", "every", "params"),
            )
        except UserError as error:  # evaluators and sources do not know what they are called
            raise UserError(f"config.evals.{name}: {error}") from error
    return evaluators


def sharded(abstract: Any, mesh: jax.sharding.Mesh) -> Any:
    """The tree of shapes with the shardings of params_sharding."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        abstract,
        params_sharding(abstract, mesh),
    )
