"""Image and text as a model takes them, with and without augmentation."""

import io
import threading

import cv2
import numpy as np
import pytest
from PIL import Image

from input_pipeline.errors import UserError
from input_pipeline.tokenizers import Bytes
from input_pipeline.transforms import BadImage, make_preprocess

NOISE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


def preprocess(**kw):
    return make_preprocess(Bytes(), **{"res": 16, "token_len": 8, **kw})


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("res", [16, 100])
def test_resizes_are_what_they_are_named_after(res):
    expected = {
        "bilinear": cv2.resize(NOISE, (res, res), interpolation=cv2.INTER_LINEAR),
        "bilinear-pil": Image.fromarray(NOISE).resize((res, res), Image.Resampling.BILINEAR),
        "bicubic-pil": Image.fromarray(NOISE).resize((res, res), Image.Resampling.BICUBIC),
    }
    for name, image in expected.items():
        ours = preprocess(res=res, resize=name).image(NOISE)
        assert ours.shape == (res, res, 3) and ours.dtype == np.uint8
        np.testing.assert_array_equal(ours, np.asarray(image))
    assert cv2.getNumThreads() == 1  # 0 given: OpenCV's own threads are off


def test_bilinear_equals_its_definition_without_antialias():
    """Pixel centres, as tf.image.resize(antialias=False) has them; cv2 rounds in fixed point."""
    y = (np.arange(16) + 0.5) * 40 / 16 - 0.5
    x = (np.arange(16) + 0.5) * 60 / 16 - 0.5

    def weights(at, n):
        low = np.clip(np.floor(at).astype(int), 0, n - 1)
        high = np.clip(low + 1, 0, n - 1)
        w = np.zeros((len(at), n))
        np.add.at(w, (np.arange(len(at)), low), 1 - (at - np.floor(at)))
        np.add.at(w, (np.arange(len(at)), high), at - np.floor(at))
        return w

    exact = np.einsum("yh,xw,hwc->yxc", weights(y, 40), weights(x, 60), NOISE)
    assert np.abs(preprocess().image(NOISE) - exact).max() <= 1.0


def test_bytes_and_array_are_the_same_image():
    file = io.BytesIO()
    Image.fromarray(NOISE).save(file, "PNG")
    np.testing.assert_array_equal(preprocess().image(file.getvalue()), preprocess().image(NOISE))


def test_evaluation_is_never_augmented():
    augmenting = preprocess(random_crop=0.1, flip=True)
    plain = preprocess().image(NOISE)
    for _ in range(5):
        np.testing.assert_array_equal(augmenting.image(NOISE), plain)
    np.testing.assert_array_equal(preprocess().image(NOISE, rng()), plain)


def test_flip_mirrors_half_of_the_images():
    flipping, plain = preprocess(flip=True), preprocess().image(NOISE)
    mirrored = 0
    for seed in range(200):
        image = flipping.image(NOISE, rng(seed))
        same = np.array_equal(image, plain)
        assert same or np.array_equal(image, plain[:, ::-1])
        mirrored += not same
    assert 70 < mirrored < 130


def test_crop_is_a_rectangle_of_the_share_and_ratio_asked_for(monkeypatch):
    h, w = 120, 150
    place = np.zeros((h, w, 3), np.uint8)  # each pixel says where it is
    place[..., 0], place[..., 1] = np.arange(h)[:, None], np.arange(w)
    seen = []
    cropping = preprocess(random_crop=0.3)
    monkeypatch.setattr(cropping, "_resize", lambda image, res: seen.append(image) or image)
    for seed in range(300):
        cropping.image(place, rng(seed))
    shares, ratios, tops, lefts = [], [], set(), set()
    for crop in seen:
        ch, cw = crop.shape[:2]
        top, left = int(crop[0, 0, 0]), int(crop[0, 0, 1])
        np.testing.assert_array_equal(crop, place[top : top + ch, left : left + cw])
        shares.append(ch * cw / (h * w))
        ratios.append(cw / ch)
        tops.add(top)
        lefts.add(left)
    assert 0.29 < min(shares) < 0.35 and max(shares) > 0.85
    ratios = [r for r, s in zip(ratios, shares) if s < 1]
    assert 0.73 < min(ratios) < 0.8 and 1.25 < max(ratios) < 1.36
    assert len(tops) > 20 and len(lefts) > 20


def test_crop_of_a_line_is_the_line():
    line = np.arange(300, dtype=np.uint8).reshape(1, 100, 3)
    np.testing.assert_array_equal(
        preprocess(random_crop=0.9).image(line, rng()), preprocess().image(line)
    )


def test_random_numbers_decide_all():
    p = preprocess(random_crop=0.3, flip=True)
    example = {"image": NOISE, "texts": ["a", "b", "c", "d"], "id": "x"}
    first, again, other = (p.example(example, rng(seed)) for seed in (1, 1, 2))
    for key in first:
        np.testing.assert_array_equal(first[key], again[key])
    assert not np.array_equal(first["image"], other["image"])


def test_one_caption_is_drawn_evenly():
    p = preprocess()
    example = {"image": NOISE, "texts": ["a", "b", "c"], "id": "x"}
    drawn = [int(p.example(example, rng(seed))["text"][0]) for seed in range(300)]
    counts = [drawn.count(ord(c) + 3) for c in "abc"]
    assert sum(counts) == 300 and min(counts) > 70


def test_text_is_lower_cased_cut_and_padded():
    text = preprocess().text("Ab")
    assert text.dtype == np.int32 and text.tolist() == [100, 101, 1, 1, 1, 1, 1, 1]
    assert preprocess(lower=False).text("Ab")[0] == ord("A") + 3
    assert preprocess(pad_id=0).text("Ab").tolist() == [100, 101, 1, 0, 0, 0, 0, 0]
    assert preprocess(pad_id=0, eos="none").text("Ab").tolist() == [100, 101] + [0] * 6
    assert preprocess(eos="yes").text("a" * 20).tolist() == [100] * 8
    assert preprocess().text("a" * 20).tolist() == [100] * 7 + [1]
    assert preprocess().text("Ä")[:2].tolist() == [b + 3 for b in "ä".encode()]


def test_half_a_character_pair_does_not_end_a_run():
    np.testing.assert_array_equal(preprocess().text("a\ud83d"), preprocess().text("a?"))


def test_bad_examples_are_zeros_masked_and_recorded():
    p = preprocess()
    good = p.example({"image": NOISE, "texts": ["a"], "id": "good"}, rng())
    assert good["mask"].dtype == np.bool_ and good["mask"] and len(p.bad) == 0
    for name, times in (("zip/b.png", 1), ("zip/a.png", 3)):
        for _ in range(times):
            bad = p.example({"image": b"", "texts": ["a"], "id": name}, rng())
            assert not bad["mask"] and not bad["image"].any() and not bad["text"].any()
            for key in good:  # both kinds stand in one batch
                assert bad[key].shape == good[key].shape and bad[key].dtype == good[key].dtype
    p.example({"image": NOISE, "texts": [], "id": "c"}, rng())
    assert len(p.bad) == 3 and p.bad.count == 5
    assert p.bad.reasons["c"] == "there is no caption"
    assert p.bad.worst(1) == "zip/a.png (the file is missing or empty), and 2 more"
    assert p.bad.worst().startswith("zip/a.png (") and "more" not in p.bad.worst()


def test_evaluation_raises_what_training_masks():
    with pytest.raises(BadImage, match="no image of a known format"):
        preprocess().image(b"no image")


def test_bad_examples_are_counted_by_many_threads():
    p = preprocess()

    def work():
        for i in range(200):
            p.bad.record(f"{i % 7}", "reason")
            p.bad.worst()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert p.bad.count == 1600 and len(p.bad) == 7


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"res": 0}, "config.input.res=0 must be at least 1"),
        ({"token_len": -1}, "config.input.token_len=-1 must be at least 1"),
        ({"random_crop": 0.0}, "config.input.random_crop=0.0 must be above 0"),
        ({"random_crop": 1.5}, "config.input.random_crop=1.5 must be above 0"),
        ({"resize": "bilinar"}, "config.input.resize='bilinar' is unknown; the nearest: bilinear"),
        ({"eos": "stiky"}, "config.input.eos='stiky' is unknown; the nearest: sticky"),
        ({"pad_id": 259}, "config.input.pad_id=259 is not an id of the tokenizer, which has 259"),
        ({"pad_id": -1}, "config.input.pad_id=-1 is not an id"),
    ],
)
def test_values_out_of_range_are_refused(given, told):
    with pytest.raises(UserError, match=told):
        preprocess(**given)
