"""siglip.load(...).encode_image(..., output=...): tokens, blocks, attention, vectors."""

import dataclasses

import jax
import numpy as np
import pytest

import siglip
from siglip import checkpoints
from siglip.checkpoints.formats import random_weights
from siglip.checkpoints.spec import Spec
from siglip.towers.vit import Patches

SPEC = Spec(
    {"variant": "mu/16", "depth": 2},
    {"variant": "mu", "vocab_size": 259, "out_dim": 32},
    res=48,
    token_len=8,
    vocab_size=259,
    image="hf-siglip",
    tokenizer={"name": "bytes"},
)
NAFLEX = dict(
    img={"variant": "mu/16", "naflex_grid": 4},
    res=None,
    image="decode | naflex(16, 16, 'bilinear-pil')",
)
NOISE = np.random.default_rng(0).integers(0, 256, (9, 48, 80, 3), dtype=np.uint8)
LENGTH, HEADS, WIDTH = 9, 2, 32  # 3 x 3 patches


def load(folder, **changes):
    weights = random_weights.make(dataclasses.replace(SPEC, **changes), "outputs")
    checkpoints.write(weights, folder, "huggingface")
    return siglip.load(folder, batch_size=8)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(tmp_path_factory.mktemp("outputs") / "hf")


@pytest.fixture(scope="module")
def naflex(tmp_path_factory):
    return load(tmp_path_factory.mktemp("naflex") / "hf", **NAFLEX)


def by_hand(model, images, *capture):
    """The Flax module's outputs for the images, at the precision of siglip.load."""
    x = np.stack([model.preprocess.image(image) for image in images])
    with jax.default_matmul_precision("highest"):
        return model.module.apply(
            {"params": model.params}, x, capture=capture, method="encode_image"
        )


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("output", ["tokens", "block:-2", "attention", "pooled", "unnormalized"])
def test_an_output_is_what_the_tower_gives_in_batches_and_alone(model, output):
    captured = output in ("block:-2", "attention")
    _, out = by_hand(model, NOISE[:3], *([output] if captured else []))
    many, one = model.encode_image(NOISE, output), model.encode_image(NOISE[1], output)
    if output in ("pooled", "unnormalized"):
        assert many.shape == (9, WIDTH) and many.dtype == one.dtype == np.float32
        close(many[:3], out[output])
        close(one, many[1])
        return
    shape = (HEADS, LENGTH) if output == "attention" else (LENGTH, WIDTH)
    assert many.values.shape == (9, *shape) and many.values.dtype == np.float32
    close(many.values[:3], out[output])
    close(one.values, many.values[1])
    assert one.values.shape == shape
    np.testing.assert_array_equal(many.mask, np.ones((9, LENGTH), bool))
    np.testing.assert_array_equal(many.grid, np.full((9, 2), 3))
    assert one.mask.shape == (LENGTH,) and one.grid.tolist() == [3, 3]


def test_vectors_follow_from_each_other(model):
    embedding, z = model.encode_image(NOISE[:2]), model.encode_image(NOISE[:2], "unnormalized")
    assert np.abs(np.linalg.norm(z, axis=1) - 1).min() > 1e-2
    close(embedding, z / np.linalg.norm(z, axis=1, keepdims=True))
    np.testing.assert_array_equal(z, model.encode_image(NOISE[:2], "pooled"))  # there is no head
    head = jax.tree.map(np.asarray, model.params["txt"]["head"])
    pooled = model.encode_text("a cat", "pooled")
    close(model.encode_text("a cat", "unnormalized"), pooled @ head["kernel"] + head["bias"])
    close(model.encode_text(["a", "a cat"], "tokens").values[1, -1], pooled)  # pool 'last'


def test_attention_of_the_pooling_is_a_map_over_the_image(model):
    weights = model.encode_image(NOISE[0], "attention")
    close(weights.values.sum(axis=1), np.ones(HEADS))
    on_grid = weights.values[:, weights.mask].reshape(HEADS, *weights.grid)
    assert on_grid.shape == (2, 3, 3)
    # It stands where the patches are: tokens turned by half a turn turn the map with them.
    params = {**model.params["img"]}
    params["pos_embedding"] = params["pos_embedding"] * 0
    x = model.preprocess.image(NOISE[0])
    patches = x.reshape(3, 16, 3, 16, 3).swapaxes(1, 2)
    turned = patches[::-1, ::-1].swapaxes(1, 2).reshape(48, 48, 3)

    def attention(image):
        _, out = model.module.apply(
            {"params": {"img": params}}, image[None], capture=("attention",), method="encode_image"
        )
        return np.asarray(out["attention"])[0].reshape(HEADS, 3, 3)

    np.testing.assert_allclose(attention(turned), attention(x)[:, ::-1, ::-1], atol=1e-4)
    assert np.abs(attention(turned) - attention(x)).max() > 1e-3


@pytest.mark.parametrize("output", ["tokens", "attention"])
def test_naflex_says_which_tokens_are_patches_and_on_which_grid(naflex, output):
    images = [NOISE[0][:16], NOISE[1][:, :32], NOISE[2]]  # wide, high, between
    rows = naflex.encode_image(images, output)
    grids = [naflex.preprocess.pixels({"image": image})["image_shape"] for image in images]
    np.testing.assert_array_equal(rows.grid, grids)
    np.testing.assert_array_equal(rows.mask, np.arange(16) < rows.grid.prod(axis=1)[:, None])
    assert len({tuple(grid) for grid in rows.grid.tolist()}) == 3
    for i, image in enumerate(images):
        one = naflex.encode_image(image, output)
        np.testing.assert_array_equal(one.grid, rows.grid[i])
        if output == "attention":
            close(one.values, rows.values[i])
            assert not rows.values[i][:, ~rows.mask[i]].any()
            assert rows.values[i][:, rows.mask[i]].reshape(HEADS, *rows.grid[i]).ndim == 3
        else:
            assert rows.values[i][rows.mask[i]].reshape(*rows.grid[i], WIDTH).ndim == 3
            fields = naflex.preprocess.pixels({"image": image})
            names = ("image", "image_mask", "image_shape")
            patches = Patches(*(np.asarray(fields[name])[None] for name in names))
            _, out = naflex.module.apply({"params": naflex.params}, patches, method="encode_image")
            close(rows.values[i][rows.mask[i]], np.asarray(out["tokens"])[0][rows.mask[i]])


def test_equal_texts_share_their_tokens(model):
    rows = model.encode_text(["a cat", "dog", "a cat"], "block:0")
    assert rows.values.shape == (3, 8, 32) and rows.grid is None and rows.mask.all()
    np.testing.assert_array_equal(rows.values[0], rows.values[2])
    assert np.abs(rows.values[0] - rows.values[1]).max() > 1e-3
    assert model.encode_text([], "tokens").values.shape == (0, 8, 32)


def test_no_images_give_no_rows_of_the_same_shape(model, naflex):
    for given in (model, naflex):
        rows = given.encode_image([], "tokens")
        assert len(rows.values) == len(rows.mask) == len(rows.grid) == 0
        assert rows.values.shape[2] == WIDTH
        assert given.encode_image([], "pooled").shape == (0, WIDTH)


@pytest.mark.parametrize(
    "tower, output, message",
    [
        ("image", "tokns", r"the image tower of .* has no output 'tokns'; the nearest: tokens"),
        ("image", "blok:-2", r"has no output 'blok:-2'; the nearest: .*block:-2"),
        ("image", "pool", r"has no output 'pool'; the nearest: pooled"),
        ("image", "block:2", r"'block:2' is not in a tower of 2 blocks: 0 to 1, or -2 to -1"),
        ("image", "block:x", r"'block:x' is neither 'attention' nor a block such as 'block:-2'"),
        ("text", "attention", r"needs a tower with attention pooling \(pool 'map'\), not 'last'"),
        ("text", "logits", r"the text tower of .* has no output 'logits'; there are: "),
    ],
)
def test_an_output_that_is_none_is_refused_in_one_line(model, tower, output, message):
    encode, given = {
        "image": (model.encode_image, NOISE[0]), "text": (model.encode_text, "a cat"),
    }[tower]  # fmt: skip
    with pytest.raises(ValueError, match=rf"^[^\n]*{message}[^\n]*$"):
        encode(given, output)
