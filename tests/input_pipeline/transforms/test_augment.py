"""Every change is the one it is named after, of the strength asked for, decided by the rng."""

import colorsys

import numpy as np
import pytest
from PIL import Image

from input_pipeline.transforms import augment

NOISE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
NOISE.flags.writeable = False  # nothing may change its input

NAMES = [
    "identity",
    "auto_contrast",
    "equalize",
    "rotate",
    "solarize",
    "color",
    "posterize",
    "contrast",
    "brightness",
    "sharpness",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
]


def rng(seed=0):
    return np.random.default_rng(seed)


def plain(*color):
    return np.broadcast_to(np.array(color, np.uint8), (6, 7, 3))


def op(name, image, strength):
    made = augment.OPS[NAMES.index(name)](Image.fromarray(image), strength)
    assert made.mode == "RGB" and made.size == image.shape[1::-1]
    return np.asarray(made).astype(int)


def test_flip_mirrors_half_of_the_images():
    mirrored = 0
    for seed in range(200):
        image = augment.flip(NOISE, rng(seed))
        same = np.array_equal(image, NOISE)
        assert same or np.array_equal(image, NOISE[:, ::-1])
        mirrored += not same
    assert 70 < mirrored < 130


@pytest.mark.parametrize("change", [augment.flip, augment.color_jitter, augment.rand_augment])
def test_random_numbers_decide_all(change):
    made = []
    for seed in range(30):
        image, again = (change(NOISE, rng(seed)) for _ in range(2))
        np.testing.assert_array_equal(image, again)
        assert image.shape == NOISE.shape and image.dtype == np.uint8
        made.append(image.tobytes())
    assert len(set(made)) >= (2 if change is augment.flip else 25)


def test_no_jitter_is_no_change():
    np.testing.assert_array_equal(augment.color_jitter(NOISE, rng(), 0, 0, 0, 0), NOISE)


def test_jitter_of_brightness_is_a_factor_of_the_range():
    gray = plain(100, 100, 100)
    made = [augment.color_jitter(gray, rng(seed), 0.4, 0, 0) for seed in range(200)]
    assert all((image == image[0, 0, 0]).all() for image in made)
    values = [int(image[0, 0, 0]) for image in made]
    assert 60 <= min(values) < 64 and 136 < max(values) <= 140 and 95 < np.mean(values) < 105
    wide = [augment.color_jitter(gray, rng(seed), 3.0, 0, 0).max() for seed in range(200)]
    assert min(wide) < 20 and max(wide) == 255 and wide.count(0) < 5  # no factor is below 0


def test_jitter_of_contrast_moves_values_from_their_mean():
    halves = np.repeat(np.array([60, 140], np.uint8), 8)[:, None, None].repeat(4, 1).repeat(3, 2)
    lows = []
    for seed in range(200):
        low, high = augment.color_jitter(halves, rng(seed), 0, 0.5, 0)[[0, -1], 0, 0].astype(int)
        assert abs(low + high - 200) <= 1
        lows.append(low)
    assert 40 <= min(lows) < 44 and 76 < max(lows) <= 80


def test_jitter_of_saturation_moves_colours_from_gray():
    gray, spans = plain(90, 90, 90), []
    for seed in range(200):
        np.testing.assert_array_equal(augment.color_jitter(gray, rng(seed), 0, 0, 0.5), gray)
        color = augment.color_jitter(plain(120, 80, 80), rng(seed), 0, 0, 0.5)[0, 0].astype(int)
        spans.append(color[0] - color[1])
    assert 19 <= min(spans) < 23 and 57 < max(spans) <= 61


def test_jitter_of_hue_turns_the_circle_of_colours_by_its_share():
    turns, start = [], colorsys.rgb_to_hsv(255, 0, 64)[0]  # short of the end of the circle
    for seed in range(200):
        color = augment.color_jitter(plain(255, 0, 64), rng(seed), 0, 0, 0, 0.25)[0, 0]
        hue, saturation, value = colorsys.rgb_to_hsv(*color / 255)
        assert saturation == value == 1
        turns.append((hue - start + 0.5) % 1 - 0.5)
    assert -0.26 < min(turns) < -0.23 and 0.23 < max(turns) < 0.26 and abs(np.mean(turns)) < 0.03


def test_jitter_is_in_random_order():
    """Doubling before or after a clip at 255 differs; one seed, so the factors are the same."""
    made = set()
    for seed in range(40):
        first, factors = rng(seed), []
        factors.append(first.uniform(0.2, 1.8))
        factors.append(first.uniform(0.2, 1.8))
        image = Image.fromarray(NOISE)
        by_order = {
            order: np.asarray(steps(image, factors)).tobytes()
            for order, steps in (
                ("brightness", lambda i, f: augment._contrast(augment._brightness(i, f[0]), f[1])),
                ("contrast", lambda i, f: augment._brightness(augment._contrast(i, f[1]), f[0])),
            )
        }
        ours = augment.color_jitter(NOISE, rng(seed), 0.8, 0.8, 0).tobytes()
        assert ours in by_order.values()
        if len(set(by_order.values())) == 2:
            made.update(order for order, there in by_order.items() if there == ours)
    assert made == {"brightness", "contrast"}


def test_strength_0_of_every_op_that_has_one_is_no_change():
    for name in set(NAMES) - {"auto_contrast", "equalize"}:
        np.testing.assert_array_equal(op(name, NOISE, 0.0), NOISE, err_msg=name)


def test_ops_are_what_they_are_named_after():
    flat = NOISE // 2 + 50
    np.testing.assert_array_equal(op("identity", NOISE, 1.0), NOISE)
    stretched = op("auto_contrast", flat, 1.0)
    assert [stretched.min(), stretched.max()] == [0, 255]
    skewed = (NOISE.astype(int) ** 2 // 255).astype(np.uint8)  # three quarters are dark
    assert skewed.mean() < 90 and 122 < op("equalize", skewed, 1.0).mean() < 133
    np.testing.assert_array_equal(op("solarize", NOISE, 1.0), 255 - NOISE)
    half = op("solarize", NOISE, -0.5)
    np.testing.assert_array_equal(half, np.where(NOISE < 128, NOISE, 255 - NOISE.astype(int)))
    np.testing.assert_array_equal(op("posterize", NOISE, -1.0), NOISE & 0xF0)
    for strength, factor in ((1.0, 1.9), (-1.0, 0.1), (-0.5, 0.55)):
        wanted = np.minimum(NOISE * factor, 255)
        assert np.abs(op("brightness", NOISE, strength) - wanted).max() <= 1
    gray = np.asarray(Image.fromarray(NOISE).convert("L")).astype(float)
    for name, center in (("color", gray[..., None]), ("contrast", np.round(gray.mean()))):
        wanted = np.clip(center + 0.1 * (NOISE - center), 0, 255)
        assert np.abs(op(name, NOISE, -1.0) - wanted).max() <= 1.5, name
    rough = [np.abs(np.diff(op("sharpness", NOISE, s), axis=0)).mean() for s in (-1.0, 0.0, 1.0)]
    assert rough[0] < rough[1] < rough[2]


def test_moves_are_as_far_as_asked_and_leave_gray():
    h, w = 331, 331
    image = np.zeros((h, w, 3), np.uint8)
    image[160:171, 160:171] = 255  # a dot in the middle

    def dot(name, strength):
        made = op(name, image, strength)
        y, x = np.nonzero(made[..., 0] > 200)
        return round(y.mean()) - 165, round(x.mean()) - 165

    assert dot("translate_x", 1.0) == (0, -150) and dot("translate_x", -0.5) == (0, 75)
    assert dot("translate_y", 1.0) == (-150, 0) and dot("translate_y", -0.5) == (75, 0)
    assert (op("translate_x", image, 1.0)[:, -150:] == 128).all()
    assert (op("translate_y", image, -1.0)[:150] == 128).all()
    # About the upper left corner, as PIL and AutoAugment do: 0.3 of the way to the middle.
    assert dot("shear_x", 1.0) == (0, -50) and dot("shear_y", -1.0) == (50, 0)
    assert dot("rotate", 1.0) == (0, 0)
    for name in ("rotate", "shear_x", "shear_y"):
        assert 0.1 < (op(name, image, 1.0) == 128).mean() < 0.35, name
    away = np.zeros((h, w, 3), np.uint8)
    away[160:171, 260:271] = 255  # 100 right of the middle
    y, x = np.nonzero(op("rotate", away, 1.0)[..., 0] > 200)
    assert (round(165 - y.mean()), round(x.mean() - 165)) == (50, 87)  # 30 degrees to the left


def test_rand_augment_draws_layers_of_all_ops_at_the_magnitude(monkeypatch):
    drawn, twice = [], 0
    spies = [lambda image, s, i=i: drawn.append((i, s)) or image for i in range(len(NAMES))]
    monkeypatch.setattr(augment, "OPS", spies)
    for seed in range(500):
        before = len(drawn)
        augment.rand_augment(NOISE, rng(seed), 3, 4)
        assert len(drawn) == before + 3
        twice += len({i for i, _ in drawn[before:]}) < 3
    assert len(augment.OPS) == 14
    assert 60 < twice < 150
    counts = np.bincount([i for i, _ in drawn])
    assert len(counts) == 14 and counts.min() > 70 and counts.max() < 150
    strengths = [s for _, s in drawn]
    assert set(strengths) == {0.4, -0.4} and 650 < strengths.count(0.4) < 850
    drawn.clear()
    augment.rand_augment(NOISE, rng())
    assert len(drawn) == 2 and {abs(s) for _, s in drawn} == {1.0}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: augment.rand_augment(NOISE, rng(), 2, 11), "magnitude=11 must be 0 to 10"),
        (lambda: augment.rand_augment(NOISE, rng(), 2, -1), "magnitude=-1 must be 0 to 10"),
        (lambda: augment.color_jitter(NOISE, rng(), -0.1), "must be 0 or more"),
        (lambda: augment.color_jitter(NOISE, rng(), hue=0.6), "hue 0 to 0.5"),
    ],
)
def test_strengths_out_of_range_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
