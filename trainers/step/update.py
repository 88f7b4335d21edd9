"""The state of a contrastive run and its update step."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Int, PyTree

from input_pipeline.errors import KINDS
from siglip.losses import logit_stats
from siglip.losses.definitions import Loss
from siglip.losses.facts import facts
from siglip.sharding import batch_sharding, params_sharding, replicated
from siglip.towers.vit import images_of


@struct.dataclass
class TrainState:
    step: Int[Array, ""]  # updates made so far
    params: PyTree
    opt_state: PyTree


@struct.dataclass
class Tally:
    """What must not be missed between two log lines, kept on the device."""

    bad: Int[Array, " kinds"]  # examples masked out, of each kind (input_pipeline.errors.KINDS)
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


def new_tally(mesh: jax.sharding.Mesh, bad: np.ndarray | None = None) -> Tally:
    """`bad`: counts of the steps before, if any."""
    bad = np.zeros(len(KINDS), np.int32) if bad is None else np.asarray(bad, np.int32)
    return Tally(*(jax.device_put(x, replicated(mesh)) for x in (bad, np.int32(NONE))))


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
    microbatch: int = 0,
) -> Callable[[TrainState, Tally, Batch], tuple[TrainState, Tally, dict[str, Array]]]:
    """The jitted update: (state, tally, batch) -> (state, tally, metrics), donating the first two.

    Args:
      loss_fn: of the whole batch; what else it needs is made of the batch, `seed` and the step.
      schedule: step -> learning rate, for the log.
      frozen: True for parameters without gradient; XLA then drops their backward pass.
      state_sharding: where the arrays of the state lie, and stay.
      seed: of everything random in a step (patch dropping); the step is folded in.
      microbatch: pairs that are embedded at a time, over all devices; 0 for the whole batch. The
        loss is over the whole batch in any case.
      log_every: norms of parameters and update, and logit statistics, which cost a matmul of the
        loss's size, are made on the steps after which (step + 1) % log_every == 0, and are NaN
        otherwise.
    """

    everywhere = replicated(mesh)
    loss_and_grads = _in_microbatches(microbatch, mesh) if microbatch else _whole
    towers = Towers(model, frozen, mesh)

    def loss_of(batch: Batch, step):
        """loss(zimg, ztxt, t, b) of this batch, with what else the loss wants to know of it."""
        extras = facts(loss_fn.needs, batch, seed=seed, step=step)
        return lambda zimg, ztxt, t, b: loss_fn(zimg, ztxt, t, b, batch["mask"], **extras)

    @functools.partial(
        jax.jit, donate_argnums=(0, 1), out_shardings=(state_sharding, everywhere, everywhere)
    )
    def update(state: TrainState, tally: Tally, batch: Batch):
        embed = functools.partial(towers, key=jax.random.fold_in(jax.random.key(seed), state.step))
        loss, embeddings, grads = loss_and_grads(
            embed, loss_of(batch, state.step), state.params, batch
        )
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        step = state.step + 1
        logged = step % log_every == 0

        def updates_of(args):
            params, opt_state, grads = args
            return tx.update(grads, opt_state, params)

        def apply(args):
            updates, opt_state = updates_of(args)
            return optax.apply_updates(args[0], updates), opt_state

        # A step that is not finite changes nothing: no checkpoint ever holds a NaN, and the loop
        # stops the run when it reads the tally. A cond, as a `where` over the state would copy it;
        # norms on logged steps only, for the same reason: half the time of an update on CPUs.
        args = (state.params, state.opt_state, grads)
        update_norm = _when(logged, lambda args: optax.tree.norm(updates_of(args)[0]), args)
        params, opt_state = jax.lax.cond(finite, apply, lambda args: args[:2], args)
        metrics = {
            "loss": loss,
            "lr": schedule(state.step),
            "grad_norm": grad_norm,
            "update_norm": update_norm,
            "param_norm": _when(logged, optax.tree.norm, params),
            **_logit_metrics(embeddings, batch["mask"], logged, mesh),
        }
        kind = batch["bad"] if "bad" in batch else ~batch["mask"]
        kinds = jnp.arange(1, 1 + len(KINDS))[:, None] == kind[None]
        tally = Tally(
            tally.bad + kinds.sum(axis=1, dtype=jnp.int32),
            jnp.where(finite, tally.first_nonfinite, jnp.minimum(tally.first_nonfinite, step)),
        )
        return TrainState(jnp.where(finite, step, state.step), params, opt_state), tally, metrics

    return update


# Loss and gradients of the parameters, from the towers and a loss(zimg, ztxt, t, b)


@dataclasses.dataclass(frozen=True)
class Towers:
    """The model as a function of its parameters, some of them frozen."""

    model: Any
    frozen: PyTree[bool]
    mesh: jax.sharding.Mesh

    def __call__(
        self, params, part: dict[str, Any], key
    ) -> tuple[Array, Array, Array, Array | None]:
        """(zimg, ztxt, t, b) of the images and texts of `part`, whose `row` in the batch seeds what
        is random; None for what is not in it."""
        params = jax.tree.map(
            lambda p, f: jax.lax.stop_gradient(p) if f else p, params, self.frozen
        )
        # Parameters are gathered, activations stay where their examples are: left alone, XLA would
        # split the layers over `fsdp` and gather the activations of the whole batch.
        params = jax.lax.with_sharding_constraint(params, replicated(self.mesh))
        zimg, ztxt, out = self.model.apply(
            {"params": params},
            part.get("image"),
            part.get("text"),
            rows=part.get("row"),
            train=True,
            rngs={"dropout": key},
        )
        rows = batch_sharding(self.mesh)
        zimg, ztxt = jax.lax.with_sharding_constraint((zimg, ztxt), rows)
        return zimg, ztxt, out["t"], out["b"]


def _inputs(batch: Batch) -> dict[str, Any]:
    return {
        "image": images_of(batch),
        "text": batch["text"],
        "row": jnp.arange(len(batch["text"]), dtype=jnp.int32),
    }


def _whole(embed, loss, params, batch: Batch):
    """One forward and one backward pass: (loss, embeddings, grads)."""

    def loss_and_embeddings(params):
        embeddings = embed(params, _inputs(batch))
        return loss(*embeddings), embeddings

    (value, embeddings), grads = jax.value_and_grad(loss_and_embeddings, has_aux=True)(params)
    return value, embeddings, grads


def _in_microbatches(size: int, mesh: jax.sharding.Mesh):
    """The same for batches whose activations do not fit: embeds all microbatches and keeps nothing
    but embeddings, takes one loss over the whole batch with its gradients, then goes forward and
    back through each microbatch: one more forward pass (GradCache, arXiv 2101.06983)."""

    def loss_and_grads(embed, loss, params, batch: Batch):
        parts = _split(_inputs(batch), size, mesh)
        zimg, ztxt = (
            _join(z, mesh) for z in jax.lax.map(lambda part: embed(params, part)[:2], parts)
        )
        (t, b), scalars_vjp = jax.vjp(lambda params: embed(params, {})[2:], params)
        # Only what leads to a parameter that learns: a frozen tower saves its matmul in the loss.
        frozen = embed.func.frozen
        learns = {
            i: not all(jax.tree.leaves(frozen.get(name)))
            for i, name in enumerate(("img", "txt", "t", "b"))
            if name in frozen
        }
        value, dz = jax.value_and_grad(loss, [i for i, yes in learns.items() if yes])(
            zimg, ztxt, t, b
        )
        dz = dict(zip((i for i, yes in learns.items() if yes), dz))
        zeros = [None if x is None else jnp.zeros_like(x) for x in (zimg, ztxt, t, b)]
        dimg, dtxt, dt, db = (dz.get(i, zero) for i, zero in enumerate(zeros))

        def add(grads, part_and_dz):
            part, dz = part_and_dz
            _, vjp = jax.vjp(lambda params: embed(params, part)[:2], params)
            return jax.tree.map(jnp.add, grads, vjp(dz)[0]), None

        (grads,) = scalars_vjp((dt, db))
        parts_of_dz = _split((dimg, dtxt), size, mesh)
        grads, _ = jax.lax.scan(add, grads, (parts, parts_of_dz))
        return value, (zimg, ztxt, t, b), grads

    return loss_and_grads


def _split(tree, size: int, mesh: jax.sharding.Mesh):
    """[N, ...] -> [N / size, size, ...] where every row stays on its device."""
    local = size // mesh.size
    rows, parts = PartitionSpec(mesh.axis_names), PartitionSpec(None, mesh.axis_names)
    split = functools.partial(
        jax.tree.map, lambda x: x.reshape(len(x) // local, local, *x.shape[1:])
    )
    return jax.shard_map(split, mesh=mesh, in_specs=rows, out_specs=parts)(tree)


def _join(x, mesh: jax.sharding.Mesh):
    """The inverse of `_split` for one array."""
    rows, parts = PartitionSpec(mesh.axis_names), PartitionSpec(None, mesh.axis_names)
    return jax.shard_map(
        lambda x: x.reshape(-1, *x.shape[2:]), mesh=mesh, in_specs=parts, out_specs=rows
    )(x)


def _when(wanted, f: Callable, args) -> Array:
    """f(args), or NaN."""
    return jax.lax.cond(wanted, f, lambda _: jnp.float32(jnp.nan), args)


def _logit_metrics(embeddings, mask: Bool[Array, " n"], wanted, mesh) -> dict[str, Array]:
    zimg, ztxt, t, b = embeddings
    metrics = {"t": t} if b is None else {"t": t, "b": b}
    stats = functools.partial(logit_stats.logit_stats, mesh=mesh)
    args = (zimg, ztxt, t, jnp.float32(0) if b is None else b, mask)
    nothing = jax.tree.map(
        lambda x: jnp.full(x.shape, jnp.nan, x.dtype), jax.eval_shape(stats, *args)
    )
    return metrics | jax.lax.cond(wanted, stats, lambda *_: nothing, *args)
