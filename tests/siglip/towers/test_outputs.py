"""What the towers give beside the embedding: tokens, blocks, the pooled vector, attention."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from siglip.towers import transformer
from siglip.towers.remat import REMAT
from siglip.towers.two_towers import make_model
from siglip.towers.vit import Patches

TINY = dict(width=32, depth=3, mlp_dim=64, num_heads=4)
SHAPES = np.array([[4, 4], [2, 5], [1, 16], [0, 0]], np.int32)  # of NaFlex grids, 16 patches long
EVERY = ("attention", "block:0", "block:1", "block:-1")


def make(img=(), txt=(), **options):
    return make_model(
        img=dict(variant="mu/8", **TINY) | dict(img),
        txt=dict(variant="mu", vocab_size=50, **TINY) | dict(txt),
        **options,
    )


def texts():
    return jnp.asarray(np.random.default_rng(1).integers(0, 50, (4, 8)), jnp.int32)


def images(naflex=False):
    rng = np.random.default_rng(0)
    if not naflex:
        return jnp.asarray(rng.uniform(-1, 1, (4, 32, 32, 3)), jnp.float32)
    mask = np.arange(16) < SHAPES.prod(axis=1, keepdims=True)
    values = rng.uniform(-1, 1, (4, 16, 192)).astype(np.float32)
    return Patches(jnp.asarray(values), jnp.asarray(mask), jnp.asarray(SHAPES))


@functools.cache
def init(model, naflex=False):
    params = jax.jit(model.init)(jax.random.key(0), images(naflex), texts())["params"]
    # Attention of fresh weights is nearly uniform; this one prefers some tokens.
    return jax.tree.map(lambda x: x * 3 if x.ndim > 2 else x, params)


def encode(model, params, x, capture=(), tower="image"):
    def apply(params, x):
        return model.apply({"params": params}, x, capture=capture, method=f"encode_{tower}")

    return jax.jit(apply)(params, x)


def close(got, want):
    scale = max(1.0, float(np.abs(want).max()))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("remat", REMAT)
def test_blocks_are_the_residuals_that_each_layer_leaves_with_scan_and_remat_too(scan, remat):
    params = init(make())
    encoder = params["img"]["Transformer"]
    model = make(scan=scan, remat=remat)
    stacked = {**params["img"], "Transformer": transformer.stack_blocks(encoder)}
    _, out = encode(model, {"img": stacked if scan else params["img"]}, images(), EVERY)
    block = transformer.EncoderBlock(64, 4, jnp.dtype("float32"))
    for i, (before, after) in enumerate((("block:0", "block:1"), ("block:1", "block:-1")), 1):
        want, _ = block.apply({"params": encoder[f"encoderblock_{i}"]}, out[before])
        close(out[after], want)
    norm = nn.LayerNorm(epsilon=1e-6)
    close(out["tokens"], norm.apply({"params": encoder["encoder_norm"]}, out["block:-1"]))
    assert out["tokens"].shape == out["block:0"].shape == (4, 16, 32)


def test_the_first_block_reads_patches_and_their_positions():
    model = make(img=dict(depth=1))
    params = init(model)
    _, out = encode(model, params, images(), ("block:0",))
    img = params["img"]
    conv = nn.Conv(32, (8, 8), strides=(8, 8), padding="VALID")
    x = conv.apply({"params": img["embedding"]}, images()).reshape(4, 16, 32)
    block = transformer.EncoderBlock(64, 4, jnp.dtype("float32"))
    layer = {"params": img["Transformer"]["encoderblock_0"]}
    close(out["block:0"], block.apply(layer, x + img["pos_embedding"])[0])


@pytest.mark.parametrize("naflex", [False, True])
def test_the_map_head_turns_tokens_into_the_pooled_vector_by_the_attention_it_gives(naflex):
    model = make(img=dict(out_dim=16, naflex_grid=4 if naflex else None), txt=dict(out_dim=16))
    params = init(model, naflex)
    zimg, out = encode(model, params, images(naflex), ("attention",))
    head, weights = params["img"]["MAPHead_0"], out["attention"]
    assert weights.shape == (4, 4, 16) and weights.dtype == jnp.float32
    assert float(jnp.max(weights)) > 0.1  # not uniform, which is 1 / 16

    attention, dense = head["MultiHeadDotProductAttention_0"], nn.DenseGeneral((4, 8))
    values = dense.apply({"params": attention["value"]}, out["tokens"])
    x = jnp.einsum("nhl,nlhd->nhd", weights, values)
    x = nn.DenseGeneral(32, axis=(-2, -1)).apply({"params": attention["out"]}, x)
    y = nn.LayerNorm(epsilon=1e-6).apply({"params": head["LayerNorm_0"]}, x)
    mlp = transformer.MlpBlock(64, jnp.dtype("float32"))
    close(out["pooled"], x + mlp.apply({"params": head["MlpBlock_0"]}, y))

    z = nn.Dense(16).apply({"params": params["img"]["head"]}, out["pooled"])
    close(out["unnormalized"], z)
    close(zimg, z / jnp.linalg.norm(z, axis=1, keepdims=True))
    close(weights.sum(axis=2), np.ones((4, 4)))
    if naflex:
        mask = images(naflex).mask
        np.testing.assert_array_equal(out["mask"], mask)
        real = np.asarray(mask)[:3]  # the last image has no patch
        assert not np.moveaxis(np.asarray(weights)[:3], 1, 2)[~real].any()
    else:
        assert out["mask"] is None


@pytest.mark.parametrize(
    "pool, by_hand",
    [
        ("last", lambda x: x[:, -1]),
        ("first", lambda x: x[:, 0]),
        ("gap", lambda x: x.mean(axis=1)),
        ("max", lambda x: x.max(axis=1)),
    ],
)
def test_text_tokens_are_what_the_pool_reads(pool, by_hand):
    model = make(txt=dict(pool=pool))
    params = init(model)
    ztxt, out = encode(model, {"txt": params["txt"]}, texts(), ("block:-1",), "text")
    assert out["tokens"].shape == (4, 8, 32) and out["mask"] is None
    close(out["pooled"], by_hand(out["tokens"]))
    z = nn.Dense(32).apply({"params": params["txt"]["head"]}, out["pooled"])
    close(ztxt, z / jnp.linalg.norm(z, axis=1, keepdims=True))


def test_the_class_token_stands_before_the_patches():
    model = make(img=dict(pool="tok"))
    _, out = encode(model, init(model), images())
    assert out["tokens"].shape == (4, 17, 32)
    close(out["pooled"], out["tokens"][:, 0])


def test_both_towers_together_give_what_each_gives_alone():
    model = make()
    params = init(model)
    zimg, ztxt, out = model.apply({"params": params}, images(), texts())
    for name, z, x in (("img", zimg, images()), ("txt", ztxt, texts())):
        # Only its own parameters: the other tower cannot have run.
        tower = {"img": "image", "txt": "text"}[name]
        alone, mine = model.apply({"params": {name: params[name]}}, x, method=f"encode_{tower}")
        np.testing.assert_array_equal(alone, z)
        jax.tree.map(np.testing.assert_array_equal, mine, out[name])
        assert mine.keys() == {"tokens", "mask", "pooled", "unnormalized"}
    assert model.apply({"params": params}, images())[2]["txt"] == {}


def test_image_tokens_are_computed_and_differentiated_without_the_text_tower():
    model = make()
    params = init(model)

    def loss(params):
        _, _, out = model.apply({"params": params}, images(), None)
        return jnp.sum(out["img"]["tokens"] ** 2)

    grads = jax.jit(jax.grad(loss))(params)
    assert all(not jnp.any(g) for g in jax.tree.leaves(grads["txt"]))
    assert jnp.any(grads["img"]["embedding"]["kernel"])
    # The vocabulary's table is no input of the compiled program.
    text = jax.jit(loss).lower(params).as_text()
    assert "tensor<1x16x32xf32>" in text and "tensor<50x32xf32>" not in text


@pytest.mark.parametrize("options", [{}, {"scan": True}, {"scan": True, "remat": "mlp"}])
def test_what_is_not_used_leaves_no_trace_in_the_program_of_a_training_step(options):
    model = make(**options)
    params = jax.eval_shape(model.init, jax.random.key(0), images(), texts())["params"]

    def program(capture, *used):
        def loss(img):
            variables = {"params": {"img": img}}
            z, out = model.apply(variables, images(), capture=capture, method="encode_image")
            return sum(jnp.sum(out[name]) for name in used) + jnp.sum(z)

        return jax.jit(jax.value_and_grad(loss)).lower(params["img"]).as_text()

    plain = program(())
    assert program(("attention",)) == plain
    assert program(EVERY, "block:0", "attention") != plain
    if not options:  # a loop's outputs are cut by XLA, which this text comes before
        assert program(EVERY) == plain


@pytest.mark.parametrize(
    "tower, capture, message",
    [
        ("image", "block:3", r"'block:3' is not in a tower of 3 blocks: 0 to 2, or -3 to -1"),
        ("image", "block:-4", "'block:-4' is not in a tower of 3 blocks"),
        ("image", "blocks", "'blocks' is neither 'attention' nor a block such as 'block:-2'"),
        ("text", "attention", r"needs a tower with attention pooling \(pool 'map'\), not 'last'"),
    ],
)
def test_an_output_that_a_tower_has_not_is_named(tower, capture, message):
    model = make()
    x = {"image": images, "text": texts}[tower]()
    with pytest.raises(ValueError, match=message):
        encode(model, init(model), x, (capture,), tower)


def test_a_precomputed_tower_has_its_embeddings_and_nothing_else():
    model = make_model(
        img=dict(variant="precomputed", width=32), txt=dict(variant="mu", vocab_size=50, **TINY)
    )
    x = jnp.asarray(np.random.default_rng(2).normal(size=(4, 32)), jnp.float32)
    zimg, out = model.apply({"params": {}}, x, method="encode_image")
    assert out.keys() == {"pooled", "unnormalized"}
    np.testing.assert_array_equal(out["pooled"], x)
    close(zimg, x / jnp.linalg.norm(x, axis=1, keepdims=True))
    with pytest.raises(ValueError, match="a precomputed tower has embeddings only, no 'attention'"):
        model.apply({"params": {}}, x, capture=("attention",), method="encode_image")
