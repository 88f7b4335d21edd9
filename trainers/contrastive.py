"""The state of a contrastive run and its update step."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Bool, Int, PyTree

from siglip import logit_stats
from siglip.losses import Loss
from siglip.sharding import batch_sharding, params_sharding, replicated


@struct.dataclass
class TrainState:
    step: Int[Array, ""]  # updates made so far
    params: PyTree
    opt_state: PyTree


@struct.dataclass
class Tally:
    """What must not be missed between two log lines, kept on the device. Not checkpointed."""

    bad_examples: Int[Array, ""]  # masked out: did not decode
    first_nonfinite: Int[Array, ""]  # the step whose loss or gradient was not finite, or NONE


NONE = 2**31 - 1
Batch = dict[str, Array]


def make_state(
    model: Any,
    tx: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    *,
    seed: int,
    inputs: tuple,
) -> tuple[TrainState, Callable[[], TrainState]]:
    """The abstract state with shardings, and a function that makes the initial one in place.

    `inputs`: image and text of a batch of one, whose shapes decide those of the parameters.
    """

    def init() -> TrainState:
        params = model.init(jax.random.key(seed), *inputs)["params"]
        return TrainState(jnp.int32(0), params, tx.init(params))

    abstract = jax.eval_shape(init)
    shardings = params_sharding(abstract, mesh)
    # jit with out_shardings: no device ever holds the whole state.
    return (
        jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
        ),
        jax.jit(init, out_shardings=shardings),
    )


def new_tally(mesh: jax.sharding.Mesh) -> Tally:
    # Two arrays, not one twice: they are donated.
    return Tally(*(jax.device_put(jnp.int32(x), replicated(mesh)) for x in (0, NONE)))


def make_update(
    model: Any,
    loss_fn: Loss,
    tx: optax.GradientTransformation,
    schedule: Callable[[Any], Array],
    frozen: PyTree[bool],
    mesh: jax.sharding.Mesh,
    state_sharding: TrainState,
    *,
    seed: int,
    log_every: int,
) -> Callable[[TrainState, Tally, Batch], tuple[TrainState, Tally, dict[str, Array]]]:
    """The jitted update: (state, tally, batch) -> (state, tally, metrics), donating the first two.

    Args:
      loss_fn: (zimg, ztxt, t, b, mask) -> scalar, on global arrays.
      schedule: step -> learning rate, for the log.
      frozen: True for parameters without gradient; XLA then drops their backward pass.
      state_sharding: where the arrays of the state lie, and stay.
      seed: of everything random in a step (patch dropping); the step is folded in.
      log_every: logit statistics, which cost a matmul of the loss's size, are made on the steps
        after which (step + 1) % log_every == 0, and are NaN otherwise.
    """

    everywhere = replicated(mesh)

    def loss_and_embeddings(params, batch: Batch, step):
        params = jax.tree.map(lambda p, f: jax.lax.stop_gradient(p) if f else p, params, frozen)
        # Parameters are gathered, activations stay where their examples are: left alone, XLA would
        # split the layers over `fsdp` and gather the activations of the whole batch.
        params = jax.lax.with_sharding_constraint(params, everywhere)
        zimg, ztxt, out = model.apply(
            {"params": params},
            batch["image"],
            batch["text"],
            train=True,
            rngs={"dropout": jax.random.fold_in(jax.random.key(seed), step)},
        )
        zimg, ztxt = jax.lax.with_sharding_constraint((zimg, ztxt), batch_sharding(mesh))
        loss = loss_fn(zimg, ztxt, out["t"], out["b"], batch["mask"])
        return loss, (zimg, ztxt, out["t"], out["b"])

    @functools.partial(
        jax.jit, donate_argnums=(0, 1), out_shardings=(state_sharding, everywhere, everywhere)
    )
    def update(state: TrainState, tally: Tally, batch: Batch):
        value_and_grad = jax.value_and_grad(loss_and_embeddings, has_aux=True)
        (loss, embeddings), grads = value_and_grad(state.params, batch, state.step)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        new = TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state)

        grad_norm = optax.tree.norm(grads)
        metrics = {
            "loss": loss,
            "lr": schedule(state.step),
            "grad_norm": grad_norm,
            "update_norm": optax.tree.norm(updates),
            "param_norm": optax.tree.norm(new.params),
            **_logit_metrics(embeddings, batch["mask"], new.step % log_every == 0, mesh),
        }
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        valid = batch["mask"].sum(dtype=jnp.int32)
        tally = Tally(
            tally.bad_examples + batch["mask"].size - valid,
            jnp.where(finite, tally.first_nonfinite, jnp.minimum(tally.first_nonfinite, new.step)),
        )
        # A step that is not finite changes nothing: no checkpoint ever holds a NaN, and the loop
        # stops the run when it reads the tally.
        new = jax.tree.map(functools.partial(jnp.where, finite), new, state)
        return new, tally, metrics

    return update


def _logit_metrics(embeddings, mask: Bool[Array, " n"], wanted, mesh) -> dict[str, Array]:
    zimg, ztxt, t, b = embeddings
    metrics = {"t": t} if b is None else {"t": t, "b": b}
    stats = functools.partial(logit_stats.logit_stats, mesh=mesh)
    args = (zimg, ztxt, t, jnp.float32(0) if b is None else b, mask)
    nothing = jax.tree.map(
        lambda x: jnp.full(x.shape, jnp.nan, x.dtype), jax.eval_shape(stats, *args)
    )
    return metrics | jax.lax.cond(wanted, stats, lambda *_: nothing, *args)
