"""What a step hands to the next one, and how it begins."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jaxtyping import Array, Int, PyTree

from input_pipeline.errors import KINDS
from siglip.objectives.objective import Objective, objective_key
from siglip.sharding import params_sharding, replicated
from siglip.towers.two_towers import PARTS
from trainers.step import averaging
from trainers.step.averaging import Average

NONE = 2**31 - 1


# Tests do not hold the fields of the two classes to their types: where JAX maps over a state, they
# are shapes, shardings or placeholders.


@no_type_check
@struct.dataclass
class TrainState:
    step: Int[Array, ""]  # updates so far
    params: PyTree
    opt_state: PyTree
    averaged: PyTree  # moving averages of the subtrees of params that config.average names
    carried: PyTree  # objective name -> what it hands from step to step without a gradient


@no_type_check
@struct.dataclass
class Tally:
    """Counts that must not be missed between two log lines, kept on the device."""

    bad: Int[Array, " kinds"]  # examples masked out, of each kind (input_pipeline.errors.KINDS)
    first_nonfinite: Int[Array, ""]  # the step whose loss or gradient was not finite, or NONE


def init_params(
    model: Any, objectives: Mapping[str, Objective], key: Array, inputs: tuple
) -> PyTree:
    """Initial parameters: of the towers, and the subtrees that objectives add.

    Args:
      inputs: image and text of a batch of one, whose shapes decide those of the parameters.

    Raises:
      ValueError: an objective adds a subtree that is there already, or reads one that is not.
    """
    params = model.init(key, *inputs)["params"]
    for name, objective in objectives.items():
        if objective.init is not None:
            added = objective.init(objective_key(key, name), params)
            if taken := sorted(added.keys() & {*params, *PARTS, "averaged", "carried"}):
                raise ValueError(f"objective {name!r} adds parameters {taken[0]!r}, a taken name")
            params = {**params, **added}
    for name, objective in objectives.items():
        # A model without a bias, or with a precomputed tower, lacks some of its own.
        if lost := sorted({*objective.reads} - {*params, *PARTS}):
            known = ", ".join(sorted(params))
            raise ValueError(f"objective {name!r} reads parameters {lost[0]!r}; there are {known}")
    return params


def make_state(
    model: Any,
    objectives: Mapping[str, Objective],
    tx: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    *,
    seed: int,
    inputs: tuple,
    average: Average = Average(),  # noqa: B008
) -> tuple[TrainState, Callable[[], TrainState]]:
    """The abstract state with shardings, and a function that makes the initial one in place."""

    def init() -> TrainState:
        params = init_params(model, objectives, jax.random.key(seed), inputs)
        carried = {k: o.start() for k, o in objectives.items() if o.start is not None}
        averaged = averaging.start(params, average.what)
        return TrainState(jnp.int32(0), params, tx.init(params), averaged, carried)

    abstract = jax.eval_shape(init)
    shardings = params_sharding(abstract, mesh)
    # jit with out_shardings: no device ever holds the whole state.
    return (
        jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
        ),
        jax.jit(init, out_shardings=shardings),
    )


def with_params(state: TrainState, params: PyTree) -> TrainState:
    """The state with other parameters; the moving averages begin at those."""
    averaged = averaging.start(params, tuple(state.averaged))
    return dataclasses.replace(state, params=params, averaged=averaged)


def new_tally(mesh: jax.sharding.Mesh, bad: np.ndarray | None = None) -> Tally:
    """A tally with `bad`, the counts of the steps before, if any."""
    bad = np.zeros(len(KINDS), np.int32) if bad is None else np.asarray(bad, np.int32)
    return Tally(*(jax.device_put(x, replicated(mesh)) for x in (bad, np.int32(NONE))))
