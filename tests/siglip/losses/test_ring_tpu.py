"""The ring as the TPU's compiler plans it, for slices that are not here."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from loss_inputs import ARGNUMS
from topologies import compile_for, devices_of

from siglip.losses import ring
from siglip.losses.cycle import find_place, links
from siglip.sharding import make_mesh

V4, V5E = ["v4:2x2x1", "v4:4x4x2", "v4:4x4x4"], ["v5e:2x2", "v5e:4x8", "v5e:8x8", "v5e:16x16"]
RINGS = [*V4, *V5E, "v5p:4x4x4", "v6e:4x8", "v6e:16x16", "tpu7x:2x2x2"]
HALVES = ["v4:2x2x1", "v4:4x4x4", "v5e:4x8", "v6e:16x16", "tpu7x:2x2x2"]
N, D = 256, 512


@functools.cache
def compiled(name: str, exchange: str, axes: tuple[str, ...] = (), fsdp: int = 1):
    mesh = make_mesh(devices_of(name), fsdp=fsdp)
    rows = NamedSharding(mesh, PartitionSpec(axes or mesh.axis_names))
    devices = mesh.shape[axes[0]] if axes else mesh.size
    z = jax.ShapeDtypeStruct((N * devices, D), jnp.bfloat16, sharding=rows)
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    loss = functools.partial(ring.sigmoid_loss, mesh=mesh, axes=axes, exchange=exchange)
    program = compile_for(jax.value_and_grad(loss, argnums=ARGNUMS), z, z, scalar, scalar)
    return mesh, program


def computations(text: str) -> dict[str, list[str]]:
    """Instructions of each computation, in the order in which they run."""
    found, lines = {}, []
    for line in text.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            lines = found.setdefault(head[1], [])
        elif " = " in line:
            lines.append(line)
    return found


def has_matmul(line: str, found: dict[str, list[str]]) -> bool:
    if re.search(r" (dot|convolution)\(", line):
        return True
    called = re.findall(r"(?:calls|body)=%?([\w.\-]+)", line)
    return any(has_matmul(inner, found) for name in called for inner in found[name])


def matmuls_during_permutes(text: str) -> list[int]:
    """For each asynchronous permute the instructions with a matmul between its start and end."""
    found, counts = computations(text), []
    for lines in found.values():
        for i, line in enumerate(lines):
            if start := re.search(r"%([\w.\-]+) = .* collective-permute-start\(", line):
                done = re.compile(rf" collective-permute-done\(.*%{re.escape(start[1])}\)")
                end = next(j for j in range(i, len(lines)) if done.search(lines[j]))
                counts.append(sum(has_matmul(between, found) for between in lines[i:end]))
    return counts


@pytest.mark.parametrize(
    "name, exchange",
    [(name, "ring") for name in RINGS] + [(name, "bidirectional") for name in HALVES],
)
def test_every_permute_goes_to_a_neighbour_while_a_matmul_runs(name, exchange):
    mesh, program = compiled(name, exchange)
    text = program.as_text()
    counts = matmuls_during_permutes(text)
    # The loop has two (each way), and before and after it there are three.
    assert len(counts) == (5 if exchange == "ring" else 10)
    assert min(counts) >= 1, counts
    assert " collective-permute(" not in text and " all-gather" not in text
    places = [find_place(device) for device in mesh.devices.flat]
    pairs = re.findall(r"source_target_pairs=\{(\{[\d,{}]*\})\}", text)
    assert len(pairs) == len(counts)
    for hop in ",".join(pairs)[1:-1].split("},{"):
        source, target = map(int, hop.split(","))
        assert links(places[source], places[target]) == 1


@pytest.mark.parametrize("names", [V4, V5E], ids=["v4", "v5e"])
def test_memory_on_tpus_does_not_grow_with_the_devices(names):
    plans = [compiled(name, "ring")[1].memory_analysis() for name in names]
    assert len({plan.temp_size_in_bytes for plan in plans}) == 1
    assert len({plan.peak_memory_in_bytes for plan in plans}) == 1


@pytest.mark.parametrize("axes", [("data",), ("fsdp",)])
def test_a_ring_over_some_axes_is_asynchronous_too(axes):
    _, program = compiled("v5e:16x16", "ring", axes, fsdp=8)
    assert " collective-permute(" not in program.as_text()
    assert min(matmuls_during_permutes(program.as_text())) >= 1


@pytest.mark.parametrize("name", ["v4:2x2x1", "v4:2x2x2", "v5e:8x8", "v6e:4x4", "v5p:2x2x4"])
def test_gather_sends_no_all_reduce_of_embeddings_or_gradients(name):
    mesh, program = compiled(name, "gather")
    text = program.as_text()
    results = re.findall(r" = (.*) (all-gather|reduce-scatter|all-reduce)(?:-start)?\(", text)
    rows = {"all-gather": [], "reduce-scatter": [], "all-reduce": []}
    for shape, op in results:  # of an asynchronous one the operand too, which has fewer rows
        rows[op] += (
            [max(map(int, found))] if (found := re.findall(rf"\[(\d+),{D}\]", shape)) else []
        )
    assert rows["all-reduce"] == []  # only that of the sums
    assert max(rows["all-gather"]) == N * mesh.size and min(rows["reduce-scatter"]) == N
    assert len(rows["reduce-scatter"]) == 1 + (mesh.size > 4)
