"""What each device does of a step: its rows through the towers, and back, by its shards.

All of it runs inside `jax.shard_map`. Devices meet where parameters are gathered over `fsdp` and
their gradients reduce-scattered (towers/shards.py), and once at the end of the backward pass, where
gradients are added up over `data`, and over all devices for parameters that are not split.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, PyTree

from siglip.objectives.objective import Objective, Part, objective_key
from siglip.sharding import params_sharding
from siglip.towers.shards import Known, make_shards
from siglip.towers.two_towers import TOWERS

Leaves = list[Array]
Other = tuple[Leaves, PyTree, PyTree, Array]  # what gets no gradient: see Device.others


@dataclasses.dataclass(frozen=True, eq=False)
class Device:
    """The objectives on one device's rows.

    Attributes:
      params, averaged, carried: those of the state, as global arrays.
      frozen: a tree like the parameters, True for those that get no gradient and whose backward
        pass does not exist.
      parts: microbatches.
    """

    model: Any
    terms: Mapping[str, Objective]
    mesh: Mesh
    params: PyTree
    averaged: PyTree
    carried: PyTree
    frozen: PyTree
    parts: int

    @property
    def learning(self) -> Leaves:
        """The parameters that get a gradient."""
        return self._divide(self.params)[0]

    def others(self, key: Array) -> Other:
        """Frozen parameters, averages, carried state and the key of the step."""
        return self._divide(self.params)[1], self.averaged, self.carried, key

    def grads(self, learning: Leaves) -> PyTree:
        """Gradients like the parameters; 0 for those that are frozen."""
        return self._join(learning, [jnp.zeros_like(x) for x in self._divide(self.params)[1]])

    def shard_map(self, f: Callable, *more: PartitionSpec, reduced: bool = False) -> Callable:
        """f(learning, others, rows, ...) of global arrays, where f is written for one device.

        Args:
          more: specs of further arguments.
          reduced: f returns (gradients by `learning`, ...); everything else is joined by rows.
        """
        learning, still = self._divide(_specs(self.params, self.mesh))
        everywhere, rows = PartitionSpec(), PartitionSpec(self.mesh.axis_names)
        others = still, _specs(self.averaged, self.mesh), everywhere, everywhere
        return jax.shard_map(
            f,
            mesh=self.mesh,
            in_specs=(learning, others, rows, *more),
            out_specs=(learning, rows) if reduced else rows,
            # Objectives are written as for one device. If this were checked, a scan that starts
            # from zeros and a Pallas kernel would have to say over which axes their arrays vary.
            check_vma=False,
        )

    def rows(self, learning: Leaves, others: Other, part: dict[str, Array]):
        """((z, totals), (other z, stats)) of a part, each by the objective's name; the other z are
        those without a gradient, such as integers. Totals and stats are sums, [1, ...] each."""
        still, averaged, carried, key = others
        known = Known()
        params = known.whole(self._shards(self._join(learning, still), self.params))
        averaged = known.whole(self._shards(averaged, self.averaged))
        capture = {name for objective in self.terms.values() for name in objective.capture}
        rows = Part(self.model, part, key, capture, known)
        z, other, totals, stats = {}, {}, {}, {}
        for name, objective in self.terms.items():
            of, total, stats[name] = objective.rows(
                params, averaged, carried.get(name, {}), rows, objective_key(key, name)
            )
            z[name] = {k: x for k, x in of.items() if is_real(x)}
            other[name] = {k: x for k, x in of.items() if not is_real(x)}
            totals[name] = jnp.asarray(total, jnp.float32)[None]
        stats = jax.tree.map(lambda x: jnp.asarray(x)[None], jax.lax.stop_gradient(stats))
        return (z, totals), (other, stats)

    def embed(self, learning: Leaves, others: Other, batch: dict[str, Array]):
        """All z, a microbatch at a time."""

        def one(part):
            (z, _), (other, _) = self.rows(learning, others, part)
            return merged(z, other)

        z = jax.lax.map(one, self._split(batch))
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), z)

    def add(self, learning: Leaves, others: Other, batch: dict[str, Array], dz, scale):
        """(gradients, (totals, stats)), a microbatch at a time.

        Gradients of microbatches are added up on each device and reduced once. Those of parameters
        that are split over `fsdp` are reduce-scattered for each microbatch, as these parameters are
        gathered for each, and then likewise added up over `data` once: kept whole until the end,
        they would fill the memory that `fsdp` is to save.
        """

        def one(sums, part_and_dz):
            part, dz = part_and_dz
            (_, totals), pullback, (_, stats) = jax.vjp(
                lambda learning: self.rows(learning, others, part), learning, has_aux=True
            )
            more = *pullback((dz, by_device(scale, totals))), totals, stats
            return jax.tree.map(jnp.add, sums, more), None

        parts = self._split((batch, dz))
        like = jax.tree.map(lambda x: x[0], parts[0])
        (_, totals), (_, stats) = jax.eval_shape(self.rows, learning, others, like)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (learning, totals, stats))
        (grads, *sums), _ = jax.lax.scan(one, zeros, parts)
        specs, _ = self._divide(_specs(self.params, self.mesh))
        return [self._reduce(x, spec) for x, spec in zip(grads, specs, strict=True)], sums

    def _reduce(self, grad: Array, spec: PartitionSpec) -> Array:
        return jax.lax.psum(grad, tuple(axis for axis in self.mesh.axis_names if axis not in spec))

    def _split(self, rows: PyTree) -> PyTree:
        return jax.tree.map(lambda x: x.reshape(self.parts, -1, *x.shape[1:]), rows)

    def _shards(self, params: PyTree, like: PyTree) -> PyTree:
        """Shards in the place of what is split; kernels are sent in their tower's type."""
        specs = _specs(like, self.mesh)
        of = {tower: getattr(getattr(self.model, tower), "dtype", jnp.float32) for tower in TOWERS}
        return {
            name: make_shards(tree, specs[name], of.get(name, jnp.float32))
            for name, tree in params.items()
        }

    def _divide(self, params: PyTree) -> tuple[list, list]:
        """Leaves that learn, and those that are frozen."""
        divided: tuple[list, list] = [], []
        for leaf, frozen in zip(jax.tree.leaves(params), jax.tree.leaves(self.frozen), strict=True):
            divided[frozen].append(leaf)
        return divided

    def _join(self, learning: list, still: list) -> PyTree:
        """The inverse of `_divide`."""
        leaves = iter(learning), iter(still)
        return jax.tree.map(lambda frozen: next(leaves[frozen]), self.frozen)


def _specs(params: PyTree, mesh: Mesh) -> PyTree:
    return jax.tree.map(lambda sharding: sharding.spec, params_sharding(params, mesh))


def by_device(scale: dict[str, Array], totals: dict[str, Array]) -> dict[str, Array]:
    """The gradients of the loss by the totals of each device."""
    return {name: jnp.full_like(total, scale[name]) for name, total in totals.items()}


def is_real(x: Array) -> bool:
    """Whether x is differentiable."""
    return jnp.issubdtype(x.dtype, jnp.inexact)


def merged(z: dict[str, dict], other: dict[str, dict]) -> dict[str, dict]:
    return {name: {**z[name], **other[name]} for name in z}
