"""Image and text as a model takes them, with and without augmentation."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image

from base.errors import UserError
from input_pipeline.errors import BadExample
from input_pipeline.transforms import naflex, resize
from input_pipeline.transforms.image_ops import IMAGE_OPS, PRESETS, ImageContext
from input_pipeline.transforms.preprocess import make_preprocess
from input_pipeline.transforms.tokenizer import Bytes

NOISE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


def preprocess(**kw):
    return make_preprocess(Bytes(), **{"res": 16, "token_len": 8, **kw})


def rng(seed=0):
    return np.random.default_rng(seed)


def test_bytes_and_array_are_the_same_image():
    file = io.BytesIO()
    Image.fromarray(NOISE).save(file, "PNG")
    np.testing.assert_array_equal(preprocess().image(file.getvalue()), preprocess().image(NOISE))


def test_evaluation_is_never_augmented():
    augmenting = preprocess(image="decode | random_resized_crop((0.1, 1.0)) | flip")
    plain = preprocess().image(NOISE)
    for _ in range(5):
        np.testing.assert_array_equal(augmenting.image(NOISE), plain)
    np.testing.assert_array_equal(preprocess().image(NOISE, rng()), plain)


RANDOM = "decode | shorter_side(20) | random_crop | flip | color_jitter | rand_augment"


@pytest.mark.parametrize(
    "image",
    [
        "decode | resize",
        "decode(shrink=64) | shorter_side | center_crop",
        "decode\n| resize\n",
        "decode | random_resized_crop(area=(0.3, 1.0), ratio=(1, 1), method='area') | flip",
        ("decode", "shorter_side(40, 'bicubic-pil')", "center_crop"),
        RANDOM,
        *PRESETS,
    ],
)
def test_every_program_makes_what_a_model_takes(image):
    p = preprocess(image=image)
    for draws in (None, rng()):
        made = p.image(NOISE, draws)
        pixels = made["image"] if p.patches else made
        assert pixels.dtype == np.uint8 and pixels.flags.c_contiguous
        assert pixels.shape == ((256, 768) if p.patches else (16, 16, 3))
    assert p.patches == (image == "hf-naflex")


def test_presets_are_the_resizes_of_the_released_models():
    """That those are transformers' and TensorFlow's: test_processor_parity.py, test_resize.py."""
    expected = {
        "big_vision": resize.bilinear_exact(NOISE, 16, 16),
        "hf-siglip": np.asarray(Image.fromarray(NOISE).resize((16, 16), Image.Resampling.BICUBIC)),
        "hf-siglip2": np.asarray(
            Image.fromarray(NOISE).resize((16, 16), Image.Resampling.BILINEAR)
        ),
    }
    for name, pixels in expected.items():
        np.testing.assert_array_equal(preprocess(image=name).image(NOISE), pixels)
    assert len({pixels.tobytes() for pixels in expected.values()}) == 3
    sized = naflex.resize_to_budget(NOISE, 16, 256, "bilinear-pil")
    made = preprocess(image="hf-naflex").image(NOISE)
    for key, array in zip(("image", "image_mask", "image_shape"), naflex.patchify(sized, 16, 256)):
        np.testing.assert_array_equal(made[key], array)
    assert set(PRESETS) == {*expected, "hf-naflex"}


def test_what_is_random_does_nothing_in_evaluation():
    plain = preprocess(image="decode | shorter_side(20) | center_crop").image(NOISE)
    np.testing.assert_array_equal(preprocess(image=RANDOM).image(NOISE), plain)
    squashed = preprocess(image="decode | random_resized_crop | flip").image(NOISE)
    np.testing.assert_array_equal(squashed, preprocess().image(NOISE))
    assert any(
        not np.array_equal(preprocess(image=RANDOM).image(NOISE, rng(i)), plain) for i in range(9)
    )


def test_shrinking_keeps_at_least_the_size_of_the_model():
    file = io.BytesIO()
    smooth = cv2.resize(NOISE, (600, 400), interpolation=cv2.INTER_CUBIC)
    Image.fromarray(smooth).save(file, "JPEG", quality=95)
    seen = []
    for res in (16, 51, 101, 201):
        seen.append(IMAGE_OPS["decode"](file.getvalue(), ImageContext(16), shrink=res).shape[:2])
        assert min(seen[-1]) >= min(res, 400)
    assert seen == [(50, 75), (100, 150), (200, 300), (400, 600)]
    assert IMAGE_OPS["decode"](file.getvalue(), ImageContext(16)).shape[:2] == (400, 600)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_an_embedding_stands_for_its_image(dtype):
    p = preprocess(image="embedding")
    given = np.array([0.5, -3.0, 2.0], dtype)
    row = p.example({"image": given, "texts": ["a"], "id": "x"}, rng())
    assert set(row) == {"image", "text"} and row["image"].dtype == np.float32
    np.testing.assert_array_equal(row["image"], given)
    assert p.embeddings and not p.patches and not preprocess().embeddings
    p.width = 3
    assert set(p.pixels({"image": given})) == {"image"}
    p.width = 4
    with pytest.raises(UserError, match=r"embedding of x has 3 numbers, .*img\.width=4"):
        p.pixels({"image": given, "id": "x"})


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        (b"", "no image", "the embedding is missing"),
        (b"PNG", "unusable image", "floats \\[d\\], not bytes"),
        (NOISE, "unusable image", "not uint8\\[40, 60, 3\\]"),
        (np.ones((1, 4), np.float32), "unusable image", "not float32\\[1, 4\\]"),
        (np.arange(4), "unusable image", "not int64\\[4\\]"),
        (np.array([1, np.nan], np.float32), "unusable image", "must be finite"),
        (np.array([1, np.inf], np.float16), "unusable image", "must be finite"),
        (np.array([1, 1e300]), "unusable image", "must be finite"),
    ],
)
def test_what_is_no_embedding_is_a_bad_example(given, kind, message):
    with pytest.raises(BadExample, match=message) as error:
        preprocess(image="embedding").image(given)
    assert error.value.kind == kind


def test_random_numbers_decide_all():
    p = preprocess(image="decode | random_resized_crop((0.3, 1.0)) | flip")
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
    assert preprocess(text="tokenize").text("Ab")[0] == ord("A") + 3
    padded = preprocess(text="lower | tokenize(pad_id=0)").text("Ab")
    assert padded.tolist() == [100, 101, 1, 0, 0, 0, 0, 0]
    bare = preprocess(text="lower | tokenize(eos='none', pad_id=0)").text("Ab")
    assert bare.tolist() == [100, 101] + [0] * 6
    assert preprocess(text="tokenize('yes')").text("a" * 20).tolist() == [100] * 8
    assert preprocess().text("a" * 20).tolist() == [100] * 7 + [1]
    assert preprocess().text("Ä")[:2].tolist() == [b + 3 for b in "ä".encode()]


@pytest.mark.parametrize(
    ("steps", "text", "cleaned"),
    [
        ("strip", "  a \t b\n", "a b"),
        ("nfkc", "\uff21\ufb01e\u0301", "Afi\u00e9"),
        ("canonicalize", "A_b, (c)!", "a b c"),
        ("lower | strip", " A  B", "a b"),
    ],
)
def test_steps_clean_a_text(steps, text, cleaned):
    p = preprocess(text=f"{steps} | tokenize")
    np.testing.assert_array_equal(p.text(text), preprocess(text="tokenize").text(cleaned))


def test_half_a_character_pair_does_not_end_a_run():
    np.testing.assert_array_equal(preprocess().text("a\ud83d"), preprocess().text("a?"))


def test_captions_are_drawn_by_their_weights():
    p = preprocess()
    example = {"texts": ["a", "b", "c"], "weights": [0.2, 0.0, 0.6], "id": "x"}
    drawn = [p.caption(example, rng(seed)) for seed in range(400)]
    assert 70 < drawn.count("a") < 130 and drawn.count("b") == 0
    with pytest.raises(BadExample, match="1 weights of 2 captions"):
        p.caption({"id": "x", "texts": ["a", "b"], "weights": [1.0]}, rng())
    assert p.caption({"id": "x", "texts": ["a"], "weights": []}, rng()) == "a"
    for nothing in ({"texts": []}, {"texts": ["a"], "weights": [0.0]}):
        with pytest.raises(BadExample, match="no caption"):
            p.caption({"id": "x", **nothing}, rng())


@pytest.mark.parametrize(
    ("example", "kind"),
    [
        ({"image": b"no image", "texts": ["a"]}, "unknown image format"),
        ({"image": b"", "texts": ["a"]}, "no image"),
        ({"image": NOISE, "texts": []}, "no caption"),
        ({"image": NOISE.astype(float), "texts": ["a"]}, "unusable image"),
    ],
)
def test_bad_examples_say_their_kind(example, kind):
    with pytest.raises(BadExample) as error:
        preprocess().example({"id": "x", **example}, rng())
    assert error.value.kind == kind


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"res": 0}, "config.input.res=0 must be at least 1"),
        ({"token_len": -1}, "config.input.token_len=-1 must be at least 1"),
        ({"image": "decode | resize('bilinar')"}, "input.image: resize: method='bilinar' is none"),
        ({"image": "decode | random_resized_crop((0, 1))"}, "area=\\(0, 1\\) must be"),
        ({"image": "decode | random_resized_crop((0.5, 2))"}, "area=\\(0.5, 2\\) must be"),
        ({"image": "decode | random_resized_crop(0.5)"}, "input.image: random_resized_crop: "),
        ({"image": "decode | shorter_side(8) | center_crop"}, "center_crop: unusable image"),
        ({"image": "decode | shorter_side(-5) | center_crop"}, "size=-5 is no whole number from 0"),
        ({"image": "decode | shorter_side(1e3) | center_crop"}, "size=1000.0 is no whole number"),
        ({"image": "decode | naflex(patch_size=0)"}, "patch_size=0 is no whole number from 1"),
        ({"image": "decode | color_jitter(1e999) | resize"}, "input.image: color_jitter: "),
        ({"image": "decode(shrink=True) | resize"}, "decode: shrink=True is no whole number"),
        ({"text": "tokenize(pad_id=1.5)"}, "pad_id=1.5 is not an id"),
        ({"image": "resize"}, "must begin with `decode`"),
        ({"image": ""}, "end it with `resize`|must begin with `decode`"),
        ({"image": "decode"}, r"ends in uint8\[25, 29, 3\], the model takes uint8\[16, 16, 3\]"),
        ({"image": "decode | shorter_side"}, "end it with `resize` or a crop"),
        ({"image": "decode | naflex | resize"}, "nothing can follow naflex, as resize does"),
        ({"image": "embedding | flip"}, "`embedding` stands alone, without other steps"),
        ({"image": "decode | embedding"}, "`embedding` stands alone, without other steps"),
        ({"image": "embedding(3)"}, r"has too many values; it is embedding\(\)"),
        ({"image": "hf_siglip"}, r"presets stand alone: big_vision, hf-siglip, "),
        ({"image": "big_vision | flip"}, "no 'big_vision'.*presets stand alone"),
        ({"image": "hf-siglp"}, "cannot be read|is not the name of a step"),
        ({"text": "lower"}, "config.input.text must end with `tokenize`"),
        ({"text": "tokenize | lower"}, "nothing can follow tokenize, as lower does"),
        ({"text": "tokenize('stiky')"}, "tokenize: eos='stiky' is none of sticky, yes, none"),
        (
            {"text": "tokenize(pad_id=259)"},
            "pad_id=259 is not an id of the tokenizer, which has 25",
        ),
        ({"text": "tokenize(pad_id=-1)"}, "pad_id=-1 is not an id"),
    ],
)
def test_values_out_of_range_are_refused(given, message):
    with pytest.raises(UserError, match=message) as error:
        preprocess(**given)
    assert "\n" not in str(error.value)
