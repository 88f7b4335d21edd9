"""Makes the update step of a run from its setup; training and compile-only build the same one."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from input_pipeline.errors import KINDS
from siglip.sharding import batch_sharding, replicated
from siglip.towers.vit import IMAGE_FIELDS
from trainers.data import mistakes_of
from trainers.setup import Setup
from trainers.step.averaging import Average
from trainers.step.optimizer import frozen_mask, make_tx
from trainers.step.train_state import Tally, TrainState, make_state
from trainers.step.update import make_update

BATCH_FIELDS = (*IMAGE_FIELDS, "text", "mask", "bad", "index")  # that the update step takes


@dataclasses.dataclass(frozen=True)
class Step:
    """The jitted update of a run and the shapes that it takes.

    Attributes:
      update: (state, tally, batch) -> (state, tally, metrics), see trainers.step.update.
      state: shapes of the state, with shardings.
      init: makes the initial state in place.
    """

    update: Callable
    state: TrainState
    init: Callable[[], TrainState]

    def trace(self, batch: dict[str, Any], mesh: jax.sharding.Mesh) -> Any:
        """The update traced for a batch of these shapes; it has a jaxpr and can be lowered."""
        update: Any = self.update  # of jax.jit, which the type does not say
        return update.trace(self.state, abstract_tally(mesh), batch)


def make_step(setup: Setup, *, total_steps: int, examples_per_epoch: int | None) -> Step:
    """The step that setup.config describes.

    Args:
      total_steps: of the schedule. examples_per_epoch: for durations in epochs.

    Raises:
      UserError: values of the config do not fit each other.
    """
    config, params = setup.config, setup.abstract_params()
    tx, schedule = make_tx(
        config,
        params,
        total_steps=total_steps,
        batch_size=config.input.batch_size,
        examples_per_epoch=examples_per_epoch,
    )
    with mistakes_of("average"):
        average = Average(**config.average)
        average.check(params)
    state, init = make_state(
        setup.model,
        setup.objectives,
        tx,
        setup.mesh,
        seed=config.seed,
        inputs=setup.inputs,
        average=average,
    )
    update = make_update(
        setup.model,
        setup.objectives,
        tx,
        schedule,
        frozen_mask(config, params),
        setup.mesh,
        jax.tree.map(lambda x: x.sharding, state),
        seed=config.seed,
        log_every=config.log_every,
        microbatch=config.input.microbatch % config.input.batch_size,  # all at once: 0
        average=average,
    )
    return Step(update, state, init)


def abstract_batch(setup: Setup) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a batch as the loader makes it, without any data."""
    preprocess, count = setup.preprocess, setup.config.input.batch_size
    gray = np.full((preprocess.res, preprocess.res, 3), 127, np.uint8)
    image = np.zeros(setup.model.img.width, np.float32) if preprocess.embeddings else gray
    example = {"image": image, "texts": ["a"], "id": "gray"}
    fields = preprocess.example(example, np.random.default_rng(0))
    fields |= {"mask": np.True_, "bad": np.uint8(0), "index": np.int32(0)}
    rows = batch_sharding(setup.mesh)
    return {
        key: jax.ShapeDtypeStruct((count, *np.shape(value)), value.dtype, sharding=rows)
        for key, value in fields.items()
        if key in BATCH_FIELDS
    }


def abstract_tally(mesh: jax.sharding.Mesh) -> Tally:
    """Shapes of a step's tally."""
    shapes: Any = (
        jax.ShapeDtypeStruct(shape, jnp.int32, sharding=replicated(mesh))
        for shape in ((len(KINDS),), ())
    )
    return Tally(*shapes)
