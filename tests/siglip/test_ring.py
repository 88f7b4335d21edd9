"""The ring against the definition, and what its compiled program holds and sends."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from siglip import losses, ring

MESHES = [(1,), (2,), (3,), (4,), (8,), (2, 2), (4, 2)]


def mesh_of(*shape: int):
    devices = jax.devices()[: int(np.prod(shape))]
    axes = ("data", "fsdp")[: len(shape)]
    return jax.make_mesh(shape, axes, devices=devices, axis_types=(AxisType.Auto,) * len(shape))


def inputs(n: int, d: int, t: float, b: float, seed: int = 0):
    rng = np.random.default_rng(seed)
    zimg, ztxt = rng.normal(size=(2, n, d))
    ztxt = ztxt + 0.3 * zimg  # positives that stand out, as after some training
    zimg, ztxt = (
        jnp.asarray(z / np.linalg.norm(z, axis=1, keepdims=True), jnp.float32) for z in (zimg, ztxt)
    )
    return zimg, ztxt, jnp.float32(t), jnp.float32(b)


def relative_error(got, want) -> float:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.mark.parametrize("shape", MESHES, ids=str)
@pytest.mark.parametrize("t, b", [(10.0, -10.0), (118.0, -12.7)])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_ring_loss_equals_definition_with_all_gradients(shape, t, b, masked):
    mesh, n = mesh_of(*shape), 10 * int(np.prod(shape)) * (1 if np.prod(shape) > 2 else 5)
    args = inputs(n, 128, t, b)
    mask = jnp.asarray(np.random.default_rng(1).random(n) > 0.2) if masked else None

    def definition(*args):
        return losses.sigmoid_loss(*args, mask)

    def fast(*args):  # 7 rows a tile: neither 10 nor 50 is a multiple
        return ring.sigmoid_loss(*args, mask, mesh=mesh, tile=7)

    # In float64, because the definition in float32 is itself off by up to 1e-6 (t, 3 devices).
    with jax.enable_x64(True):
        exact = [jnp.asarray(np.asarray(x, np.float64)) for x in args]
        want, want_grads = jax.jit(jax.value_and_grad(definition, argnums=(0, 1, 2, 3)))(*exact)
        assert want.dtype == jnp.float64
    got, got_grads = jax.jit(jax.value_and_grad(fast, argnums=(0, 1, 2, 3)))(*args)
    assert relative_error(got, want) < 1e-6
    for name, g, w in zip(("zimg", "ztxt", "t", "b"), got_grads, want_grads):
        assert relative_error(g, w) < 1e-6, name
    assert relative_error(jax.jit(fast)(*args), want) < 1e-6  # the value-only program


def test_no_bias_is_a_bias_of_zero():
    zimg, ztxt, t, _ = inputs(8, 16, 10.0, 0.0)
    want = losses.sigmoid_loss(zimg, ztxt, t, jnp.float32(0))
    for loss in (losses.sigmoid_loss, ring.make_sigmoid_loss(mesh_of(2))):
        assert relative_error(loss(zimg, ztxt, t, None), want) < 1e-6


def test_without_jit_too():
    args = inputs(8, 16, 10.0, -10.0)
    got = ring.sigmoid_loss(*args, mesh=mesh_of(2))
    assert relative_error(got, losses.sigmoid_loss(*args)) < 1e-6


def test_gradients_scale_with_the_cotangent_and_may_be_asked_for_singly():
    args = inputs(16, 8, 10.0, -10.0)
    mesh = mesh_of(4)
    half = jax.grad(lambda *a: 0.5 * ring.sigmoid_loss(*a, mesh=mesh), argnums=(0, 2))(*args)
    whole = jax.grad(lambda *a: losses.sigmoid_loss(*a), argnums=(0, 2))(*args)
    for h, w in zip(half, whole):
        assert relative_error(2 * h, w) < 1e-6


def test_t_gradient_is_the_inner_product_of_embeddings_and_their_gradients():
    zimg, ztxt, t, b = inputs(32, 8, 10.0, -10.0)
    grads = jax.grad(lambda *a: ring.sigmoid_loss(*a, mesh=mesh_of(4)), argnums=(0, 1, 2))
    dx, dy, dt = grads(zimg, ztxt, t, b)
    np.testing.assert_allclose(np.vdot(zimg, dx), t * dt, rtol=1e-5)
    np.testing.assert_allclose(np.vdot(ztxt, dy), t * dt, rtol=1e-5)


def test_bfloat16_embeddings_keep_float32_logits_and_accumulators():
    args = inputs(64, 32, 117.0, -12.9)
    short = (args[0].astype(jnp.bfloat16), args[1].astype(jnp.bfloat16), *args[2:])
    exact = (short[0].astype(jnp.float32), short[1].astype(jnp.float32), *args[2:])
    mesh = mesh_of(4)
    grads = jax.grad(lambda *a: ring.sigmoid_loss(*a, mesh=mesh), argnums=(0, 1))(*short)
    want = jax.grad(losses.sigmoid_loss, argnums=(0, 1))(*exact)
    for g, w in zip(grads, want):
        assert g.dtype == jnp.bfloat16
        assert relative_error(g.astype(jnp.float32), w) < 4e-3  # the rounding of bf16 itself


def compiled(devices: int, n: int = 1024, d: int = 256, grads: bool = True, **options):
    mesh = mesh_of(devices)
    rows = NamedSharding(mesh, PartitionSpec(("data",)))
    z = jax.ShapeDtypeStruct((n * devices, d), jnp.float32, sharding=rows)
    scalar = jax.ShapeDtypeStruct((), jnp.float32)

    def loss(*args):
        return ring.sigmoid_loss(*args, mesh=mesh, **options)

    f = jax.value_and_grad(loss, argnums=(0, 1, 2, 3)) if grads else loss
    return jax.jit(f).lower(z, z, scalar, scalar).compile()


def ops(program, name: str) -> int:
    return len(re.findall(rf"= \S+ {name}(?:-start)?\(", program.as_text()))


def test_temporary_memory_per_device_does_not_grow_with_the_devices():
    n, d = 1024, 256
    temp = {k: compiled(k, n, d).memory_analysis().temp_size_in_bytes for k in (4, 8)}
    assert temp[8] == pytest.approx(temp[4], rel=0.02)
    tiles = compiled(8, n, d, tile=128).memory_analysis().temp_size_in_bytes
    assert tiles <= 26 * n * d + 128 * n * 4
    # The definition, sharded by XLA, grows with D: this is what the ring is for.
    assert temp[8] < 0.1 * 4 * n * (8 * n) * 3


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_the_unrolled_ring_sends_each_text_d_minus_1_and_each_accumulator_d_times(devices):
    program = compiled(devices, n=64, d=32, unroll=devices)
    assert ops(program, "collective-permute") == (devices - 1) + devices
    assert ops(program, "all-gather") == 0
    assert ops(program, "all-reduce") == 1
    value_only = compiled(devices, n=64, d=32, unroll=devices, grads=False)
    assert ops(value_only, "collective-permute") == devices - 1
    assert ops(value_only, "all-gather") == 0


def test_the_looped_ring_has_the_same_hops():
    # Step 0 sends texts; the loop (D - 2 times) both; the last step and the way home accumulators.
    program = compiled(8, n=64, d=32)
    assert ops(program, "collective-permute") == 1 + 2 + 1 + 1
    assert '"known_trip_count":{"n":"6"}' in program.as_text()
    assert ops(program, "all-gather") == 0


def test_three_matmuls_with_gradients_and_one_without():
    def dots(f):
        return str(jax.make_jaxpr(f)(*inputs(64, 32, 10.0, -10.0))).count("dot_general")

    def loss(*args):
        return ring.sigmoid_loss(*args, mesh=mesh_of(1), tile=64)

    assert dots(loss) == 1
    assert dots(jax.value_and_grad(loss, argnums=(0, 1, 2, 3))) == 3


def test_mistakes_are_named():
    zimg, ztxt, t, b = inputs(12, 4, 10.0, -10.0)
    with pytest.raises(ValueError, match="12 pairs do not divide over 8 devices"):
        ring.sigmoid_loss(zimg, ztxt, t, b, mesh=mesh_of(8))
    with pytest.raises(ValueError, match="must be two arrays"):
        ring.sigmoid_loss(zimg, ztxt[:4], t, b, mesh=mesh_of(2))
