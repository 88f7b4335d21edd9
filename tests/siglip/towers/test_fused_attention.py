"""The TPU kernel for attention equals the definition in interpret mode, and compiles for TPUs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from topologies import compile_for, devices_of

from siglip.chips import CHIPS
from siglip.sharding import AXES
from siglip.towers import attention, fused_attention
from siglip.towers.fused_attention import work
from siglip.towers.transformer import EncoderBlock

fused = functools.partial(fused_attention.fused_attention, interpret=True)


def arrays(n, length, heads, dim, masked=False, dtype="float32"):
    """query, key, value, a cotangent and a mask that has nothing True in its first row."""
    rng = np.random.default_rng(0)
    qkvg = [jnp.asarray(rng.normal(size=(n, length, heads, dim)), dtype) for _ in range(4)]
    mask = rng.random((n, length)) < 0.6
    mask[0] = False
    return *qkvg, attention.key_mask(jnp.asarray(mask)) if masked else None


@functools.partial(jax.jit, static_argnums=0)
def all_gradients(f, query, key, value, grad, mask):
    out, vjp = jax.vjp(lambda *qkv: f(*qkv, mask), query, key, value)
    return out, *vjp(grad)


def definition(query, key, value, mask):
    return jax.nn.dot_product_attention(query, key, value, mask=mask)


SHAPES = [
    (2, 196, 2, 64, False),  # B/16 at 224 px, with two of its heads
    (2, 208, 2, 64, True),
    (2, 128, 2, 64, False),  # nothing is padded
    (3, 16, 2, 64, True),  # eight texts fit into a row, and there are three
    (9, 50, 2, 64, True),  # two in a row, and one alone
    (2, 300, 2, 64, True),  # several tiles of queries, the last one with padding
    (2, 40, 16, 72, True),  # So400m: heads lie across registers
    (2, 20, 4, 72, True),  # these do not fill registers, and are padded
    (2, 30, 3, 128, True),
    (3, 5, 2, 16, False),
    (1, 1, 2, 64, False),
]


@pytest.mark.parametrize("n, length, heads, dim, masked", SHAPES)
def test_the_kernel_equals_the_definition_with_all_gradients(n, length, heads, dim, masked):
    given = arrays(n, length, heads, dim, masked)
    want = all_gradients(definition, *given)
    for a, b in zip(all_gradients(fused, *given), want):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1e-3, float(jnp.abs(b).max())))


@pytest.mark.parametrize("n, length, heads, dim, masked", [SHAPES[0], SHAPES[3]])
def test_the_kernel_in_bfloat16_is_as_near_as_the_definition(n, length, heads, dim, masked):
    given = arrays(n, length, heads, dim, masked, "bfloat16")
    *exact, mask = given
    exact = all_gradients(definition, *(x.astype("float32") for x in exact), mask)
    results = all_gradients(definition, *given), all_gradients(fused, *given)
    for a, *both in zip(exact, *results):
        error = [float(jnp.sqrt(jnp.mean((x.astype("float32") - a) ** 2))) for x in both]
        size = float(jnp.sqrt(jnp.mean(a**2)))
        assert error[1] < max(1.2 * error[0], 1e-4 * size), (error, size)
        assert error[1] < 5e-3 * size, (error, size)


def test_other_shapes_are_refused(unchecked_shapes):
    q, k, v, _, _ = arrays(1, 8, 2, 16)
    with pytest.raises(ValueError, match="at most 1024 tokens that attend to each other"):
        fused(q[:, :1], k, v)
    long = jnp.zeros((1, 1025, 1, 8))
    with pytest.raises(ValueError, match="at most 1024 tokens"):
        fused(long, long, long)
    assert attention.fits_fused(q, k)
    assert not attention.fits_fused(q[:, :1], k)  # the pooling head
    assert not attention.fits_fused(long, long)


@pytest.mark.parametrize("kind", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_the_kernel_compiles_for_tpus(kind):
    sharding = SingleDeviceSharding(devices_of(kind)[0])
    for n, length, heads, dim, dtype in [
        (4, 196, 12, 64, "bfloat16"),
        (16, 16, 12, 64, "bfloat16"),
        (2, 256, 16, 72, "bfloat16"),
        (2, 729, 16, 72, "bfloat16"),
        (1, 1024, 2, 64, "float32"),
        (1, 380, 2, 128, "float32"),
    ]:
        x = jax.ShapeDtypeStruct((n, length, heads, dim), dtype, sharding=sharding)
        mask = jax.ShapeDtypeStruct((n, 1, 1, length), bool, sharding=sharding)
        f = functools.partial(all_gradients, fused_attention.fused_attention)
        program = compile_for(f, x, x, x, x, mask).as_text()
        assert program.count('custom_call_target="tpu_custom_call"') == 2
        assert f"[{n},{heads},{length},{length}]" not in program


def test_it_works_within_shard_map_on_each_devices_own_examples():
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), AXES)
    *qkvg, mask = arrays(8, 24, 2, 64, masked=True)
    rows = PartitionSpec(AXES)
    f = functools.partial(all_gradients, fused)
    f = jax.shard_map(f, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
    for a, b in zip(jax.jit(f)(*qkvg, mask), all_gradients(definition, *qkvg, mask)):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_a_block_uses_it_within_shard_map_and_xla_elsewhere():
    devices = devices_of("v4:2x2x1")
    mesh = Mesh(np.array(devices).reshape(2, 2), AXES)
    assert attention.resolve("fused", devices) == "fused"
    block = EncoderBlock(256, 2, jnp.dtype("bfloat16"), "fused")
    x = jnp.zeros((8, 196, 128))
    params = jax.eval_shape(block.init, jax.random.key(0), x)

    def grads(params, x):
        return jax.grad(lambda params: block.apply(params, x)[0].sum())(params)

    rows, everywhere = PartitionSpec(AXES), PartitionSpec()
    own = jax.shard_map(
        grads, mesh=mesh, in_specs=(everywhere, rows), out_specs=everywhere, check_vma=False
    )

    def shape(x, spec):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    given = jax.tree.map(lambda x: shape(x, everywhere), params), shape(x, rows)
    assert jax.jit(own).lower(*given).as_text().count("@tpu_custom_call") == 2
    assert "tpu_custom_call" not in jax.jit(grads).lower(*given).as_text()


def test_its_work_is_counted_by_hand():
    # B/16, a pair of heads in 128 columns: keys 208, queries 256. Flops 2 * 7 matmuls, of which
    # five have 208 rows, and two pad 208 to 256.
    count = work(CHIPS["TPU v4"], 256, 196, 12, 64, cores=2)
    logits = 256 * 12 * 208 * 256
    assert count.flops == 2 * 128 * (5 * logits + 2 * 256 * 12 * 256 * 256)
    assert count.exponentials == 2 * logits
    assert count.vector == 18 * logits
    assert count.bytes == 11 * 256 * 208 * 768 * 2
    assert count.seconds == count.flops / 275e12
    # The matrix unit of a v6e is 256 wide: half of it is idle.
    assert work(CHIPS["TPU v6"], 256, 196, 12, 64).flops > 1.6 * count.flops
    # 8 texts of 16 tokens cost what one of 128 costs.
    assert work(CHIPS["TPU v4"], 8, 16, 12, 64) == work(CHIPS["TPU v4"], 1, 128, 12, 64)
