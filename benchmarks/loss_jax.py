"""The loss in JAX: this project's, the naive ways to write it, and the bare matmuls.

`FORMS` maps a name to a function of the mesh that returns loss(zimg, ztxt, t, b) on global arrays
whose rows are sharded over the mesh's one axis. JAX's autodiff differentiates the naive ones.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from siglip.losses import definitions, ring

ROWS, REPLICATED = PartitionSpec("data"), PartitionSpec()
ARGUMENTS = (0, 1, 2, 3)  # zimg, ztxt, t, b: all of them are differentiated


def make_mesh(devices: int) -> Mesh:
    """A mesh over the first `devices` devices."""
    available = jax.devices()[:devices]
    if len(available) < devices:
        raise ValueError(f"{devices} devices are needed, {len(available)} are here")
    return jax.make_mesh((devices,), ("data",), devices=available, axis_types=(AxisType.Auto,))


def ours(mesh: Mesh, **options) -> Callable:
    """siglip.losses.ring.sigmoid_loss."""
    return functools.partial(ring.sigmoid_loss, mesh=mesh, **options)


def has_exchanges() -> bool:
    return "exchange" in inspect.signature(ring.sigmoid_loss).parameters


def xla_full(mesh: Mesh) -> Callable:
    """The definition of global arrays; XLA shards the N x N logits as it likes."""
    del mesh
    return definitions.sigmoid_loss


def all_gather(mesh: Mesh) -> Callable:
    """Every device gathers all texts and holds n rows of the logits, as most trainers do."""

    def local(x, y, t, b):
        all_y = lax.all_gather(y, "data", tiled=True)
        offset = lax.axis_index("data") * len(x)
        own = offset + lax.iota(jnp.int32, len(x))[:, None] == lax.iota(jnp.int32, len(all_y))[None]
        total = _nll(x, all_y, t, b, own).sum()
        return lax.psum(total, "data") / len(all_y)

    return _shard_map(local, mesh)


def ring_autodiff(mesh: Mesh) -> Callable:
    """Texts travel round the ring in a scan, which autodiff then runs backwards."""
    devices = mesh.size
    to_next = [(i, (i + 1) % devices) for i in range(devices)]

    def local(x, y, t, b):
        total = _nll(x, y, t, b, jnp.eye(len(x), dtype=bool)).sum()

        def step(carry, _):
            y, total = carry
            y = lax.ppermute(y, "data", to_next)
            return (y, total + _nll(x, y, t, b, jnp.zeros((), bool)).sum()), None

        (_, total), _ = lax.scan(step, (y, total), length=devices - 1)
        return lax.psum(total, "data") / (devices * len(x))

    return _shard_map(local, mesh)


def _nll(x, y, t, b, own) -> jax.Array:
    logits = t * jnp.matmul(x, y.T, precision="highest") + b
    return jax.nn.softplus(jnp.where(own, -logits, logits))


def _shard_map(local: Callable, mesh: Mesh) -> Callable:
    in_specs = (ROWS, ROWS, REPLICATED, REPLICATED)
    return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=REPLICATED)


FORMS = {
    "ours": ours,
    "xla-full": xla_full,
    "all-gather": all_gather,
    "ring-autodiff": ring_autodiff,
}


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Shapes of one program: N pairs of width d over the mesh."""

    pairs: int
    d: int
    dtype: str

    def arguments(self, mesh: Mesh) -> list[jax.ShapeDtypeStruct]:
        rows, scalar = NamedSharding(mesh, ROWS), NamedSharding(mesh, REPLICATED)
        z = jax.ShapeDtypeStruct((self.pairs, self.d), self.dtype, sharding=rows)
        return [z, z, *[jax.ShapeDtypeStruct((), jnp.float32, sharding=scalar)] * 2]


def compile_loss(mesh: Mesh, shapes: Shapes, form: str, **options) -> jax.stages.Compiled:
    """(zimg, ztxt, t, b) -> loss, (dzimg, dztxt, dt, db); the gradients lie as their arguments."""
    loss = FORMS[form](mesh, **options)
    rows, scalar = NamedSharding(mesh, ROWS), NamedSharding(mesh, REPLICATED)
    value_and_grad = jax.jit(
        jax.value_and_grad(loss, argnums=ARGUMENTS),
        out_shardings=(scalar, (rows, rows, scalar, scalar)),
    )
    return value_and_grad.lower(*shapes.arguments(mesh)).compile()


def compile_matmuls(mesh: Mesh, shapes: Shapes) -> jax.stages.Compiled:
    """(zimg, ztxt) -> the three products of the loss and nothing else: no exchange, no sigmoid.

    Each device multiplies its rows by all texts, which every device holds beforehand.
    """

    def local(x, y):
        s = jnp.matmul(x, y.T)
        return jnp.matmul(s, y), jnp.matmul(s.T, x)

    f = jax.shard_map(local, mesh=mesh, in_specs=(ROWS, REPLICATED), out_specs=(ROWS, ROWS))
    x = shapes.arguments(mesh)[0]
    y = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, REPLICATED))
    return jax.jit(f).lower(x, y).compile()


def temp_bytes(program: jax.stages.Compiled) -> int:
    """Bytes per device beyond arguments and results, by XLA's own plan of the memory."""
    analysis = program.memory_analysis()
    assert analysis is not None, "this backend does not tell what memory it plans"
    return analysis.temp_size_in_bytes


def shardings(program: jax.stages.Compiled) -> list[NamedSharding]:
    """Shardings of the program's arguments."""
    inputs = program.input_shardings
    assert inputs is not None
    return list(inputs[0])
