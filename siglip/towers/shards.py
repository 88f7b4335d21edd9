"""Parameters split over `fsdp`, gathered where they are used and again from there reduced.

Inside `jax.shard_map` a device has a shard of each large parameter. A tower is given Shards in the
place of such parameters and gathers those of a block inside the block's loop (transformer.Encoder),
in the type of its matmuls; their gradients are reduce-scattered. Who calls a tower with whole
parameters, as everyone outside of the training step, sees none of this.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec
from jaxtyping import Array, PyTree

from siglip.leaf_names import path_name
from siglip.sharding import BLOCKS

AXIS = "fsdp"  # of the mesh
TILES = 16  # rows


@struct.dataclass
class Shard:
    """One device's part of a parameter."""

    value: Any  # the array; JAX puts others in its place where it maps over a tree
    # Split axis, counted from the last one: a scan over layers takes a leading one away.
    axis: int = struct.field(pytree_node=False)
    dtype: Any = struct.field(pytree_node=False)  # type in which the parameter is used, and sent

    def whole(self) -> Array:
        return _gather(self.value, self.value.ndim + self.axis, self.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(shard: Array, axis: int, dtype: Any) -> Array:
    # As a matrix: a TPU would pad heads of 64 to tiles of 128, and send the padding.
    shard = jnp.moveaxis(shard.astype(dtype), axis, 0)
    matrix = jax.lax.all_gather(shard.reshape(len(shard), -1), AXIS, axis=0, tiled=True)
    return jnp.moveaxis(matrix.reshape(-1, *shard.shape[1:]), 0, axis)


def _gather_fwd(shard: Array, axis: int, dtype: Any) -> tuple[Array, None]:
    return _gather(shard, axis, dtype), None


def _gather_bwd(axis: int, dtype: Any, _: None, grad: Array) -> tuple[Array]:
    # A device's gradient has the type of its matmul. Their sum is taken in float32: autodiff would
    # sum in the type of the gather.
    del dtype
    grad = jnp.moveaxis(grad.astype(jnp.float32), axis, 0)
    return (jnp.moveaxis(_sum_rows(grad, jax.lax.axis_size(AXIS)), 0, axis),)


def _sum_rows(grad: Array, devices: int) -> Array:
    """This device's rows of the sum over devices.

    XLA's compiler for TPUs makes an all-reduce of the whole out of a reduce-scatter along an axis
    that is not the outermost in memory, or of rows that are no multiple of two tiles of 8.
    """
    rows = len(grad) // devices
    matrix = grad.reshape(devices, rows, -1)
    matrix = jnp.pad(matrix, ((0, 0), (0, -rows % TILES), (0, 0)))
    matrix = with_layout_constraint(matrix.reshape(-1, matrix.shape[-1]), Layout((0, 1)))
    matrix = jax.lax.psum_scatter(matrix, AXIS, scatter_dimension=0, tiled=True)
    return matrix[:rows].reshape(rows, *grad.shape[1:])


_gather.defvjp(_gather_fwd, _gather_bwd)


def _is_shard(x: Any) -> bool:
    return isinstance(x, Shard)


def make_shards(params: PyTree, specs: PyTree, dtype: Any) -> PyTree:
    """The tree with a Shard for each array that its PartitionSpec splits.

    Args:
      params: one device's arrays, split as `specs` says.
      dtype: of matmuls, whose kernels are sent in it. All else is used in float32.
    """

    def one(path, x: Array, spec: PartitionSpec) -> Array | Shard:
        if AXIS not in spec:
            return x
        is_kernel = path_name(path[-1:]) == "kernel"
        return Shard(x, spec.index(AXIS) - x.ndim, dtype if is_kernel else x.dtype)

    return jax.tree_util.tree_map_with_path(one, params, specs)


def gather(params: PyTree) -> PyTree:
    """The tree with the whole array in the place of each Shard."""
    return jax.tree.map(lambda x: x.whole() if _is_shard(x) else x, params, is_leaf=_is_shard)


def gather_outside_blocks(params: PyTree) -> PyTree:
    """Likewise, but for the parameters of blocks, which transformer.Encoder gathers."""

    def one(path, x):
        in_block = any(path_name((key,)).startswith(BLOCKS) for key in path)
        return x.whole() if _is_shard(x) and not in_block else x

    return jax.tree_util.tree_map_with_path(one, params, is_leaf=_is_shard)


def gathering(block: Any, variables: PyTree, *, in_float32: bool = False) -> Any:
    """The class of a module which gathers its parameters; `block` itself if `variables`, those of
    its parent, have no Shard.

    Args:
      in_float32: what is gathered becomes float32 after it was sent.
    """
    if not any(map(_is_shard, jax.tree.leaves(variables, is_leaf=_is_shard))):
        return block

    def whole(params: PyTree) -> PyTree:
        params = gather(params)
        return jax.tree.map(lambda x: x.astype(jnp.float32), params) if in_float32 else params

    return nn.map_variables(block, "params", trans_in_fn=whole)


class Known:
    """Whole parameters for all to read, and the shards that stand behind them for the towers.

    What is gathered for nobody to read is dropped by the compiler.
    """

    def __init__(self):
        self._behind: dict[int, tuple[Array, Shard]] = {}  # by identity, which the array keeps

    def whole(self, params: PyTree) -> PyTree:
        """The tree with whole arrays, float32, in the place of Shards."""

        def one(x):
            if not _is_shard(x):
                return x
            array = x.replace(dtype=x.value.dtype).whole()
            self._behind[id(array)] = array, x
            return array

        return jax.tree.map(one, params, is_leaf=_is_shard)

    def shards(self, params: PyTree) -> PyTree:
        """The tree with Shards in the place of the arrays that `whole` made; all others, such as
        those that an objective has changed, stay."""
        return jax.tree.map(lambda x: self._behind.get(id(x), (None, x))[1], params)
