"""The static plan of a loss: devices, exchange, size of tiles, number format."""

import dataclasses
import logging
import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array

from siglip.losses import exchange as exchanges
from siglip.losses.cycle import ring_order
from siglip.losses.pairs import Pairs, check_ids

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class LossPlan:
    """Everything static about a loss of arrays of given shapes; hashable, so that jit can tell
    losses apart.

    Attributes:
      tile_rows: rows of a travelling block whose logits are in memory at a time.
      dtype: of the factors of the matmuls; logits, sums and accumulators are float32.
      pairs: which pairs are positive, which negative.
    """

    mesh: Mesh
    exchange: exchanges.Exchange
    tile_rows: int
    dtype: Any
    pairs: Pairs

    def zeros(self, shape, fill=0.0, dtype=jnp.float32) -> Array:
        """An array of one device, whose value will differ from that of other devices."""
        return lax.pcast(jnp.full(shape, fill, dtype), self.exchange.axes, to="varying")

    def psum(self, x):
        return lax.psum(x, self.exchange.axes)

    # XLA has two matmuls for CPUs. YNNPACK's is the faster one (129 against 107 GFLOP/s on two
    # cores), but takes no transposed left factor, and adds d products up in one go: the logits of a
    # trained model (t = 117, d = 512) are then so far off that gradients are wrong by 1.4e-6, by
    # 0.85e-6 with Eigen's. So cosines are made to be Eigen's, gradients YNNPACK's, each by a copy
    # of the smaller factor that XLA may not see through.

    def cosines(self, y, x) -> Array:
        """y @ x.T."""
        if self.on_cpu and y.dtype == jnp.float32:
            return matmul(lax.optimization_barrier(y.T).T, x.T)
        return matmul(y, x.T)

    def transposed_matmul(self, a, b) -> Array:
        """a.T @ b."""
        return matmul(lax.optimization_barrier(a.T) if self.on_cpu else a.T, b)

    @property
    def on_cpu(self) -> bool:
        return self.mesh.devices.flat[0].platform == "cpu"

    @property
    def on_gpu(self) -> bool:
        return self.mesh.devices.flat[0].platform == "gpu"


def matmul(a, b) -> Array:
    # f32 in, f32 throughout (not TF32 or bf16 passes); bf16 in, f32 accumulation.
    precision = "highest" if a.dtype == jnp.float32 else None
    return jnp.matmul(a, b, precision=precision, preferred_element_type=jnp.float32)


def make_plan(
    zimg, ztxt, ids, *, mesh, axes, exchange, dtype, tile, unroll, pairs: Pairs
) -> LossPlan:
    """Checks shapes and options (ring.sigmoid_loss) and makes the choices that they leave open."""
    axes = tuple(axes) or tuple(mesh.axis_names)
    if missing := [axis for axis in axes if axis not in mesh.shape]:
        raise ValueError(f"the mesh has the axes {', '.join(mesh.shape)}, not {missing[0]!r}")
    devices = math.prod(mesh.shape[axis] for axis in axes)
    dtype = jnp.dtype(zimg.dtype if dtype is None else dtype)
    check_options(exchange, dtype.name, tile, unroll)
    if zimg.shape != ztxt.shape or zimg.ndim != 2:
        raise ValueError(f"zimg {zimg.shape} and ztxt {ztxt.shape} must be two arrays [N, d]")
    if len(zimg) % devices:
        raise ValueError(f"{len(zimg)} pairs do not divide over {devices} devices of axes {axes}")
    check_ids(pairs, ids)
    n, d = len(zimg) // devices, zimg.shape[1]
    if exchange == "auto":
        choice = exchanges.choose(mesh, n=n, d=d, devices=devices, itemsize=dtype.itemsize)
        logging.getLogger(__name__).info("exchange %s (%s)", choice.name, choice.why)
        exchange = choice.name
    tile_rows = tile or default_tile_rows(n, mesh.devices.flat[0].platform)
    order, row = ring_order(mesh, axes), exchanges.row_of(mesh, devices)
    exchange = exchanges.Exchange(exchange, axes, order, unroll, row)
    return LossPlan(mesh, exchange, tile_rows, dtype, pairs)


def check_options(exchange: str, dtype: str, tile: int, unroll: int) -> None:
    """Refuses what no mesh and no batch could make right.

    Raises:
      ValueError: an option has an invalid value.
    """
    if exchange not in ("auto", *exchanges.EXCHANGES):
        options = ", ".join(("auto", *exchanges.EXCHANGES))
        raise ValueError(f"exchange {exchange!r} is none of {options}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} of the loss is none of {', '.join(DTYPES)}")
    if tile < 0:
        raise ValueError(f"tile must be a number of rows, or 0 to choose, not {tile}")
    if unroll < 1:
        raise ValueError(f"unroll must be at least 1, not {unroll}")


def default_tile_rows(n: int, platform: str) -> int:
    # On a CPU about a megabyte of f32 logits, which stays in a cache. On an accelerator a gigabyte:
    # large matmuls. Not so few rows that matmuls starve.
    return max(256, (2**18 if platform == "cpu" else 2**28) // n)
