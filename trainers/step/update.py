"""The update step: (state, tally, batch) -> (state, tally, metrics), whatever the objectives."""

import collections
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PyTree

from input_pipeline.errors import KINDS
from siglip.chips import find_chip
from siglip.losses.facts import facts
from siglip.objectives.objective import Objective, when
from siglip.sharding import replicated
from trainers.step import averaging
from trainers.step.averaging import Average
from trainers.step.microbatches import Objectives, Outcome
from trainers.step.train_state import Tally, TrainState

Batch = dict[str, Array]
OWN_METRICS = ("loss", "lr", "grad_norm", "update_norm", "param_norm")


def make_update(
    model: Any,
    objectives: Mapping[str, Objective],
    tx: optax.GradientTransformation,
    schedule: Callable[[Any], Float[Array, ""]],
    frozen: PyTree,
    mesh: jax.sharding.Mesh,
    state_sharding: TrainState,
    *,
    seed: int,
    log_every: int,
    microbatch: int = 0,
    average: Average = Average(),  # noqa: B008
) -> Callable[[TrainState, Tally, Batch], tuple[TrainState, Tally, dict[str, Array]]]:
    """The jitted update, which donates state and tally.

    Args:
      objectives: name -> objective; the loss is their weighted sum.
      schedule: step -> learning rate, for the log.
      frozen: a tree like the parameters, True for those that get no gradient.
      state_sharding: where the arrays of the state lie, and stay.
      seed: of everything random in a step; the step is folded in.
      log_every: norms of parameters and update, and logit statistics, which cost a matmul of the
        loss's size, are made on the steps after which (step + 1) % log_every == 0, and are NaN
        otherwise.
      microbatch: rows that go through the towers at a time, over all devices; 0 for the whole
        batch. Losses of the whole batch are over the whole batch in any case.
      average: which moving averages of parameters the state keeps.
    """
    everywhere, chip = replicated(mesh), find_chip(mesh.devices.flat[0])
    loss_and_grads = Objectives(model, objectives, frozen, mesh, microbatch)
    needs = {name for objective in objectives.values() for name in objective.needs}

    @functools.partial(
        jax.jit,
        donate_argnums=(0, 1),
        out_shardings=(state_sharding, everywhere, everywhere),
        compiler_options=dict(chip.compiler_options) if chip else None,
    )
    def update(state: TrainState, tally: Tally, batch: Batch):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        known = {"mask": batch["mask"], **facts(needs, batch, seed=seed, step=state.step)}
        outcome = loss_and_grads(state, batch, known, key)
        carried = _next_carried(objectives, state.carried, outcome.stats, batch["mask"])
        grad_norm = optax.tree.norm(outcome.grads)
        finite = jnp.isfinite(outcome.loss) & jnp.isfinite(grad_norm)
        for leaf in jax.tree.leaves(carried):
            finite &= jnp.isfinite(leaf).all()
        step = state.step + 1
        logged = step % log_every == 0

        def updates_of(params, opt_state, grads):
            return tx.update(grads, opt_state, params)

        def apply(params, opt_state, averaged, old_carried, grads):
            del old_carried
            updates, opt_state = updates_of(params, opt_state, grads)
            params = optax.apply_updates(params, updates)
            return params, opt_state, averaging.update(averaged, params, average.decay), carried

        def keep(params, opt_state, averaged, old_carried, grads):
            del grads
            return params, opt_state, averaged, old_carried

        # A step that is not finite changes nothing: no checkpoint ever holds a NaN, and the loop
        # stops the run when it reads the tally. A cond, as a `where` over the state would copy it;
        # norms on logged steps only, for the same reason: half the time of an update on CPUs.
        update_norm = when(
            logged,
            lambda *args: optax.tree.norm(updates_of(*args)[0]),
            *(state.params, state.opt_state, outcome.grads),
        )
        # Always true, and says to XLA that the norm reads the state before the update is written
        # over it. Without this order it copies the whole state for the norm.
        read = ~(update_norm < 0)
        params, opt_state, averaged, carried = jax.lax.cond(
            finite & read,
            apply,
            keep,
            *(state.params, state.opt_state, state.averaged, state.carried, outcome.grads),
        )
        metrics = {
            "loss": outcome.loss,
            "lr": schedule(state.step),
            "grad_norm": grad_norm,
            "update_norm": update_norm,
            "param_norm": when(logged, optax.tree.norm, params),
            **_metrics(objectives, outcome, state.params, known, logged),
        }
        kind = batch["bad"] if "bad" in batch else ~batch["mask"]
        kinds = jnp.arange(1, 1 + len(KINDS))[:, None] == kind[None]
        tally = Tally(
            tally.bad + kinds.sum(axis=1, dtype=jnp.int32),
            jnp.where(finite, tally.first_nonfinite, jnp.minimum(tally.first_nonfinite, step)),
        )
        step = jnp.where(finite, step, state.step)
        return TrainState(step, params, opt_state, averaged, carried), tally, metrics

    return update


def _next_carried(
    objectives, carried: PyTree, stats: PyTree, mask: Bool[Array, " n"]
) -> dict[str, PyTree]:
    count = jnp.maximum(mask.sum(), 1)
    return {name: objectives[name].carry(old, stats[name], count) for name, old in carried.items()}


def _metrics(
    objectives: Mapping[str, Objective],
    outcome: Outcome,
    params: PyTree,
    facts: dict[str, Array],
    logged: Bool[Array, ""],
) -> dict[str, Array]:
    """What the objectives log; with several also objective/NAME, the loss of each. A name that two
    log, or that the step logs itself, gets the objective's name before it."""
    metrics: dict[tuple[str, str], Array] = {}
    for name, objective in objectives.items():
        if objective.metrics is not None:
            own = {key: params[key] for key in objective.reads if key in params}
            logs = objective.metrics(outcome.z[name], own, facts, logged)
            metrics |= {(name, key): value for key, value in logs.items()}
        if len(objectives) > 1:
            metrics[name, f"objective/{name}"] = outcome.losses[name]
    often = collections.Counter([*(key for _, key in metrics), *OWN_METRICS])
    return {
        key if often[key] == 1 else f"{name}/{key}": value for (name, key), value in metrics.items()
    }
