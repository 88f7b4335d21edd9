"""Value and gradients of a step's objectives, a part of the batch at a time.

A loss of the whole batch needs the embeddings of every example, whose activations need not fit at
once (GradCache, arXiv 2101.06983): (1) map `rows` over the parts and keep nothing but z; (2) take
the losses of the whole batch and their gradients by z; (3) go forward and back through each part
with the gradients by (z, total). In one part, 1 and 3 are the same forward pass.

1 and 3 run on each device alone (device.py); 2 is on global arrays.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, PyTree

from siglip.objectives.objective import Objective
from siglip.towers.two_towers import TOWERS
from trainers.step.device import Device, by_device, is_real, merged


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
      frozen: a tree like the parameters, True for those that get no gradient and whose backward
        pass does not exist.
      microbatch: rows of a part over all devices; 0 for the whole batch in one part.
    """

    model: Any
    terms: Mapping[str, Objective]
    frozen: PyTree
    mesh: Mesh
    microbatch: int = 0

    def __call__(
        self, state: Any, batch: dict[str, Array], facts: dict[str, Array], key: Array
    ) -> Outcome:
        """Value and gradients at state.params; `facts` are those that `batch` losses need."""
        n = len(facts["mask"])
        batch = {**batch, "row": jnp.arange(n, dtype=jnp.int32)}
        count = jnp.maximum(facts["mask"].sum(), 1).astype(jnp.float32)
        scale = {name: objective.weight / count for name, objective in self.terms.items()}
        device = Device(
            self.model,
            self.terms,
            self.mesh,
            *(state.params, state.averaged, state.carried),
            self.frozen,
            n // self.microbatch if self.microbatch else 1,
        )
        learning, others = device.learning, device.others(key)
        if self.microbatch:
            z = device.shard_map(device.embed)(learning, others, batch)
            loss, losses, dz, of_batch = self._batch(z, state.params, facts)
            specs = PartitionSpec(self.mesh.axis_names), PartitionSpec()
            add = device.shard_map(device.add, *specs, reduced=True)
            grads, (totals, stats) = add(learning, others, batch, dz, scale)
        else:
            rows = device.shard_map(device.rows)
            (z, totals), pullback, (other, stats) = jax.vjp(
                lambda learning: rows(learning, others, batch), learning, has_aux=True
            )
            z = merged(z, other)
            loss, losses, dz, of_batch = self._batch(z, state.params, facts)
            (grads,) = pullback((dz, by_device(scale, totals)))
        totals, stats = jax.tree.map(lambda x: x.sum(0, x.dtype), (totals, stats))
        for name, total in totals.items():
            loss = loss + scale[name] * total
            losses[name] = losses[name] + total / count
        grads = device.grads(grads)
        more = {name: jax.tree.map(jnp.add, grads[name], x) for name, x in of_batch.items()}
        return Outcome(loss, losses, {**grads, **more}, z, stats)

    def _batch(self, z, params, facts):
        """Losses of the whole batch: (weighted sum, each, gradients by z, by what they read)."""
        read = {name for objective in self.terms.values() for name in objective.reads}
        read = {name: params[name] for name in sorted(read) if name in params}
        learning = {
            name: {k: x for k, x in of.items() if is_real(x) and self._learns(name, k)}
            for name, of in z.items()
        }

        def total(learning, read):
            read = {
                name: jax.tree.map(
                    lambda p, frozen: jax.lax.stop_gradient(p) if frozen else p,
                    *(tree, self.frozen[name]),
                )
                for name, tree in read.items()
            }
            losses = {}
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
            name: {k: dz[name].get(k, jnp.zeros_like(x)) for k, x in of.items() if is_real(x)}
            for name, of in z.items()
        }
        return loss, losses, dz, dread

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
