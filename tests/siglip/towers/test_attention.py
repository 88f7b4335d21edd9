"""Attention: every implementation equals the definition, and each device gets the one it should."""

import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding
from one_device import on_a_device
from topologies import compile_for, devices_of

from siglip.towers import attention
from siglip.towers.transformer import EncoderBlock
from siglip.towers.two_towers import make_model

H100 = types.SimpleNamespace(
    platform="gpu", device_kind="NVIDIA H100 80GB HBM3", compute_capability="9.0"
)
T4 = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA Tesla T4", compute_capability="7.5")
TPU = types.SimpleNamespace(platform="tpu", device_kind="TPU v4")
CPU = types.SimpleNamespace(platform="cpu", device_kind="cpu")


@pytest.fixture
def with_cudnn(monkeypatch):
    """A machine that pretends to have cuDNN, so that programs with it can be lowered."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: False)


def arrays(dtype, n=3, length=10, heads=2, dim=8, masked=True):
    """query, key, value, a cotangent and a mask that has nothing True in its first row."""
    rng = np.random.default_rng(0)
    shape = n, length, heads, dim
    mask = rng.random((n, length)) < 0.6
    mask[0] = False
    qkvg = [jnp.asarray(rng.normal(size=shape), dtype) for _ in range(4)]
    return *qkvg, attention.key_mask(jnp.asarray(mask)) if masked else None


def all_gradients(f, query, key, value, grad, mask):
    """(output, gradient by query, by key, by value) of f."""
    out, vjp = jax.vjp(lambda *qkv: f(*qkv, mask), query, key, value)
    return out, *vjp(grad)


def definition(query, key, value, mask):
    return jax.nn.dot_product_attention(query, key, value, mask=mask)


@pytest.mark.parametrize("dim", [8, 64])  # heads on their own, and in packs of two
@pytest.mark.parametrize("masked", [False, True])
def test_tpu_attention_equals_the_definition_with_all_gradients(masked, dim):
    given = arrays("float32", heads=4, dim=dim, masked=masked)
    want = jax.jit(all_gradients, static_argnums=0)(definition, *given)
    got = jax.jit(all_gradients, static_argnums=0)(attention._tpu_attention, *given)
    for a, b in zip(got, want):
        np.testing.assert_allclose(a, b, atol=2e-6)


@pytest.mark.parametrize("dim", [64, 72])
@pytest.mark.parametrize("masked", [False, True])
def test_tpu_attention_in_bfloat16_is_as_near_as_the_definition_in_bfloat16(masked, dim):
    given = arrays("bfloat16", n=2, length=196, dim=dim, masked=masked)
    *exact, mask = (x if x is None or x.dtype == bool else x.astype("float32") for x in given)
    exact = all_gradients(definition, *exact, mask)
    run = jax.jit(all_gradients, static_argnums=0)
    plain = run(definition, *given)
    mine = run(lambda *x: attention.dot_product_attention("tpu", *x), *given)
    for a, b, c in zip(exact, plain, mine):
        scale = float(jnp.sqrt(jnp.mean(a**2))) + 1e-9
        error = [float(jnp.sqrt(jnp.mean((x.astype("float32") - a) ** 2))) / scale for x in (b, c)]
        assert error[1] < max(1.5 * error[0], 1e-4), error
        assert error[1] < 6e-3, error


def test_only_long_self_attention_in_bfloat16_is_arranged_for_tpus(monkeypatch):
    arranged = []
    monkeypatch.setattr(attention, "_tpu_attention", lambda q, *_: arranged.append(q.shape) or q)
    q, k, v, *_ = arrays("bfloat16", length=128)
    attention.dot_product_attention("tpu", q, k, v)
    attention.dot_product_attention("tpu", q[:, :1], k, v)  # as the MAP head
    attention.dot_product_attention("tpu", *arrays("float32", length=128)[:3])
    attention.dot_product_attention("tpu", *arrays("bfloat16", length=64)[:3])  # texts
    assert arranged == [q.shape]


def block(implementation: str, group: int = 0) -> EncoderBlock:
    return EncoderBlock(256, 4, jnp.dtype("bfloat16"), implementation, group=group)


def tokens_and_parameters():
    """Tokens [2, 130, 256], and random parameters of a block with two packs of heads."""
    x = jax.random.normal(jax.random.key(0), (2, 130, 256))
    params = block("xla").init(jax.random.key(1), x)["params"]
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    leaves = [p + 0.1 * jax.random.normal(k, p.shape) for p, k in zip(leaves, keys)]
    return x, jax.tree.unflatten(tree, leaves)


def test_a_block_for_tpus_has_the_parameters_of_the_others():
    x, _ = tokens_and_parameters()
    plain, tpu = (block(name).init(jax.random.key(0), x) for name in ("xla", "tpu"))
    jax.tree.map(np.testing.assert_array_equal, plain, tpu)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("group", [0, 1])
def test_a_block_for_tpus_yields_what_the_others_do_with_all_gradients(masked, group):
    x, params = tokens_and_parameters()
    mask = jnp.arange(130)[None] < jnp.array([[130], [99]]) if masked else None

    def gradients(block, params):
        def loss(params, x):
            out = block.apply({"params": params}, x, mask)[0]
            return (out**2 * jnp.cos(x)).sum(), out

        return on_a_device(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, x)

    exact = EncoderBlock(256, 4, jnp.dtype("float32"), "xla")
    want = gradients(exact, params)
    plain, tpu = (gradients(block(name, group), params) for name in ("xla", "tpu"))

    def compare(path, a, b, c):
        scale = float(jnp.abs(a).max())
        errors = [float(jnp.sqrt(jnp.mean((x - a) ** 2))) for x in (b, c)]
        if "key']['bias" not in jax.tree_util.keystr(path):  # whose gradient is 0 but for rounding
            assert errors[1] < 1.5 * errors[0] < 0.05 * scale, (path, errors, scale)

    jax.tree_util.tree_map_with_path(compare, want, plain, tpu)


def test_projections_for_tpus_yield_packs_of_heads():
    """An array of single heads between a projection and attention would be copied."""
    x, params = tokens_and_parameters()

    def shapes(implementation, group=0):
        f = lambda p: block(implementation, group).apply({"params": p}, x)[0].sum()  # noqa: E731
        program = str(jax.make_jaxpr(on_a_device(jax.grad(f)))(params))
        return {f"[2,130,{sizes}]" for sizes in re.findall(r"\[[12],130,([\d,]*)\]", program)}

    assert "[2,130,4,64]" in shapes("xla") and "[2,130,2,128]" not in shapes("xla")
    assert "[2,130,4,64]" not in shapes("tpu") and "[2,130,2,128]" in shapes("tpu")
    on_chip = shapes("tpu", group=1)  # where copies are cheap
    assert "[2,130,4,64]" in on_chip and "[2,130,2,128]" not in on_chip


def test_gelu_is_computed_once_for_a_group_that_stays_on_the_chip():
    x, params = tokens_and_parameters()

    def barriers(group):
        f = lambda p: block("xla", group).apply({"params": p}, x)[0]  # noqa: E731
        return str(jax.make_jaxpr(on_a_device(f))(params)).count("optimization_barrier")

    assert (barriers(0), barriers(1), barriers(2)) == (0, 1, 0)  # 2: all examples


def large_arrays(program: str) -> set[str]:
    """Types of all arrays [.., 196, 196] that operations of a program write, without fusions'."""
    program = re.sub(r"(?ms)^%fused_computation.*?^}", "", program)
    return set(re.findall(r"(\w+)\[256,\d+,196,196\]", program))


def test_on_tpus_no_logits_are_written_in_float32():
    sharding = SingleDeviceSharding(devices_of("v4:2x2x1")[0])
    x = jax.ShapeDtypeStruct((256, 196, 12, 64), "bfloat16", sharding=sharding)

    def program(implementation):
        def f(*qkvg):
            attend = lambda q, k, v, mask: attention.dot_product_attention(  # noqa: E731
                implementation, q, k, v, mask
            )
            return all_gradients(attend, *qkvg, None)

        return large_arrays(compile_for(f, x, x, x, x).as_text())

    assert program("tpu") == {"bf16"}
    assert "f32" in program("xla")


@pytest.mark.parametrize(
    "option, device, implementation",
    [
        ("auto", CPU, "xla"),
        ("auto", T4, "xla"),
        ("auto", H100, "cudnn"),
        ("auto", TPU, "tpu"),
        ("xla", H100, "xla"),
        ("xla", TPU, "xla"),
        ("fused", H100, "cudnn"),
        ("fused", TPU, "fused"),
    ],
)
def test_each_device_gets_its_implementation(option, device, implementation, with_cudnn):
    assert attention.resolve(option, [device]) == implementation
    assert attention.resolve("auto") == "xla"  # the CPU of this machine


def test_without_cudnn_a_gpu_is_left_to_xla(monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    def absent():
        raise RuntimeError("cuDNN is not detected.")

    monkeypatch.setattr(cudnn, "check_cudnn_version", absent)
    assert attention.resolve("auto", [H100]) == "xla"


@pytest.mark.parametrize("device", [CPU, T4])
def test_fused_is_refused_where_there_is_no_kernel(device):
    with pytest.raises(ValueError, match=f"not for {device.device_kind}; 'auto' takes what"):
        attention.resolve("fused", [device])


def test_an_unknown_option_is_refused():
    with pytest.raises(ValueError, match="attention 'flash' is none of auto, xla, fused"):
        make_model(
            img={"variant": "mu/8"}, txt={"variant": "mu", "vocab_size": 9}, attention="flash"
        )


@pytest.mark.parametrize(
    "name, cudnn", [("h200:1x1x1", True), ("v4:2x2x1", False), ("cpu:1", False)]
)
def test_a_model_takes_the_attention_of_the_devices_that_it_is_made_for(name, cudnn, with_cudnn):
    device = devices_of(name)[0]
    model = make_model(
        [device],
        img=dict(variant="mu/8", pool="gap"),
        txt=dict(variant="mu", vocab_size=9, pool="map"),
        dtype="bfloat16",
    )
    image, text = jnp.zeros((2, 32, 32, 3)), jnp.zeros((2, 8), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), image, text)
    given = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(device)),
        (params, image, text),
    )

    def loss(params, image, text):
        zimg, ztxt, _ = model.apply(params, image, text)
        return (zimg * ztxt).sum()

    program = jax.jit(jax.grad(loss)).lower(*given).as_text()
    assert (program.count("__cudnn$") == 4) == cudnn  # two towers of a block, forward and backward
    assert ("__cudnn$" in program) == cudnn


@pytest.mark.parametrize(
    "length, queries, head_dim, dtype, fits",
    [
        (196, 196, 64, "bfloat16", True),  # B/16 at 224 px
        (64, 64, 64, "bfloat16", True),
        (256, 256, 72, "bfloat16", True),  # So400m
        (196, 1, 64, "bfloat16", False),  # attention pooling
        (49, 49, 64, "bfloat16", False),  # an odd length
        (196, 196, 64, "float32", False),
        (196, 196, 132, "bfloat16", False),
    ],
)
def test_attention_is_left_to_cudnn_only_where_cudnn_takes_it(
    length, queries, head_dim, dtype, fits, with_cudnn, unchecked_shapes
):
    q = jax.ShapeDtypeStruct((4, queries, 2, head_dim), dtype)
    kv = jax.ShapeDtypeStruct((4, length, 2, head_dim), dtype)
    assert attention.fits_cudnn(q, kv) == fits

    def f(q, k, v):
        return attention.dot_product_attention("cudnn", q, k, v).astype(jnp.float32).sum()

    grad = jax.jit(jax.grad(f, argnums=(0, 1, 2))).trace(q, kv, kv)
    program = grad.lower(lowering_platforms=("cuda",)).as_text()
    assert program.count("__cudnn$") == (2 if fits else 0)


def test_masked_attention_is_never_left_to_cudnn(monkeypatch):
    chosen = []
    monkeypatch.setattr(
        jax.nn,
        "dot_product_attention",
        lambda q, *rest, mask=None, implementation=None: chosen.append(implementation) or q,
    )
    q = jnp.zeros((2, 8, 2, 64), jnp.bfloat16)
    attention.dot_product_attention("cudnn", q, q, q, jnp.ones((2, 1, 1, 8), bool))
    attention.dot_product_attention("cudnn", q, q, q)
    assert chosen == [None, "cudnn"]
