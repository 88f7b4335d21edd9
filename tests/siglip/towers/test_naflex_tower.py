"""The tower of NaFlex: patches in, and nothing that fills up ever matters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from siglip.towers.two_towers import make_model
from siglip.towers.vit import Patches, images_of

TINY = dict(width=32, depth=2, mlp_dim=64, num_heads=4)
P, GRID = 4, 5
VALUES = P * P * 3
GRIDS = ((5, 5), (2, 9), (1, 1))  # rows and columns of patches


def tower(**img):
    img = dict(variant=f"mu/{P}", naflex_grid=GRID, **TINY) | img
    return make_model(img=img, txt=dict(variant="mu", vocab_size=9, **TINY))


def patches(grids=GRIDS, length=64, dtype=np.uint8) -> Patches:
    """The same images whatever the length and the other images; garbage nowhere."""
    values = np.zeros((len(grids), length, VALUES), np.uint8)
    for image, (rows, columns) in zip(values, grids):
        draw = np.random.default_rng((rows, columns))
        image[: rows * columns] = draw.integers(0, 256, (rows * columns, VALUES), np.uint8)
    count = np.prod(np.array(grids, int), axis=1)
    mask = np.arange(length) < count[:, None]
    if dtype != np.uint8:
        values = (values / 127.5 - 1).astype(dtype)
    return Patches(*map(jnp.asarray, (values, mask, np.array(grids, np.int32))))


@functools.cache
def init(model):
    params = jax.jit(model.init)(jax.random.key(0), patches())["params"]
    keys = iter(jax.random.split(jax.random.key(1), 99))
    # Biases of zero would hide that padding is summed up.
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), params)


def embed(model, image: Patches):
    return jax.jit(lambda params, image: model.apply({"params": params}, image)[0])(
        init(model), image
    )


@pytest.mark.parametrize("pool, scan", [("map", False), ("gap", False), ("map", True)])
def test_an_image_is_embedded_as_if_it_were_alone_without_padding(pool, scan):
    model = make_model(
        img=dict(variant=f"mu/{P}", naflex_grid=GRID, pool=pool, **TINY),
        txt=dict(variant="mu", vocab_size=9, **TINY),
        scan=scan,
    )
    alone = [embed(model, patches((grid,), length=grid[0] * grid[1]))[0] for grid in GRIDS]
    for length in (64, 256):
        together = embed(model, patches(length=length))
        np.testing.assert_allclose(together, np.stack(alone), atol=1e-6)
    cosines = np.stack(alone) @ np.stack(alone).T
    assert np.max(cosines - np.eye(len(GRIDS))) < 0.999  # four different images


@pytest.mark.parametrize("pool", ["map", "gap"])
@pytest.mark.parametrize("garbage", [7.0, 1e30, float("nan")])
def test_what_fills_up_does_not_matter_nor_has_it_a_gradient(pool, garbage):
    model, image = tower(pool=pool), patches(dtype=np.float32)
    other = image._replace(values=jnp.where(image.mask[..., None], image.values, garbage))

    def loss(params, values, image):
        zimg, _, _ = model.apply({"params": params}, image._replace(values=values))
        return jnp.sum(zimg @ jnp.arange(32.0)), zimg

    grads = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
    (want, _), zimg = grads(init(model), image.values, image)
    (got, of_values), same = grads(init(model), other.values, other)
    np.testing.assert_array_equal(same, zimg)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert not np.any(np.asarray(of_values)[~np.asarray(image.mask)])
    assert np.all(np.any(np.asarray(of_values)[np.asarray(image.mask)], axis=-1))


@pytest.mark.parametrize("pool", ["map", "gap"])
def test_a_bad_example_is_finite_and_so_are_its_gradients(pool):
    # What the loader puts in its place: zeros, no patch, no shape.
    model, image = tower(pool=pool), patches()
    bad = jax.tree.map(lambda x: x.at[1].set(jnp.zeros_like(x[1])), image)

    def loss(params, weight):
        zimg, _, _ = model.apply({"params": params}, bad)
        return jnp.sum(zimg * weight[:, None]), zimg

    grad = jax.jit(jax.grad(loss, has_aux=True))
    everything, zimg = grad(init(model), jnp.ones(3))
    assert np.isfinite(zimg).all()
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(everything))
    without, _ = grad(init(model), jnp.ones(3).at[1].set(0))
    rest = jax.tree.map(lambda x: x[jnp.array([0, 2])], image)
    good, _ = jax.grad(
        lambda params: (z := model.apply({"params": params}, rest)[0], (jnp.sum(z), z))[1],
        has_aux=True,
    )(init(model))
    assert any(np.any(g) for g in jax.tree.leaves(good))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), without, good)


@pytest.mark.parametrize("pool, grid", [("map", (GRID, GRID)), ("gap", (2, 9))])
def test_an_image_is_embedded_as_by_a_tower_of_fixed_size_with_resized_positions(pool, grid):
    fixed = make_model(
        img=dict(variant=f"mu/{P}", pool=pool, **TINY),
        txt=dict(variant="mu", vocab_size=9, **TINY),
    )
    (rows, columns), params = grid, init(tower(pool=pool))
    image = np.random.default_rng(0).integers(0, 256, (3, rows * P, columns * P, 3), np.uint8)
    cut = image.reshape(3, rows, P, columns, P, 3).swapaxes(2, 3).reshape(3, -1, VALUES)
    made = Patches(cut, np.ones(cut.shape[:2], bool), np.array([grid] * 3, np.int32))
    img = params["img"]
    table = jax.image.resize(img["pos_embedding"], (*grid, 32), "linear", antialias=True)
    if grid == (GRID, GRID):
        np.testing.assert_allclose(table, img["pos_embedding"], atol=1e-6)
    kernel = img["embedding"]["kernel"].reshape(P, P, 3, 32)
    of_pixels = {
        **img,
        "embedding": {**img["embedding"], "kernel": kernel},
        "pos_embedding": table.reshape(1, -1, 32),
    }
    want, _, _ = fixed.apply({"params": {**params, "img": of_pixels}}, image)
    got, _, _ = tower(pool=pool).apply({"params": params}, made)
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_parameters_have_the_names_and_shapes_of_the_released_naflex_models():
    model = make_model(
        img={"variant": "B/16", "naflex_grid": 16},
        txt={"variant": "B", "vocab_size": 256_000},
        scan=True,
    )
    zeros = np.zeros
    image = Patches(zeros((1, 9, 768), np.uint8), zeros((1, 9), bool), zeros((1, 2), np.int32))
    params = jax.eval_shape(model.init, jax.random.key(0), image, zeros((1, 64), np.int32))
    params = params["params"]
    assert params["img"]["embedding"]["kernel"].shape == (768, 768)
    assert params["img"]["pos_embedding"].shape == (16, 16, 768)
    assert sum(p.size for p in jax.tree.leaves(params)) == 375_234_050


def test_bytes_are_normalised_to_minus_one_to_one():
    model = tower()
    exact, short = (embed(model, patches(dtype=dtype)) for dtype in (np.float32, np.uint8))
    np.testing.assert_allclose(exact, short, atol=1e-6)


def test_remat_and_bfloat16_take_masks():
    image = patches()
    want = embed(tower(), image)
    sizes = dict(
        img=dict(variant=f"mu/{P}", naflex_grid=GRID, **TINY),
        txt=dict(variant="mu", vocab_size=9, **TINY),
    )
    params = init(tower())
    for options, cosine in (({"remat": "full"}, 1 - 1e-6), ({"dtype": "bfloat16"}, 0.999)):
        model = make_model(**sizes, **options)

        def loss(params, model=model):
            zimg, _, _ = model.apply({"params": params}, image)
            return zimg.sum(), zimg

        grads, got = jax.jit(jax.grad(loss, has_aux=True))(params)
        assert np.all(np.sum(np.asarray(got * want), axis=1) > cosine)
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_a_batch_becomes_what_its_tower_takes():
    image, mask, shape = patches()
    assert images_of({"text": shape}) is None
    assert images_of({"image": image, "text": shape}) is image
    made = images_of({"image": image, "image_mask": mask, "image_shape": shape, "mask": None})
    assert isinstance(made, Patches)
    assert made.values is image and made.mask is mask and made.shape is shape


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(pool="tok"), "pool 'tok' goes with square images"),
        (dict(drop_patches=0.5), "drop_patches goes with square images"),
        (dict(naflex_grid=0), "naflex_grid must be at least 1, not 0"),
        (dict(variant="precomputed", width=None), "needs width"),
        (dict(variant="precomputed"), "a width and no other setting"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(ValueError, match=message) as error:
        tower(**options)
    assert "\n" not in str(error.value)


def test_a_tower_refuses_what_it_does_not_take(unchecked_shapes):
    text = dict(variant="mu", vocab_size=9, **TINY)
    squares = make_model(img=dict(variant=f"mu/{P}", **TINY), txt=text)
    coarse = make_model(img=dict(variant="mu/8", naflex_grid=GRID, **TINY), txt=text)
    ready = make_model(img=dict(variant="precomputed", width=32), txt=text)
    image = np.zeros((1, 8, 8, 3), np.uint8)
    for model, given, message in (
        (squares, patches(), "takes squares, not Patches"),
        (squares, np.zeros((1, 48), np.float32), r"images of \(48,\) hold no patch"),
        (tower(), image, r"takes Patches, not an array \[1, 8, 8, 3\]"),
        (coarse, patches(), "patches of 48 values are not 8 x 8 x 3"),
        (ready, image, r"takes embeddings \[n, 32\], not \(1, 8, 8, 3\)"),
        (ready, np.zeros((1, 31), np.float32), r"takes embeddings \[n, 32\], not \(1, 31\)"),
        (ready, patches(), r"takes embeddings \[n, 32\], not Patches"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            jax.eval_shape(model.init, jax.random.key(0), given)
        assert "\n" not in str(error.value)


def test_a_precomputed_tower_has_no_parameters_and_passes_directions_on():
    model = make_model(
        img=dict(variant="precomputed", width=24), txt=dict(variant="mu", vocab_size=9, **TINY)
    )
    image = np.random.default_rng(0).normal(size=(3, 24)).astype(np.float32) * 9
    text = np.zeros((3, 4), np.int32)
    params = model.init(jax.random.key(0), image, text)["params"]
    assert set(params) == {"txt", "t", "b"}
    assert params["txt"]["head"]["kernel"].shape == (32, 24)
    zimg, ztxt, _ = model.apply({"params": params}, image, text)
    np.testing.assert_allclose(
        zimg, image / np.linalg.norm(image, axis=1, keepdims=True), rtol=1e-5, atol=1e-6
    )
    assert ztxt.shape == (3, 24)
