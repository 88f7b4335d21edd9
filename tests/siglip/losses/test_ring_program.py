"""What the compiled ring holds in memory, sends and computes, and the exchange that it chooses."""

import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from loss_inputs import ARGNUMS, inputs, mesh_of

from siglip.chips import find_kind
from siglip.losses import ring
from siglip.losses.exchange import choose, row_of
from siglip.losses.pairs import Pairs
from siglip.losses.plan import default_tile_rows

SCALARS = 2048  # bytes: sums, loop counters, tables of buffers


def compiled(
    devices: int, n: int = 1024, d: int = 256, argnums=ARGNUMS, loss=ring.sigmoid_loss, **kw
):
    mesh = mesh_of(devices)
    rows = NamedSharding(mesh, PartitionSpec(("data",)))
    z = jax.ShapeDtypeStruct((n * devices, d), jnp.float32, sharding=rows)
    scalar = jax.ShapeDtypeStruct((), jnp.float32)

    def f(*args):
        return loss(*args, mesh=mesh, **({"exchange": "ring"} | kw))

    f = jax.value_and_grad(f, argnums=argnums) if argnums else f
    return jax.jit(f).lower(z, z, scalar, scalar).compile()


def ops(program, name: str) -> int:
    return len(re.findall(rf"= \S+ {name}(?:-start)?\(", program.as_text()))


def temporary(devices: int, n: int = 1024, d: int = 256, **kw) -> int:
    return compiled(devices, n, d, **kw).memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("exchange", ["ring", "bidirectional"])
@pytest.mark.parametrize("loss", [ring.sigmoid_loss, ring.softmax_loss])
def test_temporary_memory_per_device_does_not_grow_with_the_devices(exchange, loss):
    n, d = 1024, 256
    temp = {k: temporary(k, n, d, loss=loss, exchange=exchange) for k in (4, 8)}
    assert temp[8] == pytest.approx(temp[4], rel=0.01)
    tile = default_tile_rows(n, "cpu") * n * 4
    assert temp[8] <= 26 * n * d + tile + SCALARS
    # The definition, sharded by XLA, grows with D: this is what the ring is for.
    assert temp[8] < 0.1 * 4 * n * (8 * n) * 3


@pytest.mark.parametrize("tile", [0, 96, 128])
def test_memory_is_26_bytes_a_number_and_a_tile_whatever_the_tile(tile):
    n, d = 1024, 512
    logits = (tile or default_tile_rows(n, "cpu")) * n * 4
    assert temporary(8, n, d, tile=tile) <= 26 * n * d + logits + SCALARS


@pytest.mark.parametrize("negatives", ["hard", "random"])
def test_selection_of_negatives_keeps_memory_bounded(negatives):
    n, d = 512, 128
    pairs = Pairs(negatives, 16)
    temp = {k: temporary(k, n, d, pairs=pairs, tile=64) for k in (4, 8)}
    assert temp[8] == pytest.approx(temp[4], rel=0.01)
    assert temp[8] < 2 * temporary(8, n, d, tile=64)


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_the_unrolled_ring_sends_each_text_d_minus_1_and_each_accumulator_d_times(devices):
    unrolled = functools.partial(compiled, devices, n=64, d=32, unroll=devices)
    program = unrolled()
    assert ops(program, "collective-permute") == (devices - 1) + devices
    assert ops(program, "all-gather") == 0
    assert ops(program, "all-reduce") == 1
    assert ops(unrolled(argnums=()), "collective-permute") == devices - 1
    # Whichever tower is frozen, its embeddings travel and no accumulator does.
    assert ops(unrolled(argnums=(0, 2, 3)), "collective-permute") == devices - 1
    assert ops(unrolled(argnums=(1, 2, 3)), "collective-permute") == devices - 1


def test_the_looped_ring_has_the_same_hops():
    # Step 0 sends texts; the loop (D - 2 times) both; the last step and the way home accumulators.
    program = compiled(8, n=64, d=32)
    assert ops(program, "collective-permute") == 1 + 2 + 1 + 1
    assert '"known_trip_count":{"n":"6"}' in program.as_text()
    assert ops(program, "all-gather") == 0


def test_the_bidirectional_ring_sends_half_a_block_each_way():
    program = compiled(8, n=64, d=32, exchange="bidirectional", unroll=8)
    sent = re.findall(r"= (f32\[\d+,\d+\])\S* collective-permute(?:-start)?\(", program.as_text())
    assert sent == ["f32[32,32]"] * 2 * (7 + 8)
    targets = set(re.findall(r"source_target_pairs=\{\{0,(\d)\}", program.as_text()))
    assert targets == {"1", "7"}


def test_gather_sends_two_messages():
    program = compiled(8, n=64, d=32, exchange="gather")
    assert ops(program, "all-gather") == 1
    assert ops(program, "reduce-scatter") == 1
    assert ops(program, "collective-permute") == 0
    frozen = compiled(8, n=64, d=32, exchange="gather", argnums=(1, 2, 3))
    assert ops(frozen, "reduce-scatter") == 0


@pytest.mark.parametrize(
    "loss, argnums, matmuls",
    [
        (ring.sigmoid_loss, ARGNUMS, 3),
        (ring.sigmoid_loss, (0, 2, 3), 2),  # frozen text
        (ring.sigmoid_loss, (1, 2, 3), 2),  # frozen images
        (ring.sigmoid_loss, (2, 3), 1),
        (ring.sigmoid_loss, (), 1),
        # Two tours, 1 + 3: in this small program XLA finds the logits of both to be the same.
        (ring.softmax_loss, (0, 1, 2), 3),
        (ring.softmax_loss, (0, 2), 2),
        (ring.softmax_loss, (), 1),
    ],
)
def test_matmuls_of_the_compiled_program(loss, argnums, matmuls):
    # One device and one tile, so that every matmul of the program is run once.
    program = compiled(1, n=64, d=32, loss=loss, argnums=argnums, tile=64)
    assert ops(program, "dot") + ops(program, "custom-call") == matmuls
    flops = program.cost_analysis()["flops"]
    assert 0.99 < flops / (matmuls * 2 * 64 * 64 * 32) < 1.6  # and elementwise work


def test_auto_takes_the_exchange_with_the_least_estimate_and_logs_it(caplog):
    mesh = mesh_of(8)
    small = choose(mesh, n=8, d=64, devices=8, itemsize=4)
    large = choose(mesh, n=65_536, d=768, devices=8, itemsize=4)
    assert small.name == "gather" and large.name == "ring"
    assert large.seconds["ring"] <= large.seconds["bidirectional"]
    zimg, ztxt, t, b = inputs(64, 4, 10.0, -10.0)
    with caplog.at_level("INFO", "siglip.losses.plan"):
        ring.sigmoid_loss(zimg, ztxt, t, b, mesh=mesh)
    assert "exchange gather (cpu, n=8, d=4, D=8: ring" in caplog.text


def mesh_of_kind(kind: str, devices: int, platform: str = "tpu", hosts: int = 1):
    chips = [
        types.SimpleNamespace(device_kind=kind, platform=platform, process_index=i % hosts)
        for i in range(devices)
    ]
    return types.SimpleNamespace(devices=np.array(chips))


@pytest.mark.parametrize("n, expected", [(256, "gather"), (4096, "bidirectional"), (2**14, "ring")])
def test_a_torus_takes_both_ways_unless_blocks_are_small(n, expected):
    mesh = mesh_of_kind("TPU v4", 64)
    choice = choose(mesh, n=n, d=768, devices=64, itemsize=2)  # type: ignore
    assert choice.name == expected  # sends that compute hides anyway are not worth halving


@pytest.mark.parametrize("kind", ["TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x"])
def test_estimates_follow_from_the_table_of_chips(kind):
    chip, n, d = find_kind(kind), 512, 768
    assert chip is not None
    mesh = mesh_of_kind(kind, 16)
    seconds = choose(mesh, n=n, d=d, devices=16, itemsize=2).seconds  # type: ignore
    visit, block = 6 * n * n * d / chip.flops, n * d * 6 / chip.wire
    assert seconds["ring"] == 16 * max(visit, block + 2 * chip.latency)
    assert seconds["bidirectional"] == 16 * max(visit, block / 2 + 2 * chip.latency)
    gathered = 15 * block / 2  # all-gathers and reduce-scatters, of each block once
    assert seconds["gather"] == pytest.approx(16 * visit + gathered + 8 * chip.latency)


def test_hosts_of_gpus_and_unknown_devices_have_estimates():
    def ring_of(kind, **options):
        mesh = mesh_of_kind(kind, 16, "gpu", **options)
        return choose(mesh, n=256, d=768, devices=16, itemsize=2).seconds["ring"]  # type: ignore

    assert ring_of("NVIDIA H200") < ring_of("NVIDIA H200", hosts=2)
    assert ring_of("NVIDIA H200") < ring_of("NVIDIA X9000")
    assert ring_of("NVIDIA X9000", hosts=2) == ring_of("NVIDIA H200", hosts=2)


def test_gather_takes_two_steps_on_tpus_from_8_devices_on():
    rows = {devices: row_of(mesh_of_kind("TPU v4", devices), devices) for devices in (4, 8, 64, 96)}  # type: ignore
    assert rows == {4: 1, 8: 2, 64: 8, 96: 8}
    assert row_of(mesh_of_kind("TPU v4", 7), 7) == 1  # type: ignore
    assert row_of(mesh_of_kind("NVIDIA H200", 8, "gpu"), 8) == 1  # type: ignore
