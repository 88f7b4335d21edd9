"""siglip.load: what people call with whatever they have."""

import dataclasses
import io
import logging
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest
from jax.sharding import AxisType
from PIL import Image

import siglip
from evaluators import embed, zeroshot
from input_pipeline.transforms import tokenizer
from siglip import checkpoints, library
from siglip.checkpoints import CheckpointError
from siglip.checkpoints.formats import random_weights
from siglip.checkpoints.spec import Spec

ROOT = pathlib.Path(siglip.__file__).parents[1]
SPEC = Spec(
    {"variant": "mu/16"},
    {"variant": "mu", "vocab_size": 259, "out_dim": 32},
    res=32,
    token_len=16,
    vocab_size=259,
    image="hf-siglip",
    tokenizer={"name": "bytes"},
)


def weights(**changes):
    return random_weights.make(dataclasses.replace(SPEC, **changes), "library")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("library") / "hf"
    checkpoints.write(weights(), path, "huggingface")
    return path


@pytest.fixture(scope="module")
def model(folder):
    return siglip.load(folder)


RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (3, 40, 56, 3), dtype=np.uint8)


def saved(image, format="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


# One and many, of every kind


def test_a_picture_is_the_same_however_it_comes(model, tmp_path):
    array = NOISE[0]
    image = Image.fromarray(array)
    (tmp_path / "a.png").write_bytes(saved(image))
    turned = Image.fromarray(np.rot90(array).copy())
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned back by a quarter, clockwise
    turned = Image.open(io.BytesIO(saved(turned, exif=exif)))
    opaque = image.copy()
    opaque.putalpha(255)
    same = {
        "array": array,
        "list in order": np.asfortranarray(array),
        "jax": jax.numpy.asarray(array),
        "PIL": image,
        "RGBA": opaque,
        "path": tmp_path / "a.png",
        "text": str(tmp_path / "a.png"),
        "bytes": saved(image),
        "bytearray": bytearray(saved(image)),
        "memoryview": memoryview(saved(image)),
        "PIL of a file": Image.open(tmp_path / "a.png"),
        "EXIF": turned,
        "EXIF in bytes": turned.fp.getvalue() if turned.fp else saved(turned, exif=exif),
    }
    want = model.encode_image(array)
    assert want.shape == (32,) and want.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(want), 1, atol=1e-6)
    rows = model.encode_image(list(same.values()))
    assert rows.shape == (len(same), 32)
    for name, row in zip(same, rows):
        np.testing.assert_allclose(row, want, rtol=0, atol=1e-6, err_msg=name)
    assert np.abs(model.encode_image(NOISE[1]) - want).max() > 1e-3


def test_modes_mean_what_they_mean_in_a_file(model):
    rgb = NOISE[0]
    gray = rgb[..., 0]
    alpha = np.dstack([rgb, np.full((40, 56), 0, np.uint8)])
    palette = Image.fromarray(rgb).quantize(16)
    cmyk = Image.fromarray(rgb).convert("CMYK")
    deep = Image.fromarray(gray.astype(np.uint16) * 256 + 7)
    assert deep.mode == "I;16"
    pairs = {
        "L": (Image.fromarray(gray), np.repeat(gray[..., None], 3, -1)),
        "array [h, w]": (gray, np.repeat(gray[..., None], 3, -1)),
        "1": (Image.fromarray(gray > 99), np.repeat((gray > 99)[..., None] * np.uint8(255), 3, -1)),
        "P": (palette, np.asarray(palette.convert("RGB"))),
        "CMYK": (cmyk, np.asarray(cmyk.convert("RGB"))),
        "I;16": (deep, np.repeat(gray[..., None], 3, -1)),
        "transparent": (Image.fromarray(alpha, "RGBA"), np.full_like(rgb, 255)),
    }
    rows = model.encode_image([one for one, _ in pairs.values()])
    wants = model.encode_image([want for _, want in pairs.values()])
    for name, row, want in zip(pairs, rows, wants):
        np.testing.assert_allclose(row, want, rtol=0, atol=1e-6, err_msg=name)


def test_one_gives_a_vector_and_many_give_rows_in_order(model):
    rows = model.encode_image(NOISE)
    assert rows.shape == (3, 32)
    for many in (list(NOISE), tuple(NOISE), (x for x in NOISE)):
        np.testing.assert_allclose(model.encode_image(many), rows, rtol=0, atol=1e-6)
    for i in range(3):
        np.testing.assert_allclose(model.encode_image(NOISE[i]), rows[i], rtol=0, atol=1e-6)
    texts = ["a cat", "a dog", "a cat"]
    z = model.encode_text(texts)
    assert z.shape == (3, 32) and z[0].tobytes() == z[2].tobytes()
    np.testing.assert_allclose(model.encode_text("a dog"), z[1], rtol=0, atol=1e-6)
    np.testing.assert_allclose(model.encode_text(t for t in texts), z, rtol=0, atol=1e-6)
    np.testing.assert_allclose(model.encode_text("A DOG"), z[1], rtol=0, atol=1e-6)


def test_none_give_no_rows(model):
    for z in (model.encode_image([]), model.encode_text([]), model.encode_image(NOISE[:0])):
        assert z.shape == (0, 32) and z.dtype == np.float32
    assert model.similarity([], ["a"]).cosine.shape == (0, 1)


@pytest.fixture(scope="module")
def many(model):
    """70 small pictures and texts, and their rows."""
    images = [RNG.integers(0, 256, (20, 20, 3), dtype=np.uint8) for _ in range(70)]
    texts = [f"number {i}" for i in range(70)]
    return images, texts, model.encode_image(images), model.encode_text(texts)


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_no_result_depends_on_the_batch_size(batch_size, folder, many):
    images, texts, zimg, ztxt = many
    other = siglip.load(folder, batch_size=batch_size)
    np.testing.assert_allclose(other.encode_image(images[:25]), zimg[:25], rtol=0, atol=1e-6)
    np.testing.assert_allclose(other.encode_text(texts), ztxt, rtol=0, atol=1e-6)


@pytest.mark.parametrize("count", [1, 4])
def test_no_result_depends_on_the_number_of_devices(count, folder, many, monkeypatch):
    images, texts, zimg, ztxt = many
    devices = jax.local_devices()[:count]
    monkeypatch.setattr(jax, "local_devices", lambda *args, **kw: devices)
    other = siglip.load(folder)
    assert other.mesh.size == count
    np.testing.assert_allclose(other.encode_image(images), zimg, rtol=0, atol=1e-6)
    np.testing.assert_allclose(other.encode_text(texts), ztxt, rtol=0, atol=1e-6)


def test_few_images_do_not_each_compile_a_program_of_their_own(model):
    sizes = [model._size(n) for n in (1, 2, 3, 5, 8, 9, 16, 17, 33, 65, 1000)]
    assert sizes == [8, 8, 8, 8, 8, 16, 16, 32, 64, 64, 64]


# Numbers


def test_similarity_is_its_definition(model):
    texts = ["a cat", "a dog"]
    zimg, ztxt = model.encode_image(NOISE), model.encode_text(texts)
    given = weights().arrays
    t, b = (float(given[name].read()[0]) for name in ("t", "b"))
    assert model.t == pytest.approx(np.exp(t)) and model.b == pytest.approx(b)
    cosine = np.array([[float(np.dot(x, y)) for y in ztxt] for x in zimg])
    for found in (model.similarity(NOISE, texts), model.similarity(zimg, ztxt)):
        np.testing.assert_allclose(found.cosine, cosine, atol=1e-6)
        np.testing.assert_allclose(found.logit, np.exp(t) * cosine + b, atol=1e-4)
        want = 1 / (1 + np.exp(-(np.exp(t) * cosine + b)))
        np.testing.assert_allclose(found.probability, want, rtol=1e-3)
    one = model.similarity(NOISE[0], "a cat")
    np.testing.assert_allclose(one.cosine, cosine[:1, :1], atol=1e-6)


def test_without_a_bias_there_is_no_probability(tmp_path):
    for format, path in (("big_vision", tmp_path / "a.npz"), ("huggingface", tmp_path / "a")):
        checkpoints.write(weights(bias=False), path, format)
        model = siglip.load(path)
        found = model.similarity(NOISE[:1], ["a cat"])
        assert model.b is None and found.probability is None
        np.testing.assert_allclose(found.logit, model.t * found.cosine, rtol=1e-6)


class Examples(list):
    class_names = ("tabby cat, cat", "dog's bed", "House", "tree", "sea", "car")


def test_zero_shot_is_what_the_evaluator_finds(model, many):
    images, _, _, _ = many
    templates = ("a photo of a {}.", "{}")
    found = model.zero_shot(images, Examples.class_names, templates)
    rows = [{"image": x, "label": 0, "id": f"{i}"} for i, x in enumerate(images)]
    mesh = jax.make_mesh(
        (8, 1), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()
    )
    evaluator = zeroshot.Evaluator(
        model.module, mesh, model.preprocess, Examples(rows), None, batch_size=8,
        templates=templates,
    )  # fmt: skip
    zcls = evaluator._class_embeddings(model.params)
    made = model.class_embeddings(Examples.class_names, templates)
    np.testing.assert_allclose(made, zcls, rtol=0, atol=1e-6)
    zimg = embed.Embedder(model.module, mesh, model.preprocess, 8).images(model.params, rows)
    label = (zimg @ zcls.T).argmax(axis=1)
    np.testing.assert_array_equal(found.label, label)
    assert len(set(label.tolist())) > 1
    assert found.name == [Examples.class_names[i] for i in label]
    top1 = {name: value for name, value, _ in evaluator.run(model.params)}["top1"]
    assert top1 == pytest.approx(np.mean(label == 0))
    assert found.logit.shape == found.probability.shape == (70, 6)
    default = model.class_embeddings(["cat"])
    assert default.shape == (1, 32) and np.abs(default - made[:1]).max() > 1e-3


def test_the_matmuls_may_be_bfloat16_and_embeddings_are_float32(folder, model):
    z = siglip.load(folder, dtype="bfloat16").encode_image(NOISE)
    assert z.dtype == np.float32
    difference = np.abs(z - model.encode_image(NOISE)).max()
    assert 1e-6 < difference < 3e-2


# Texts


def test_long_texts_are_cut_with_eos_kept_counted_and_told(folder, caplog):
    model = siglip.load(folder)
    with caplog.at_level(logging.WARNING, "siglip"):
        model.encode_text(["short", "x" * 15])
        assert model.truncated == 0 and caplog.messages == []
        z = model.encode_text(["x" * 16, "x" * 40, "short"])
    assert model.truncated == 2
    assert caplog.messages == ["2 of 3 texts were longer than 16 tokens and were cut, EOS kept"]
    ids = model.preprocess.text("x" * 40)
    assert ids[-1] == 1 and (ids[:-1] == ord("x") + 3).all()
    np.testing.assert_allclose(z[0], z[1], rtol=0, atol=1e-6)


def test_texts_need_a_tokenizer(tmp_path):
    checkpoints.write(weights(tokenizer=None), tmp_path / "a.npz", "big_vision")
    model = siglip.load(tmp_path / "a.npz")
    assert model.encode_image(NOISE[0]).shape == (32,)
    with pytest.raises(ValueError, match=r"^[^\n]*without its tokenizer; pass siglip.load[^\n]*$"):
        model.encode_text("a cat")
    other = siglip.load(tmp_path / "a.npz", tokenizer=tokenizer.Bytes())
    assert other.encode_text("a cat").shape == (32,)


def test_another_tokenizer_is_refused(folder):
    class Other(tokenizer.Bytes):
        vocab_size = 300

    with pytest.raises(CheckpointError, match="vocabulary 300 where it expects 259"):
        siglip.load(folder, tokenizer=Other())
    for name in ("none.model", "none.json"):
        with pytest.raises(CheckpointError, match=r"^[^\n]*there is no file 'none[^\n]*$"):
            siglip.load(folder, tokenizer=name)


def test_a_token_without_a_row_is_refused_and_never_nan(folder):
    class Odd(tokenizer.Bytes):
        def encode(self, text):
            return [259] if "odd" in text else super().encode(text)

    model = siglip.load(folder, tokenizer=Odd())
    with pytest.raises(ValueError, match=r"^text 1 has the token 259, but the model 259 only$"):
        model.encode_text(["even", "odd"])


# What cannot be used


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ("nowhere.png", r"image 1 \(nowhere.png\) cannot be read: No such file or directory"),
        (b"not a picture", "image 1 cannot be read: unknown image format"),
        (b"", "image 1 cannot be read: no image"),
        (np.zeros((4, 4, 3), np.float32), "must be uint8, from 0 to 255, not float32"),
        (np.zeros((4, 4, 5), np.uint8), r"must be uint8\[h,w,3\], not uint8\[4, 4, 5\]"),
        (7, "image 1 cannot be read"),
        (Image.new("F", (4, 4)), "image 1 cannot be read: cannot write mode F as PNG"),
    ],
    ids=["path", "bytes", "empty", "floats", "channels", "number", "mode"],
)
def test_an_image_that_cannot_be_read_is_named_in_one_line(bad, told, model):
    with pytest.raises(ValueError, match=rf"^[^\n]*{told}[^\n]*$"):
        model.encode_image([NOISE[0], bad, NOISE[1]])


def test_other_mistakes_are_one_line(model, folder, tmp_path, unchecked_shapes):
    for call, told in (
        (lambda: model.encode_image(7), "one or many are taken, not a int"),
        (lambda: model.encode_text(7), "one or many are taken, not a int"),
        (lambda: model.encode_text(["a", 7]), "text 1 is no string but a int"),
        (lambda: model.zero_shot(NOISE, "cat"), "classnames must be a list"),
        (lambda: model.zero_shot(NOISE, []), "classnames must be a list"),
        (lambda: model.zero_shot(NOISE, ["cat"], "a photo"), r"no \{\} for the class name"),
        (lambda: siglip.load(tmp_path / "none.npz"), "there is no such file"),
        (lambda: siglip.load(folder, image="decode | rsize"), "rsize"),
        (lambda: siglip.load(folder, res=64), "choose how its positions are resized"),
        (lambda: siglip.load(folder, token_len=64), "choose how its positions are extended"),
        (lambda: siglip.load(folder, dtype="int8"), "dtype 'int8' is none of"),
    ):
        with pytest.raises(ValueError, match=told) as error:
            call()
        assert "\n" not in str(error.value) and "config.input" not in str(error.value)


def test_a_tower_alone_embeds_and_says_what_it_has_not(tmp_path, model):
    for tower, z in (("img", model.encode_image(NOISE)), ("txt", model.encode_text(["a"]))):
        checkpoints.write(weights().only(tower), tmp_path / tower, "huggingface")
        alone = siglip.load(tmp_path / tower)
        mine = (alone.encode_image, alone.encode_text)[tower == "txt"]
        other = (alone.encode_text, alone.encode_image)[tower == "txt"]
        given = (NOISE, ["a"])[tower == "txt"]
        np.testing.assert_allclose(mine(given), z, rtol=0, atol=1e-6)
        with pytest.raises(ValueError, match=r"holds no (text|image) tower"):
            other(["a"])
        with pytest.raises(ValueError, match="one tower alone, and no temperature"):
            alone.similarity(NOISE, ["a"])


def test_other_sizes_by_a_named_method(folder):
    model = siglip.load(folder, res=64, positions="bicubic", token_len=20, text_positions="keep")
    assert (model.spec.res, model.spec.token_len) == (64, 20)
    assert model.preprocess.image(NOISE[0]).shape == (64, 64, 3)
    assert model.encode_image(NOISE).shape == (3, 32)
    assert model.encode_text("x" * 18).shape == (32,) and model.truncated == 0


def test_naflex_takes_any_aspect_ratio(tmp_path):
    given = weights(
        img={"variant": "mu/16", "naflex_grid": 4}, res=None,
        image="decode | naflex(16, 16, 'bilinear-pil')",
    )  # fmt: skip
    checkpoints.write(given, tmp_path / "hf", "huggingface")
    model = siglip.load(tmp_path / "hf")
    wide, high = NOISE[0][:12], NOISE[0][:, :12]
    rows = model.encode_image([wide, high])
    np.testing.assert_allclose(rows[1], model.encode_image(high), rtol=0, atol=1e-6)
    assert np.abs(rows[0] - rows[1]).max() > 1e-3


# The terminal, and what comes with it


def test_the_progress_bar_hides_without_a_terminal(folder, many, capsys):
    siglip.load(folder, batch_size=8).encode_text(many[1])
    assert capsys.readouterr().err == ""
    siglip.load(folder, batch_size=8, progress=True).encode_text(many[1])
    assert "70/70 texts" in capsys.readouterr().err
    siglip.load(folder, batch_size=8, progress=False).encode_text(many[1])
    assert capsys.readouterr().err == ""


def test_load_is_a_name_of_the_package():
    assert siglip.load is library.load and siglip.Model is library.Model
    with pytest.raises(AttributeError, match="has no attribute 'lode'"):
        siglip.lode  # noqa: B018


HEAVY = ("tensorflow_datasets", "grain", "orbax", "pyarrow", "tensorboardX", "clu", "torch")


def test_importing_and_loading_bring_nothing_heavy(folder):
    code = f"""
import sys
import siglip
assert "PIL" not in sys.modules and "input_pipeline" not in sys.modules, "the science alone"
model = siglip.load({str(folder)!r})
assert model.encode_text("a").shape == (32,)
print([name for name in {HEAVY} if name in sys.modules])
"""
    done = processes.run([sys.executable, "-c", code], cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_embeddings_may_be_of_any_float_type_and_length(model):
    z = model.encode_text(["a", "b"])
    wanted = model.similarity(z, z)
    for given in (z.astype(jnp.bfloat16), jnp.asarray(z), 3 * z, z.astype(np.float64)):
        found = model.similarity(given, z)
        assert np.abs(found.cosine - wanted.cosine).max() < 5e-3
    with pytest.raises(ValueError, match=r"embeddings of width 5 are not of .*wide"):
        model.similarity(np.zeros((2, 5), np.float32), ["a"])


def test_float32_is_float32_on_every_platform(model):
    """TF32 on GPUs and bfloat16 passes on TPUs are what JAX takes by default."""
    batch = {"text": np.zeros((1, model.spec.token_len), np.int32)}
    text = str(
        jax.make_jaxpr(lambda p, b: model._run(p, b, output="embedding"))(model.params, batch)
    )
    matmuls = text.count("dot_general[")
    assert matmuls > 4 and text.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == matmuls


def test_arrays_of_one_and_four_channels_are_gray_and_transparent(model):
    gray = np.random.default_rng(0).integers(0, 256, (20, 30), np.uint8)
    assert np.array_equal(model.encode_image(gray), model.encode_image(gray[..., None]))
    rgba = np.dstack([gray, gray, gray, np.full_like(gray, 255)])
    assert np.array_equal(model.encode_image(rgba), model.encode_image(gray))


def test_it_says_what_it_is(model):
    assert "image mu/16" in repr(model) and f"embeddings of {model.spec.embedding_dim}" in repr(
        model
    )
