"""Resizes are the libraries' own to the bit, crops are the rectangles they say."""

import hashlib

import cv2
import numpy as np
import pytest
from PIL import Image

from input_pipeline.errors import BadExample
from input_pipeline.transforms import resize

# Each pixel says where it is.
H, W = 120, 150
PLACE = np.zeros((H, W, 3), np.uint8)
PLACE[..., 0], PLACE[..., 1] = np.arange(H)[:, None], np.arange(W)


def noise(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def rng(seed=0):
    return np.random.default_rng(seed)


def corner(crop):
    """(top, left) of a piece of PLACE, which it must be."""
    top, left = int(crop[0, 0, 0]), int(crop[0, 0, 1])
    h, w = crop.shape[:2]
    np.testing.assert_array_equal(crop, PLACE[top : top + h, left : left + w])
    return top, left


@pytest.mark.parametrize("size", [(16, 30), (100, 64)])
def test_methods_are_what_they_are_named_after(size):
    image, across = noise(40, 60), size[::-1]
    pil = Image.fromarray(image)
    expected = {
        "bilinear": cv2.resize(image, across, interpolation=cv2.INTER_LINEAR),
        "area": cv2.resize(image, across, interpolation=cv2.INTER_AREA),
        "bilinear-pil": pil.resize(across, Image.Resampling.BILINEAR),
        "bicubic-pil": pil.resize(across, Image.Resampling.BICUBIC),
    }
    assert set(resize.METHODS) == {*expected, "bilinear-exact"}
    for name, there in expected.items():
        np.testing.assert_array_equal(resize.METHODS[name](image, *size), np.asarray(there))


@pytest.mark.parametrize(
    ("before", "after", "digest"),
    [
        ((48, 64), (16, 16), "8da4a5cb3d9f0877"),
        ((37, 53), (64, 64), "043758d92c99cc79"),
        ((480, 640), (224, 224), "b7d9775d64adb8a5"),
        ((224, 224), (384, 384), "915e3d0e133e8f2b"),
        ((500, 333), (256, 256), "c6dc2f6ebbb79890"),
        ((1, 7), (5, 3), "081698dc3ac75173"),
        ((7, 1), (1, 16), "6b62e5a375019c6a"),
        ((600, 801), (196, 260), "65074faff7fce4c3"),
        ((64, 64), (64, 64), "0955cf3a09234a62"),
    ],
)
def test_bilinear_exact_is_what_tensorflow_made(before, after, digest):
    """SHA-256 of tf.image.resize(antialias=False), clipped and cast, of TensorFlow 2.21.0."""
    made = resize.METHODS["bilinear-exact"](noise(*before), *after)
    assert made.dtype == np.uint8 and made.shape == (*after, 3)
    assert hashlib.sha256(made.tobytes()).hexdigest().startswith(digest)


@pytest.mark.parametrize("size", [(224, 224), (31, 700), (1, 1)])
def test_the_fast_bilinear_is_within_a_level_of_the_exact_one(size):
    fast, exact = (
        resize.METHODS[m](noise(333, 500), *size) for m in ("bilinear", "bilinear-exact")
    )
    assert np.abs(fast.astype(int) - exact).max() <= 1


def test_resizes_take_very_long_images_and_views():
    line = noise(1, 40_000)
    for name, method in resize.METHODS.items():
        assert method(line, 8, 8).shape == (8, 8, 3), name
        view = noise(30, 40)[3:20:2, 5:33]
        np.testing.assert_array_equal(method(view, 8, 9), method(view.copy(), 8, 9))


def test_squash_is_a_square_of_all_of_the_image():
    image = noise(30, 50)
    np.testing.assert_array_equal(
        resize.squash(image, 16, "area"), resize.METHODS["area"](image, 16, 16)
    )


@pytest.mark.parametrize(
    ("before", "res", "after"),
    [
        ((480, 640), 224, (224, 298)),  # 298.67: torchvision cuts off
        ((640, 480), 224, (298, 224)),
        ((333, 500), 256, (256, 384)),
        ((50, 50), 64, (64, 64)),
        ((3, 100), 16, (16, 533)),
    ],
)
def test_shorter_side_keeps_the_aspect_ratio_as_torchvision_rounds_it(before, res, after):
    image = noise(*before)
    made = resize.shorter_side(image, res, "bilinear-pil")
    np.testing.assert_array_equal(made, resize.METHODS["bilinear-pil"](image, *after))


def test_shorter_side_of_a_line_does_not_take_all_memory():
    with pytest.raises(BadExample, match="image too large: 500000 x 1 is 224 x 112000000 with"):
        resize.shorter_side(np.zeros((1, 500_000, 3), np.uint8), 224, "bilinear")


def test_center_crop_is_the_middle():
    assert corner(resize.center_crop(PLACE, 100)) == (10, 25)
    assert corner(resize.center_crop(PLACE, 97)) == (11, 26)  # of 23 and 53
    assert corner(resize.center_crop(PLACE, H)) == (0, 15)


def test_random_crop_is_anywhere_evenly():
    crops = [resize.random_crop(PLACE, rng(seed), 100) for seed in range(1000)]
    assert {crop.shape for crop in crops} == {(100, 100, 3)}
    tops, lefts = (np.bincount(at) for at in zip(*map(corner, crops)))
    assert len(tops) == 21 and tops.min() > 15 and tops.max() < 90
    assert len(lefts) == 51 and lefts.min() > 3 and lefts.max() < 50


def test_crops_do_not_keep_the_image_in_memory():
    assert not np.shares_memory(resize.center_crop(PLACE, 100), PLACE)
    assert not np.shares_memory(resize.random_crop(PLACE, rng(), 100), PLACE)


def test_crops_refuse_a_smaller_image():
    for crop in (
        lambda: resize.center_crop(PLACE, H + 1),
        lambda: resize.random_crop(PLACE, rng(), H + 1),
    ):
        with pytest.raises(BadExample, match="150 x 120 is smaller than the crop of 121 x 121"):
            crop()


@pytest.fixture
def cut(monkeypatch):
    """cut(image, rng, res, ...) is what random_resized_crop cuts out before it resizes."""
    cuts, bilinear = [], resize.METHODS["bilinear"]

    def remember(image, height, width):
        cuts.append(image)
        return bilinear(image, height, width)

    def cut(*args):
        resize.random_resized_crop(*args)
        return cuts[-1]

    monkeypatch.setitem(resize.METHODS, "bilinear", remember)
    return cut


def test_random_resized_crop_is_of_the_shares_and_ratios_asked_for(cut):
    shares, ratios, tops, lefts = [], [], set(), set()
    for seed in range(400):
        crop = cut(PLACE, rng(seed), 16, (0.2, 0.4), (0.5, 1.0))
        top, left = corner(crop)
        shares.append(crop.shape[0] * crop.shape[1] / (H * W))
        ratios.append(crop.shape[1] / crop.shape[0])
        tops.add(top)
        lefts.add(left)
    assert 0.19 < min(shares) < 0.21 and 0.39 < max(shares) < 0.41
    assert 0.29 < np.mean(shares) < 0.31
    assert 0.48 < min(ratios) < 0.52 and 0.98 < max(ratios) < 1.02
    assert abs(np.mean(np.log2(ratios)) + 0.5) < 0.04
    assert min(tops) == min(lefts) == 0 and len(tops) > 40 and len(lefts) > 70
    assert max(tops) > 50 and max(lefts) > 95  # of H - 60 and W - 42


def test_random_resized_crop_has_the_usual_ranges_and_the_size_asked_for(cut):
    crops = [cut(PLACE, rng(seed), 16) for seed in range(400)]
    shares = [crop.shape[0] * crop.shape[1] / (H * W) for crop in crops]
    ratios = [c.shape[1] / c.shape[0] for c, share in zip(crops, shares) if share < 1]
    assert 0.07 < min(shares) < 0.1 and max(shares) > 0.9
    assert 0.73 < min(ratios) < 0.77 and 1.3 < max(ratios) < 1.36
    for method in resize.METHODS:
        resized = resize.random_resized_crop(PLACE, rng(), 16, method=method)
        assert resized.shape == (16, 16, 3)


def test_random_resized_crop_of_a_line_is_the_line(cut):
    line = noise(1, 100)
    np.testing.assert_array_equal(cut(line, rng(), 16, (0.9, 1.0)), line)
    assert all(cut(noise(2, 1), rng(seed), 16).size for seed in range(50))  # never nothing


def test_random_numbers_decide_all_crops():
    for crop in (resize.random_crop, resize.random_resized_crop):
        first, again, other = (crop(noise(40, 60), rng(seed), 16) for seed in (1, 1, 2))
        np.testing.assert_array_equal(first, again)
        assert not np.array_equal(first, other)
