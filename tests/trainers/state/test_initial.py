"""Weights out of a run and into another: siglip.json, config.init and the library say the same."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from tiny_run import Tiny

from base.errors import UserError
from evaluators.embed import Embedder, tokenize
from siglip import checkpoints, library
from siglip.checkpoints import convert
from siglip.checkpoints.formats import random_weights
from siglip.leaf_names import leaves
from siglip.towers import positions
from trainers.evaluation import params_to_evaluate
from trainers.setup import make_setup
from trainers.state.start import find_start

pytestmark = pytest.mark.slow  # two runs of two steps


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return Tiny(tmp_path_factory.mktemp("initial"))


@pytest.fixture(scope="module")
def runs(tiny):
    """scan -> workdir of a run."""
    made = {}
    for scan in (False, True):
        made[scan] = tiny.folder / f"scan-{scan}"
        short = {"total": "2 steps", "checkpoint__every": "2 steps", "model__scan": scan}
        short |= {f"model__{tower}__group": int(scan) for tower in ("img", "txt")}
        tiny.train(made[scan], evals="", **short)
    return made


@pytest.fixture(scope="module")
def folder(tiny, runs):
    """The run as a folder of Hugging Face."""
    path = tiny.folder / "hf"
    assert convert.main([str(runs[False]), str(path), "--quiet"]) == 0
    return path


def start(tiny, source, **overrides):
    """(setup, parameters) of a run with config.init, before its first step."""
    setup = make_setup(tiny.load(evals="", init=source, **overrides))
    found = find_start(str(tiny.folder / "own"), init=setup.config.init)
    return setup, params_to_evaluate(setup, found)


def flat(tree):
    return {name: np.asarray(x) for name, x in leaves(tree).items()}


def assert_equal(one, other):
    assert set(one) == set(other) and len(one) > 20
    for name in one:
        assert one[name].dtype == other[name].dtype and one[name].shape == other[name].shape
        assert one[name].tobytes() == other[name].tobytes(), name


@pytest.mark.parametrize("scan", [False, True])
def test_a_run_loads_as_a_model_and_embeds_as_its_evaluators_do(scan, tiny, runs):
    contract = json.loads((runs[scan] / "siglip.json").read_text())
    assert contract["version"] == 1
    assert "group" not in contract["img"] and "group" not in contract["txt"]  # of training alone
    setup, params = start(tiny, runs[scan], model__scan=scan)
    model = library.load(runs[scan])
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (9, 20, 30, 3), dtype=np.uint8)
    texts = ["A red circle", "", "two blue squares and a very long text", "été"]
    embedder = Embedder(setup.model, setup.mesh, setup.preprocess, 8)
    zimg = embedder.images(params, [{"image": x, "id": "x"} for x in images])
    ztxt = embedder.texts(params, tokenize(setup.preprocess, texts))
    np.testing.assert_allclose(model.encode_image(images), zimg, rtol=0, atol=1e-6)
    np.testing.assert_allclose(model.encode_text(texts), ztxt, rtol=0, atol=1e-6)
    assert np.abs(zimg[0] - zimg[1]).max() > 1e-4  # not all the same
    assert model.t == pytest.approx(float(np.exp(np.asarray(params["t"])[0])))
    step = library.load(runs[scan] / "checkpoints" / "2")
    assert step.spec == model.spec


def test_the_way_through_hugging_face_loses_nothing(tiny, runs, folder):
    back = tiny.folder / "back.npz"
    assert convert.main([str(folder), str(back), "--quiet", "--stacked"]) == 0
    params = {str(p): flat(start(tiny, p)[1]) for p in (runs[False], folder, back)}
    for other in (folder, back):
        assert_equal(params[str(runs[False])], params[str(other)])
    # And that is what lies there, biases too.
    there = {n: leaf.read() for n, leaf in checkpoints.read(runs[False]).arrays.items()}
    assert_equal(params[str(runs[False])], there)
    assert np.abs(there["img/embedding/bias"]).max() > 0
    assert checkpoints.read(folder).spec == checkpoints.read(runs[False]).spec
    scanned = flat(start(tiny, folder, model__scan=True)[1])
    stacked = scanned["img/Transformer/encoderblock/LayerNorm_0/scale"]
    one = params[str(folder)]["img/Transformer/encoderblock_0/LayerNorm_0/scale"]
    np.testing.assert_array_equal(stacked, one[None])


def test_init_only_leaves_the_rest_as_it_was_drawn(tiny, folder):
    setup, params = start(tiny, folder, init_only=("img",))
    given = flat(start(tiny, folder)[1])
    fresh = flat(setup.model.init(jax.random.key(setup.config.seed), *setup.inputs)["params"])
    found = flat(params)
    for name in found:
        want = (given if name.startswith("img/") else fresh)[name]
        np.testing.assert_allclose(found[name], want, rtol=0, atol=1e-6, err_msg=name)
    changed = [n for n in found if not np.allclose(given[n], fresh[n], atol=1e-7)]
    assert {n.split("/")[0] for n in changed} >= {"img", "txt"}


def test_a_tower_alone_goes_in_by_init_only(tiny, folder, tmp_path):
    checkpoints.write(checkpoints.read(folder).only("img"), tmp_path / "img", "huggingface")
    found = flat(start(tiny, tmp_path / "img", init_only=("img",))[1])
    given = flat(start(tiny, folder, init_only=("img",))[1])
    assert_equal(found, given)
    with pytest.raises(UserError, match=r"^config.init: [^\n]*config.init_only[^\n]*missing"):
        start(tiny, tmp_path / "img")


def test_positions_are_resized_by_the_methods_of_the_config(tiny, folder):
    changes = {"input__res": 24, "init_positions": "bicubic"}
    changes |= {"input__token_len": 32, "init_text_positions": "keep"}
    found, given = flat(start(tiny, folder, **changes)[1]), flat(start(tiny, folder)[1])
    table = given["img/pos_embedding"].reshape(4, 4, 16)
    want = positions.resize_images(table, (6, 6), "bicubic").reshape(1, 36, 16)
    np.testing.assert_array_equal(found["img/pos_embedding"], want)
    want = positions.resize_text(given["txt/pos_embedding"][0], 32, "keep")[None]
    np.testing.assert_array_equal(found["txt/pos_embedding"], want)


MISTAKES = {
    "image size": ({"input__res": 24}, r"\(config\.init_positions\)"),
    "method": ({"input__res": 24, "init_positions": "x"}, r"'x' is none of .*init_positions"),
    "text length": ({"input__token_len": 32}, r"\(config\.init_text_positions\)"),
    "padding": ({"input__text": "lower | tokenize(pad_id=0)"}, "padding id 0 where it expects 1"),
    "part": ({"init_only": ("image",)}, "config.init_only names 'image', which is none of"),
    "sizes": ({"model__img__depth": 2}, r"missing there: .*encoderblock_1"),
    "width": ({"model__txt__mlp_dim": 64}, "of another shape: txt/Encoder_0"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_does_not_fit_is_one_line_with_its_key(mistake, tiny, folder):
    changes, told = MISTAKES[mistake]
    with pytest.raises(UserError, match=told) as error:
        start(tiny, folder, **changes)
    assert "\n" not in str(error.value) and str(error.value).startswith("config.init")


def test_another_tokenizer_is_one_line(tiny, folder, tmp_path):
    """A table of more rows than the tokenizer has ids, which model.txt.vocab_size gives here."""
    given = checkpoints.read(folder)
    txt = {**given.spec.txt, "vocab_size": 400}
    other = random_weights.make(dataclasses.replace(given.spec, txt=txt, vocab_size=400), "other")
    checkpoints.write(other, tmp_path / "other.npz", "big_vision")
    with pytest.raises(UserError, match="vocabulary 259 where it expects 400") as error:
        start(tiny, tmp_path / "other.npz", model__txt__vocab_size=400)
    assert "\n" not in str(error.value) and str(error.value).startswith("config.init")


@pytest.mark.parametrize("name", ["siglip-b16-225", "siglip2-b16-226"])
def test_an_unknown_model_lists_the_nearest(name, tiny):
    with pytest.raises(UserError, match=r"^config\.init: [^\n]*the nearest: siglip[^\n]*$"):
        start(tiny, name)


def test_other_preprocessing_is_told(tiny, folder, capsys):
    start(tiny, folder)
    assert "note:" not in capsys.readouterr().out
    start(tiny, folder, input__image="hf-siglip", input__text="strip | lower | tokenize")
    out = capsys.readouterr().out
    assert "note: images: trained with" in out and "note: texts: trained with" in out
