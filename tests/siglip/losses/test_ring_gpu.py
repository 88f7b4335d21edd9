"""The memory traffic of the loss in the program that XLA makes for GPUs that are not here."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from loss_inputs import ARGNUMS, inputs, mesh_of
from test_ring import assert_equals_definition
from test_ring_tpu import computations
from topologies import compile_for, devices_of

from siglip.losses import definitions, ring
from siglip.losses.pairs import Pairs, labels
from siglip.losses.plan import LossPlan
from siglip.sharding import make_mesh

N, D = 4096, 768
SIZES = {"f32": 4, "bf16": 2, "s32": 4, "pred": 1, "s8": 0}  # bytes; s8 is scratch of cuBLAS
READERS = ("fusion", "custom-call", "copy", "transpose", "convert", "reduce", "dot", "select")


def bytes_per_pair(text: str, pairs: int) -> list[int]:
    """Bytes that each kernel reads and writes of arrays with a number for each of the pairs."""
    found, counts = computations(text), []
    fused = set(re.findall(r" fusion\(.*calls=%?([\w.\-]+)", text))
    for name, lines in found.items():
        size = {}
        for line in lines if name not in fused else ():
            parts = re.match(r"\s*(?:ROOT )?(%[\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*?)\)", line)
            assert parts is not None, line
            out, shape, op, operands = parts.groups()
            shapes = [
                (kind, math.prod(map(int, sides.split(","))))
                for kind, sides in re.findall(r"(\w+)\[([\d,]+)\]", shape)
            ]
            size[out] = sum(SIZES[kind] for kind, numbers in shapes if numbers == pairs)
            moved = size[out] + sum(size.get(operand, 0) for operand in operands.split(", "))
            counts += [moved] if moved and op in READERS else []
    return counts


def compiled(name: str, dtype: str, n: int = N, masked: bool = False, **options) -> str:
    mesh = make_mesh(devices_of(name))
    rows = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    z = jax.ShapeDtypeStruct((n * mesh.size, D), dtype, sharding=rows)
    mask = jax.ShapeDtypeStruct((n * mesh.size,), bool, sharding=rows) if masked else None
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))

    def loss(*args):
        return ring.sigmoid_loss(*args, mesh=mesh, exchange="ring", **options)

    f = jax.value_and_grad(loss, argnums=ARGNUMS)
    return compile_for(f, z, z, scalar, scalar, mask, xla_gpu_enable_triton_gemm=False).as_text()


@pytest.mark.parametrize("dtype, g", [("bfloat16", 2), ("float32", 4)])
@pytest.mark.parametrize("n, tile", [(N, N), (N, 1024), (2**20, 256)])
@pytest.mark.parametrize("masked", [False, True])
def test_one_pass_reads_the_cosines_and_writes_the_derivative(dtype, g, n, tile, masked):
    text = compiled("h200:1x1x1", dtype, n=n, tile=tile, masked=masked)
    counts = bytes_per_pair(text, n * tile)
    # One matmul writes the float32 cosines, one kernel reads them and writes g, two matmuls read g.
    assert sorted(counts) == sorted([4, 4 + g, g, g])
    assert sum(counts) <= 20


def test_all_visits_of_a_ring_of_gpus_are_one_pass():
    counts = bytes_per_pair(compiled("h200:1x1x4", "bfloat16"), N * N)
    assert sorted(counts) == sorted([4, 6, 2, 2] * 3)  # the own block, the loop, the last one


def test_bytes_are_counted_once_for_each_kernel_that_moves_them():
    text = """
%body.1 (p: f32[8,8]) -> f32[8,8] {
  %p = f32[8,8]{1,0} parameter(0)
  ROOT %exp = f32[8,8]{1,0} exponential(%p)
}
ENTRY %main (x: f32[8,8], y: bf16[8,4]) -> f32[] {
  %x = f32[8,8]{1,0} parameter(0)
  %y = bf16[8,4]{1,0} parameter(1)
  %fusion = (f32[8,8]{1,0}, pred[8,8]{1,0}) fusion(%x, %y), kind=kLoop, calls=%body.1
  %one = f32[8,8]{1,0} get-tuple-element(%fusion), index=0
  ROOT %sum = f32[] reduce(%one, %x), dimensions={0,1}
}
"""
    assert bytes_per_pair(text, 64) == [4 + 4 + 1, 4 + 4]


@pytest.mark.parametrize("pairs", [Pairs(), Pairs("hard", 5), Pairs(duplicates="positive")])
def test_the_pass_for_gpus_equals_the_definition(pairs, monkeypatch):
    monkeypatch.setattr(LossPlan, "on_gpu", property(lambda plan: True))
    args = inputs(48, 32, 117.0, -12.9)
    mask = np.random.default_rng(1).random(48) > 0.2
    ids = np.random.default_rng(2).integers(-1, 12, (48, 1)).astype(np.int32)
    z = labels(pairs, args[0], args[1], mask, ids)
    assert_equals_definition(
        lambda *a: ring.sigmoid_loss(
            *a, mask, ids, mesh=mesh_of(4), exchange="ring", tile=5, pairs=pairs
        ),
        lambda *a: definitions.sigmoid_loss(*a, mask, z),
        args,
        2e-6,
    )
