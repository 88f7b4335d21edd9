"""Value and gradients of a step's objectives, a part of the batch at a time.

A loss of the whole batch needs the embeddings of every example, whose activations need not fit at
once (GradCache, arXiv 2101.06983): (1) map `rows` over the parts and keep nothing but z; (2) take
the losses of the whole batch and their gradients by z; (3) go forward and back through each part
with the gradients by (z, total). In one part, 1 and 3 are the same forward pass.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, PyTree

from siglip.objectives.objective import Objective, Part, objective_key
from siglip.sharding import batch_sharding, replicated
from siglip.towers.two_towers import TOWERS


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What the objectives make of a batch.

    Attributes:
      loss: the weighted sum.
      losses: name -> that objective's own, not weighted.
      grads: of the parameters.
      z: name -> {name: [N, ...]}, see objective.Rows.
      stats: name -> sums over the batch for Objective.carry.
    """

    loss: Float[Array, ""]
    losses: dict[str, Float[Array, ""]]
    grads: PyTree
    z: dict[str, dict[str, Array]]
    stats: dict[str, PyTree]


@dataclasses.dataclass(frozen=True)
class Objectives:
    """Objectives of one model: differentiates their weighted sum.

    Attributes:
      terms: name -> objective.
      frozen: a tree like the parameters, True for those that get no gradient; XLA then drops their
        backward pass.
      microbatch: rows of a part over all devices; 0 for the whole batch in one part.
    """

    model: Any
    terms: Mapping[str, Objective]
    frozen: PyTree
    mesh: jax.sharding.Mesh
    microbatch: int = 0

    def __call__(
        self, state: Any, batch: dict[str, Array], facts: dict[str, Array], key: Array
    ) -> Outcome:
        """Value and gradients at state.params; `facts` are those that `batch` losses need."""
        batch = {**batch, "row": jnp.arange(len(facts["mask"]), dtype=jnp.int32)}
        count = jnp.maximum(facts["mask"].sum(), 1).astype(jnp.float32)
        scale = {name: objective.weight / count for name, objective in self.terms.items()}
        rows = functools.partial(self._rows, averaged=state.averaged, carried=state.carried)
        if self.microbatch:
            parts = _split(batch, self.microbatch, self.mesh)

            def embed(part):
                (z, _), (other, _) = rows(state.params, part=part, key=key)
                return _merged(z, other)

            z = jax.lax.map(embed, parts)
            z = jax.tree.map(functools.partial(_join, mesh=self.mesh), z)
            loss, losses, dz, grads = self._batch(z, state.params, facts)
            dz = jax.tree.map(lambda x: _split(x, self.microbatch, self.mesh), dz)

            def add(sums, part_and_dz):
                part, dz = part_and_dz
                (_, totals), pullback, (_, stats) = jax.vjp(
                    lambda params: rows(params, part=part, key=key), state.params, has_aux=True
                )
                more = *pullback((dz, scale)), totals, stats
                return jax.tree.map(jnp.add, sums, more), None

            like = jax.tree.map(lambda x: x[0], parts)
            (_, totals), (_, stats) = jax.eval_shape(lambda: rows(state.params, part=like, key=key))
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (totals, stats))
            (grads, totals, stats), _ = jax.lax.scan(add, (grads, *zeros), (parts, dz))
        else:
            (z, totals), pullback, (other, stats) = jax.vjp(
                lambda params: rows(params, part=batch, key=key), state.params, has_aux=True
            )
            z = _merged(z, other)
            loss, losses, dz, of_batch = self._batch(z, state.params, facts)
            (grads,) = pullback((dz, scale))
            grads = jax.tree.map(jnp.add, grads, of_batch)
        for name, total in totals.items():
            loss = loss + scale[name] * total
            losses[name] = losses[name] + total / count
        return Outcome(loss, losses, grads, z, stats)

    def _rows(self, params, averaged, carried, part, key):
        """((z, totals), (other z, stats)) of a part, each by the objective's name; the other z are
        those without a gradient, such as integers."""
        # Parameters are gathered, activations stay where their examples are: left alone, XLA would
        # split the layers over `fsdp` and gather the activations of the whole batch.
        params, averaged = jax.lax.with_sharding_constraint(
            (self._stopped(params), averaged), replicated(self.mesh)
        )
        place = functools.partial(
            jax.lax.with_sharding_constraint, shardings=batch_sharding(self.mesh)
        )
        capture = {name for objective in self.terms.values() for name in objective.capture}
        part = Part(self.model, part, key, place, capture)
        z, other, totals, stats = {}, {}, {}, {}
        for name, objective in self.terms.items():
            of, total, stats[name] = objective.rows(
                params, averaged, carried.get(name, {}), part, objective_key(key, name)
            )
            z[name] = {k: x for k, x in of.items() if _is_real(x)}
            other[name] = {k: x for k, x in of.items() if not _is_real(x)}
            totals[name] = jnp.asarray(total, jnp.float32)
        return (z, totals), (other, jax.lax.stop_gradient(stats))

    def _batch(self, z, params, facts):
        """Losses of the whole batch: (weighted sum, each, gradients by z, by parameters)."""
        read = {name for objective in self.terms.values() for name in objective.reads}
        read = {name: params[name] for name in sorted(read) if name in params}
        learning = {
            name: {k: x for k, x in of.items() if _is_real(x) and self._learns(name, k)}
            for name, of in z.items()
        }

        def total(learning, read):
            read, losses = self._stopped(read), {}
            for name, objective in self.terms.items():
                losses[name] = jnp.float32(0)
                if objective.batch is not None:
                    own = {key: read[key] for key in objective.reads if key in read}
                    known = {key: facts[key] for key in ("mask", *objective.needs)}
                    losses[name] = objective.batch({**z[name], **learning[name]}, own, known)
            return sum(self.terms[name].weight * losses[name] for name in losses), losses

        (loss, losses), (dz, dread) = jax.value_and_grad(total, (0, 1), has_aux=True)(
            learning, read
        )
        dz = {
            name: {k: dz[name].get(k, jnp.zeros_like(x)) for k, x in of.items() if _is_real(x)}
            for name, of in z.items()
        }
        return loss, losses, dz, {**jax.tree.map(jnp.zeros_like, params), **dread}

    def _stopped(self, params: PyTree) -> PyTree:
        """The parameters, where frozen without a gradient."""
        return {
            name: jax.tree.map(
                lambda p, frozen: jax.lax.stop_gradient(p) if frozen else p,
                tree,
                self.frozen[name],
            )
            for name, tree in params.items()
        }

    def _learns(self, objective: str, key: str) -> bool:
        """Whether a gradient by this z leads to a parameter that learns. Otherwise it is not asked
        for, and the loss saves its matmul."""
        subtree = key.partition("/")[0]
        if subtree == "averaged":
            return False
        if subtree in self.frozen:
            return not all(jax.tree.leaves(self.frozen[subtree]))
        if subtree not in TOWERS:  # these may lack parameters: a precomputed tower has none
            raise ValueError(
                f"objective {objective!r} calls a z {key!r}, but there are no parameters "
                f"{subtree!r}; there are {', '.join(self.frozen)}"
            )
        return False


def _is_real(x: Array) -> bool:
    """Whether x is differentiable."""
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _merged(z: dict[str, dict], other: dict[str, dict]) -> dict[str, dict]:
    return {name: {**z[name], **other[name]} for name in z}


def _split(tree: PyTree, size: int, mesh: jax.sharding.Mesh) -> PyTree:
    """[N, ...] -> [N / size, size, ...] where every row stays on its device."""
    local = size // mesh.size
    rows, parts = PartitionSpec(mesh.axis_names), PartitionSpec(None, mesh.axis_names)
    split = functools.partial(
        jax.tree.map, lambda x: x.reshape(len(x) // local, local, *x.shape[1:])
    )
    return jax.shard_map(split, mesh=mesh, in_specs=rows, out_specs=parts)(tree)


def _join(x: Array, mesh: jax.sharding.Mesh) -> Array:
    """The inverse of `_split` for one array."""
    rows, parts = PartitionSpec(mesh.axis_names), PartitionSpec(None, mesh.axis_names)
    return jax.shard_map(
        lambda x: x.reshape(-1, *x.shape[2:]), mesh=mesh, in_specs=parts, out_specs=rows
    )(x)
