"""The towers: names and sizes of the released models, and options that must not change numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from one_device import equations, on_a_device

from siglip.leaf_names import leaves
from siglip.towers import transformer
from siglip.towers.remat import REMAT
from siglip.towers.two_towers import make_model

TINY = dict(width=32, depth=3, mlp_dim=64, num_heads=4)


def tiny_model(img=(), txt=(), **options):
    img = dict(variant="mu/8", **TINY) | dict(img)
    txt = dict(variant="mu", vocab_size=50, **TINY) | dict(txt)
    return make_model(img=img, txt=txt, **options)


@functools.cache
def batch():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (4, 32, 32, 3), np.uint8)
    return jnp.asarray(image), jnp.asarray(rng.integers(0, 50, (4, 8)), jnp.int32)


@functools.cache
def init(model):
    return jax.jit(model.init)(jax.random.key(0), *batch())["params"]


def abstract(img: dict, txt: dict, res: int, token_len: int, **options) -> dict:
    model = make_model(img=img, txt=txt, **options)
    image, text = jnp.zeros((1, res, res, 3)), jnp.zeros((1, token_len), jnp.int32)
    return leaves(jax.eval_shape(model.init, jax.random.key(0), image, text)["params"])


def test_b16_has_the_names_and_shapes_of_the_released_checkpoint():
    params = abstract({"variant": "B/16"}, {"variant": "B", "vocab_size": 32_000}, 224, 64)
    assert len(params) == 412
    assert sum(p.size for p in params.values()) == 203_155_970
    shapes = {k: v.shape for k, v in params.items()}
    attention, mlp = "MultiHeadDotProductAttention_0", "MlpBlock_0"
    block = {
        f"{attention}/out/kernel": (12, 64, 768),
        f"{attention}/out/bias": (768,),
        f"{mlp}/Dense_0/kernel": (768, 3072),
        f"{mlp}/Dense_0/bias": (3072,),
        f"{mlp}/Dense_1/kernel": (3072, 768),
        f"{mlp}/Dense_1/bias": (768,),
        "LayerNorm_0/scale": (768,),
        "LayerNorm_0/bias": (768,),
    }
    for name in ("query", "key", "value"):
        block |= {f"{attention}/{name}/kernel": (768, 12, 64), f"{attention}/{name}/bias": (12, 64)}
    norms = {"LayerNorm_1/scale": (768,), "LayerNorm_1/bias": (768,)}
    expected = {
        "t": (1,),
        "b": (1,),
        "img/embedding/kernel": (16, 16, 3, 768),
        "img/embedding/bias": (768,),
        "img/pos_embedding": (1, 196, 768),
        "img/MAPHead_0/probe": (1, 1, 768),
        "txt/Embed_0/embedding": (32_000, 768),
        "txt/pos_embedding": (1, 64, 768),
        "txt/head/kernel": (768, 768),
        "txt/head/bias": (768,),
    }
    expected |= {f"img/MAPHead_0/{k}": v for k, v in block.items()}
    for encoder in ("img/Transformer", "txt/Encoder_0"):
        expected |= {f"{encoder}/encoder_norm/{k}": (768,) for k in ("scale", "bias")}
        for i in range(12):
            layer = f"{encoder}/encoderblock_{i}"
            expected |= {f"{layer}/{k}": v for k, v in (block | norms).items()}
    assert shapes == expected


@pytest.mark.parametrize(
    "img, txt, vocab_size, res, token_len, count",
    [
        ("B/16", "B", 32_000, 512, 64, 203_791_874),
        ("L/16", "L", 32_000, 256, 64, 652_150_786),
        ("So400m/14", "So400m", 32_000, 224, 16, 877_360_306),
        ("B/16", "B", 250_000, 256, 64, 370_626_050),
        ("B/32", "B", 256_000, 256, 64, 376_856_066),
        ("g-opt/16", "So400m", 256_000, 256, 64, 1_871_393_906),
    ],
)
def test_released_sizes_have_their_published_parameter_counts(
    img, txt, vocab_size, res, token_len, count
):
    params = abstract(
        {"variant": img}, {"variant": txt, "vocab_size": vocab_size}, res, token_len, scan=True
    )
    assert sum(p.size for p in params.values()) == count


def test_embeddings_are_float32_unit_vectors_and_t_is_the_exponential_of_its_parameter():
    for dtype in ("float32", "bfloat16"):
        model = tiny_model(dtype=dtype)
        params = init(model)
        assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype("float32")}
        zimg, ztxt, out = model.apply({"params": params}, *batch())
        for z in (zimg, ztxt):
            assert z.dtype == jnp.float32
            np.testing.assert_allclose(jnp.linalg.norm(z, axis=1), 1, rtol=1e-6)
        np.testing.assert_allclose(params["t"], [np.log(10)], rtol=1e-6)
        np.testing.assert_allclose(out["t"], 10, rtol=1e-6)
        assert out["b"] == -10


def test_bfloat16_is_used_by_both_towers_and_the_head_and_stays_near_float32():
    params = init(tiny_model())

    def matmul_inputs(dtype):
        model = tiny_model(dtype=dtype)
        jaxpr = jax.make_jaxpr(lambda p: model.apply({"params": p}, *batch())[:2])(params)
        return {
            v.aval.dtype.name
            for eqn in equations(jaxpr.jaxpr)
            if eqn.primitive.name in ("dot_general", "conv_general_dilated")
            for v in eqn.invars
        }

    assert matmul_inputs("bfloat16") == {"bfloat16"}
    assert matmul_inputs("float32") == {"float32"}
    exact, short = (
        tiny_model(dtype=d).apply({"params": params}, *batch())[:2] for d in ("float32", "bfloat16")
    )
    for e, s in zip(exact, short):
        cosines = jnp.sum(e * s, axis=1)
        assert jnp.all(cosines > 0.999) and jnp.any(e != s)


def test_bfloat16_neither_rounds_the_residuals_nor_sums_the_table_gradient():
    model = tiny_model(dtype="bfloat16")
    params = init(model)

    def loss(params):
        return model.apply({"params": params}, *batch())[1].sum()

    sums = [
        eqn.invars[0].aval.dtype
        for eqn in equations(jax.make_jaxpr(jax.grad(loss))(params).jaxpr)
        if eqn.primitive.name == "scatter-add" and eqn.invars[0].aval.shape == (50, 32)
    ]
    assert sums == [jnp.float32]
    adds = [
        eqn.outvars[0].aval.dtype
        for eqn in equations(jax.make_jaxpr(loss)(params).jaxpr)
        if eqn.primitive.name == "add"
        and eqn.outvars[0].aval.shape == (4, 8, 32)
        and all(v.aval.shape == (4, 8, 32) for v in eqn.invars if hasattr(v, "aval"))
    ]
    assert jnp.float32 in adds


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize(
    "group, remat", [(0, remat) for remat in REMAT] + [(2, "none"), (2, "mlp"), (2, "full")]
)
def test_scan_remat_and_groups_leave_embeddings_and_gradients_as_they_are(scan, remat, group):
    params = init(tiny_model())

    def to_layout(params, change):
        new = {name: dict(params[name]) for name in ("img", "txt")}
        for name, encoder in (("img", "Transformer"), ("txt", "Encoder_0")):
            new[name][encoder] = change(params[name][encoder])
        return {**params, **new}

    def values_and_grads(model, params):
        def f(params):
            zimg, ztxt, _ = model.apply({"params": params}, *batch())
            return jnp.sum(zimg * jnp.roll(ztxt, 1)), (zimg, ztxt)

        (_, out), grads = on_a_device(jax.value_and_grad(f, has_aux=True))(params)
        return out, grads

    want, want_grads = values_and_grads(tiny_model(), params)
    mine = to_layout(params, transformer.stack_blocks) if scan else params
    sizes = {"group": group}
    model = tiny_model(sizes, sizes, scan=scan, remat=remat)
    got, grads = values_and_grads(model, mine)
    fresh = jax.eval_shape(model.init, jax.random.key(0), *batch())["params"]
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, mine)
    if scan:
        grads = to_layout(grads, transformer.unstack_blocks)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), got, want)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), grads, want_grads
    )


def test_remat_lowers_memory():
    image = jax.ShapeDtypeStruct((64, 32, 32, 3), jnp.float32)

    def temp(**options):
        model = tiny_model(img=dict(depth=8, variant="mu/4"), **options)
        params = jax.eval_shape(model.init, jax.random.key(0), *batch())["params"]

        def loss(params, image):
            return model.apply({"params": params}, image)[0].sum()

        compiled = jax.jit(jax.grad(loss)).lower(params, image).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # Without scan XLA's CPU backend drops the barrier and merges the recomputation again, so there
    # only the request can be tested (below).
    assert temp(scan=True, remat="full") < 0.6 * temp(scan=True, remat="none")


@pytest.mark.parametrize("scan", [False, True])
def test_remat_is_asked_for_in_every_layer(scan):
    def remats(remat):
        model = tiny_model(scan=scan, remat=remat)
        params = jax.eval_shape(model.init, jax.random.key(0), *batch())["params"]
        jaxpr = jax.make_jaxpr(lambda p: model.apply({"params": p}, *batch())[:2])(params)
        return sum("remat" in eqn.primitive.name for eqn in equations(jaxpr.jaxpr))

    for remat in REMAT:
        assert remats(remat) == (0 if remat == "none" else 2 if scan else 6)


@pytest.mark.parametrize("pool", ["map", "gap", "tok"])
def test_image_pools(pool):
    model = tiny_model(img=dict(pool=pool))
    params = init(model)
    assert ("MAPHead_0" in params["img"]) == (pool == "map")
    assert ("cls" in params["img"]) == (pool == "tok")
    zimg, _, _ = model.apply({"params": params}, *batch())
    assert zimg.shape == (4, 32) and jnp.all(jnp.isfinite(zimg))


@pytest.mark.parametrize("pool", ["last", "first", "gap", "max", "map"])
def test_text_pools(pool):
    model = tiny_model(txt=dict(pool=pool))
    params = init(model)
    _, ztxt, _ = model.apply({"params": params}, *batch())
    assert ztxt.shape == (4, 32) and jnp.all(jnp.isfinite(ztxt))


def test_last_and_first_pool_read_the_token_they_are_named_after():
    # Without layers in between, only the pooled position can matter.
    for pool, changed in (("last", -1), ("first", 0)):
        model = tiny_model(txt=dict(pool=pool, depth=0))
        params = init(model)
        _, text = batch()
        for position in range(text.shape[1]):
            other = text.at[:, position].set((text[:, position] + 1) % 50)
            same = jnp.allclose(
                model.apply({"params": params}, text=text)[1],
                model.apply({"params": params}, text=other)[1],
            )
            assert same == (position != changed % text.shape[1])


def test_bottleneck_replaces_the_table_by_a_narrow_one_and_a_projection():
    params = leaves(init(tiny_model(txt=dict(bottleneck=6))))
    assert params["txt/Embed_0/embedding"].shape == (50, 6)
    assert params["txt/embed_projection/kernel"].shape == (6, 32)
    assert "txt/embed_projection/bias" not in params


def test_patches_are_dropped_at_random_in_training_only():
    model = tiny_model(img=dict(drop_patches=0.5))
    params, image = init(model), batch()[0]
    assert leaves(params).keys() == leaves(init(tiny_model())).keys()

    def embed(seed=None):
        rngs = {} if seed is None else {"dropout": jax.random.key(seed)}
        train = seed is not None
        return model.apply({"params": params}, image, train=train, rngs=rngs)[0]

    whole = tiny_model().apply({"params": params}, image)[0]
    np.testing.assert_array_equal(embed(), whole)
    assert jnp.any(embed(0) != whole) and jnp.any(embed(0) != embed(1))
    np.testing.assert_array_equal(embed(0), embed(0))
    # Half of the tokens reach the encoder: the patches of a constant image are all alike but for
    # their positions, so without positions dropping must change nothing.
    nowhere = {"pos_embedding": jnp.zeros_like(params["img"]["pos_embedding"])}
    params = {**params, "img": {**params["img"], **nowhere}}
    image = jnp.full_like(image, 7)
    np.testing.assert_allclose(
        embed(0), model.apply({"params": params}, image)[0], rtol=1e-4, atol=1e-5
    )
    jaxpr = str(jax.make_jaxpr(lambda: embed(0))())
    assert "f32[4,8,32]" in jaxpr and "f32[4,16,64]" not in jaxpr  # 8 of 16 tokens in the MLP


def test_uint8_images_are_normalised_to_minus_one_to_one():
    model, image = tiny_model(), batch()[0]
    params = init(model)
    floats = image.astype(jnp.float32) / 255 * 2 - 1
    a, b = (model.apply({"params": params}, x)[0] for x in (image, floats))
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_a_model_without_bias_has_no_such_parameter():
    model = tiny_model(b_init=None)
    params = init(model)
    assert "b" not in params
    assert model.apply({"params": params}, *batch())[2]["b"] is None


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(img=dict(variant="Q/16")), "'Q' is none of mu, Ti, S"),
        (dict(img=dict(variant="B")), "needs a patch size: 'B/16'"),
        (dict(txt=dict(variant="B/16")), "must not have a patch size"),
        (dict(img=dict(width=15)), "width 15 of the image tower does not divide into 4 heads"),
        (dict(txt=dict(mlp_dim=0)), "mlp_dim of the text tower must be positive, not 0"),
        (dict(img=dict(pool="mean")), "pool 'mean' of the image tower is none of map, gap, tok"),
        (dict(txt=dict(pool="eos")), "pool 'eos' of the text tower"),
        (dict(txt=dict(out_dim=16)), "embedding widths differ: image 32, text 16"),
        (dict(txt=dict(out_dim=0, width=16)), "embedding widths differ: image 32, text 16"),
        (dict(img=dict(drop_patches=1.0)), "drop_patches must be in"),
        (dict(dtype="float16"), "dtype 'float16' is none of float32, bfloat16"),
        (dict(img={"group": -1}), "group of the image tower must be 0 .all. or more, not -1"),
        (dict(txt={"group": -1}), "group of the text tower must be"),
        (dict(remat="all"), "remat 'all' is none of none, elementwise, mlp, dense, full"),
        (dict(t_init=0), "must be positive"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(**options)


def test_a_text_tower_as_wide_as_the_images_needs_no_head():
    model = tiny_model(txt=dict(out_dim=0))
    params = init(model)
    assert "head" not in params["txt"]
    assert model.apply({"params": params}, *batch())[1].shape == (4, 32)
    assert "head" in init(tiny_model(txt=dict(out_dim=None)))["txt"]


def test_pixels_beyond_whole_patches_are_not_seen():
    # So400m/14 at 384 px: 27 patches a side, which are 378 px.
    model, image = tiny_model(), batch()[0]
    params = init(model)
    larger = jnp.pad(image, ((0, 0), (0, 6), (0, 7), (0, 0)), constant_values=9)
    one, other = (model.apply({"params": params}, x)[0] for x in (image, larger))
    np.testing.assert_allclose(one, other, atol=1e-6)
    so400m = {"variant": "So400m/14"}, {"variant": "So400m", "vocab_size": 32_000}
    assert abstract(*so400m, 384, 64, scan=True)["img/pos_embedding"].shape == (1, 729, 1152)


def test_an_image_smaller_than_a_patch_is_refused():
    model = tiny_model()
    with pytest.raises(ValueError, match=r"\(7, 32, 3\) hold no patch of 8 x 8 pixels"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 7, 32, 3)))
