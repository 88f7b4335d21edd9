"""Functions as the training step calls them."""

from collections.abc import Callable, Iterator
from typing import Any

import jax

from siglip.sharding import make_mesh


def on_a_device(f: Callable[..., Any]) -> Callable[..., Any]:
    """f with arrays that are one device's own, which is where blocks take groups of examples."""
    mesh, whole = make_mesh(jax.devices()[:1]), jax.sharding.PartitionSpec()
    return jax.jit(jax.shard_map(f, mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False))


def equations(jaxpr: Any) -> Iterator[Any]:
    """Those of a jaxpr, and of all within."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)
