"""Resizing of position embeddings: equal to the code whose name a method carries."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from siglip.towers import positions

SIZES = [((3, 4), (5, 2)), ((5, 4), (3, 6)), ((16, 16), (24, 24)), ((24, 24), (14, 9))]


def table(*shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def digits(*shape) -> np.ndarray:
    i = np.arange(np.prod(shape))
    return ((i * i * 7 + i * 3) % 11).astype(np.float32).reshape(shape)


# torch.nn.functional.interpolate(digits(h, w)[None, None], size, mode=..., antialias=...,
# align_corners=False), torch 2.13 on a CPU: what Hugging Face (bicubic) and open_clip (the others)
# call. Reproduced by pasting `digits`.
TORCH = {
    ("bilinear", (3, 4), (5, 2)): [
        [5, 3.5], [4.2, 3.5], [3, 3.5], [4.2, 2.6], [5, 2],
    ],
    ("bilinear", (5, 4), (3, 6)): [
        [1, 4.3333335, 6.833333, 3.5, 3.5, 4.333333],
        [10, 5, 0.666667, 3.3333335, 2, 0],
        [5.3333344, 4.8333335, 4.055555, 2.9444447, 5.1666665, 7.666665],
    ],
    ("bicubic", (3, 4), (5, 2)): [
        [6.1437507, 2.5482502], [4.493999, 3.1939998], [2.71875, 3.78125],
        [3.660376, 3.001625], [4.8080006, 2.2400005],
    ],
    ("bicubic", (5, 4), (3, 6)): [
        [-0.087446265, 4.754052, 7.8173223, 3.4153173, 3.0885422, 4.63741],
        [10.868057, 4.625, -0.22453499, 3.599539, 2.375, -0.34722137],
        [5.266396, 5.010994, 4.069359, 2.4723086, 5.1556706, 8.421102],
    ],
    ("bilinear-antialias", (3, 4), (5, 2)): [
        [4.428571, 4.4285717], [4.028571, 4.0285716], [3.4285715, 3.4285715],
        [4.2857146, 2.4], [4.857143, 1.7142857],
    ],
    ("bilinear-antialias", (5, 4), (3, 6)): [
        [1.2857141, 4.142857, 6.3571424, 3.7857134, 3.5, 3.8571432],
        [8.444445, 4.666667, 1.5555558, 4.222223, 2.8888888, 0.88888884],
        [6, 4.928571, 3.7380946, 3.2619047, 5.0714283, 7],
    ],
    ("bicubic-antialias", (3, 4), (5, 2)): [
        [4.562685, 4.48082], [4.0422473, 4.1651044], [3.4338841, 3.4586778],
        [4.44662, 2.1202972], [5.1893024, 1.3121784],
    ],
    ("bicubic-antialias", (5, 4), (3, 6)): [
        [0.6279366, 4.1520367, 7.0083694, 3.593126, 3.2524889, 3.9131577],
        [9.467257, 4.6158686, 0.5336458, 4.809572, 2.941724, 0.07368401],
        [6.2718625, 5.1049776, 3.5890305, 2.9092605, 5.1891403, 7.4220634],
    ],
}  # fmt: skip


@pytest.mark.parametrize("method, before, after", sorted(TORCH))
def test_a_method_equals_torch(method, before, after):
    out = positions.resize_images(digits(*before, 1), after, method)
    assert out.dtype == np.float32
    np.testing.assert_allclose(out[..., 0], TORCH[method, before, after], atol=4e-6)


@pytest.mark.parametrize("before, after", SIZES)
def test_corners_equal_what_big_vision_calls(before, after):
    old = table(*before, 5)
    zoom = (after[0] / before[0], after[1] / before[1], 1)
    expected = scipy.ndimage.zoom(old, zoom, order=1)
    out = positions.resize_images(old, after, "bilinear-corners")
    np.testing.assert_allclose(out, expected, atol=3e-6)
    for place in (0, -1):
        np.testing.assert_array_equal(out[place, place], old[place, place])


def test_corners_have_no_zeros_where_scipys_rounding_leaves_the_table():
    old = table(32, 32, 3)
    assert not scipy.ndimage.zoom(old, (0.5, 0.5, 1), order=1)[-1].any()
    out = positions.resize_images(old, (16, 16), "bilinear-corners")
    nearest = scipy.ndimage.zoom(old, (0.5, 0.5, 1), order=1, mode="nearest")
    np.testing.assert_allclose(out, nearest, atol=3e-6)


@pytest.mark.parametrize("before, after", SIZES)
@pytest.mark.parametrize("method, name", [("bilinear", "linear"), ("bicubic", "cubic")])
def test_antialiased_methods_equal_jax_image_resize(method, name, before, after):
    old = table(*before, 5)
    out = positions.resize_images(old, after, f"{method}-antialias")
    np.testing.assert_allclose(out, jax.image.resize(old, (*after, 5), name), atol=5e-6)


@pytest.mark.parametrize("method", positions.METHODS)
def test_channels_do_not_mix_and_a_constant_stays_constant(method):
    old = table(6, 7, 3)
    out = positions.resize_images(old, (9, 4), method)
    alone = [positions.resize_images(old[..., c : c + 1], (9, 4), method) for c in range(3)]
    np.testing.assert_allclose(out, np.concatenate(alone, axis=-1), atol=1e-6)
    ones = positions.resize_images(np.ones((6, 7, 1), np.float32), (9, 4), method)
    np.testing.assert_allclose(ones, np.ones((9, 4, 1)), atol=1e-6)


@pytest.mark.parametrize("method", positions.METHODS)
def test_one_patch_per_side_is_finite(method):
    old = table(4, 4, 2)
    assert np.isfinite(positions.resize_images(old, (1, 1), method)).all()
    grown = positions.resize_images(old[:1, :1], (3, 3), method)
    np.testing.assert_allclose(grown, np.tile(old[:1, :1], (3, 3, 1)), rtol=1e-6)


@pytest.mark.parametrize("method", [*positions.METHODS, *positions.TEXT_METHODS])
def test_the_same_size_changes_no_bit(method):
    if method in positions.METHODS:
        old = table(7, 5, 3)
        assert positions.resize_images(old, (7, 5), method) is old
    else:
        old = table(7, 3)
        assert positions.resize_text(old, 7, method) is old


# open_clip 3.3: open_clip.model.resize_text_pos_embed on digits(5, 2).
OPEN_CLIP_TEXT = {
    3: [[1 / 3, 26 / 3], [3, 3], [26 / 3, 1 / 3]],
    8: [
        [0, 10], [0.4375, 8.25], [1.125, 5.8125], [2.375, 3.9375],
        [3.9375, 2.375], [5.8125, 1.125], [8.25, 0.4375], [10, 0],
    ],
}  # fmt: skip


@pytest.mark.parametrize("length", OPEN_CLIP_TEXT)
def test_linear_text_positions_equal_open_clip(length):
    out = positions.resize_text(digits(5, 2), length, "linear")
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, OPEN_CLIP_TEXT[length], atol=2e-6)


@pytest.mark.parametrize(
    "length, old",
    [(8, [0, 1, 2, 3, 3, 3, 3, 4]), (6, [0, 1, 2, 3, 3, 4]), (3, [0, 1, 4]), (1, [4])],
)
def test_kept_text_positions_move_only_the_last(length, old):
    five = table(5, 3)
    np.testing.assert_array_equal(positions.resize_text(five, length, "keep"), five[old])


def test_a_single_text_position_is_repeated():
    one = table(1, 3)
    for method in positions.TEXT_METHODS:
        np.testing.assert_array_equal(positions.resize_text(one, 3, method), one[[0, 0, 0]])


SHAPES = [(16, 16), (9, 28), (22, 11), (5, 7), (1, 256), (256, 1), (100, 2), (3, 85), (1, 1)]


@functools.cache
def _at_patches():
    return jax.jit(positions.at_patches, static_argnames="length")


def test_at_patches_equals_a_resize_of_each_image_at_any_number_of_patches_per_side():
    old = table(16, 16, 8)
    out = _at_patches()(old, jnp.asarray(SHAPES), length=256)
    assert out.shape == (len(SHAPES), 256, 8) and out.dtype == jnp.float32
    for (rows, columns), image in zip(SHAPES, out):
        expected = jax.image.resize(old, (rows, columns, 8), "linear").reshape(-1, 8)
        np.testing.assert_allclose(image[: rows * columns], expected, atol=3e-6)
        assert not image[rows * columns :].any()
        host = positions.resize_images(old, (rows, columns), "bilinear-antialias")
        np.testing.assert_allclose(image[: rows * columns], host.reshape(-1, 8), atol=5e-6)
    np.testing.assert_array_equal(out[0], old.reshape(-1, 8))  # 16 x 16: nothing to resize


def test_rows_that_only_fill_up_give_zeros_and_gradients_stay_finite():
    old = table(16, 16, 8)
    shapes = jnp.asarray([(0, 0), (5, 7), (0, 3), (100, 2)])
    cotangent = table(4, 256, 8, seed=1)

    def objective(old):
        return jnp.sum(positions.at_patches(old, shapes, 256) * cotangent)

    assert not _at_patches()(old, shapes, length=256)[jnp.asarray([0, 2])].any()

    def definition(old):
        total = jnp.zeros(())
        for i, (rows, columns) in ((1, (5, 7)), (3, (100, 2))):
            out = jax.image.resize(old, (rows, columns, 8), "linear").reshape(-1, 8)
            total += jnp.sum(out * cotangent[i, : rows * columns])
        return total

    grads, expected = jax.jit(jax.grad(objective))(old), jax.grad(definition)(old)
    assert jnp.abs(expected).min() > 1e-4  # every place of the table is read
    np.testing.assert_allclose(grads, expected, atol=2e-5)


def test_no_intermediate_value_is_nan():
    # jax_debug_nans would stop there, although what fills up is masked in the end.
    with jax.debug_nans(True):
        out = positions.at_patches(table(4, 4, 2), jnp.asarray([(0, 0), (2, 3), (0, 3)]), 16)
    assert out.any(axis=(1, 2)).tolist() == [False, True, False]


def test_more_patches_than_tokens_are_cut_off():
    old = table(4, 4, 2)
    shape = jnp.asarray([(3, 5)])
    whole = _at_patches()(old, shape, length=15)
    np.testing.assert_array_equal(_at_patches()(old, shape, length=7), whole[:, :7])


def test_mistakes_are_one_line():
    images, text = table(2, 2, 1), table(2, 1)
    with pytest.raises(ValueError, match="'bicubik' is unknown; the nearest: bicubic"):
        positions.resize_images(images, (3, 3), "bicubik")
    with pytest.raises(ValueError, match="'liner' is unknown; the nearest: linear"):
        positions.resize_text(text, 3, "liner")
    with pytest.raises(ValueError, match=r"cannot be resized to \(0, 3\)"):
        positions.resize_images(images, (0, 3), "bilinear")
    with pytest.raises(ValueError, match=r"cannot be resized to \(0,\)"):
        positions.resize_text(text, 0, "keep")
    unchecked = inspect.unwrap  # users have no beartype, which refuses these shapes first
    with pytest.raises(ValueError, match=r"\[rows, columns, width\], not of shape \(1, 2, 2, 1\)"):
        unchecked(positions.resize_images)(images[None], (3, 3), "bilinear")
    with pytest.raises(ValueError, match=r"not of shape \(0, 2, 1\)"):
        unchecked(positions.resize_images)(images[:0], (3, 3), "bilinear")
    with pytest.raises(ValueError, match=r"\[length, width\], not of shape \(2, 2, 1\)"):
        unchecked(positions.resize_text)(images, 3, "linear")
    with pytest.raises(ValueError, match=r"\[g, g, width\], not \(2, 3, 1\)"):
        unchecked(positions.at_patches)(jnp.zeros((2, 3, 1)), jnp.ones((1, 2), jnp.int32), 4)
