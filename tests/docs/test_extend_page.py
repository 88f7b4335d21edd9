"""docs/extend.md: its examples do what the page says when their line is in the dict."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from evaluators import EVALUATORS
from input_pipeline.sources.contract import Source
from input_pipeline.sources.in_memory import Memory
from input_pipeline.transforms.image_ops import IMAGE_OPS
from input_pipeline.transforms.preprocess import make_preprocess
from input_pipeline.transforms.tokenizer import Bytes
from siglip.losses import LOSSES
from siglip.sharding import make_mesh
from siglip.towers.two_towers import make_model
from trainers.config import complete
from trainers.config.schema import BLOCKS

PAGE = (pathlib.Path(__file__).resolve().parents[2] / "docs" / "extend.md").read_text()
SIZES = {"width": 8, "depth": 1, "mlp_dim": 8, "num_heads": 2}


def example(section: str) -> dict:
    """The names that the code of a section defines."""
    (code,) = re.findall(rf"## {section}\n.*?```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict = {}
    exec(code, names)
    return names


@pytest.fixture
def config_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "def get_config():\n    return {'input': {'source': {'name': 'files', 'path': 'x'}}}\n"
    )
    return str(file)


def test_the_loss_ignores_bad_rows_and_its_option_is_a_key(config_file, monkeypatch):
    make = example("A loss")["make_hinge_loss"]
    monkeypatch.setitem(LOSSES, "hinge", make)
    chosen = [("objectives.contrastive.name", "hinge"), ("objectives.contrastive.margin", "2")]
    assert complete.load(config_file, chosen).objectives.contrastive.margin == 2.0
    zimg, ztxt = jax.random.normal(jax.random.key(0), (2, 4, 3))
    loss, t, b = make(make_mesh(), margin=0.5), jnp.float32(2), jnp.float32(-1)
    mask = jnp.array([True, True, False, True])
    good = jnp.array([0, 1, 3])
    of_good = loss(zimg[good], ztxt[good], t, b, mask[good])
    np.testing.assert_allclose(loss(zimg, ztxt, t, b, mask), of_good, rtol=1e-6)
    assert np.isfinite(jax.grad(loss)(zimg, ztxt, t, None, mask)).all()


def test_the_evaluator_measures_a_model(config_file, monkeypatch):
    evaluator = example("An evaluator")["Evaluator"]
    monkeypatch.setitem(EVALUATORS, "alignment", evaluator)
    chosen = [("evals.mine.type", "alignment"), ("evals.mine.source.name", "scenes")]
    assert complete.load(config_file, chosen).evals.mine.batch_size == 256
    preprocess = make_preprocess(Bytes(), res=8, token_len=8)
    images = np.zeros((3, 8, 8, 3), np.uint8)
    source = Memory(images=images, texts=["a", "b", "c"])
    txt = {"variant": "S", **SIZES, "vocab_size": Bytes().vocab_size}
    model = make_model(img={"variant": "S/4", **SIZES}, txt=txt)
    params = model.init(jax.random.key(0), images[:1], jnp.zeros((1, 8), jnp.int32))["params"]
    mine = evaluator(model, make_mesh(), preprocess, source, None, batch_size=8)
    ((metric, value, chance),) = mine.run(params)
    assert (metric, chance) == ("cosine", 0.0) and -1 <= value <= 1
    assert mine.protocol == "3 pairs (first captions)"


def test_the_source_keeps_the_contract(tmp_path, config_file, monkeypatch):
    folder = example("A source")["Folder"]
    monkeypatch.setitem(BLOCKS["input.source"].of, "folder", folder)  # made of SOURCES
    chosen = [("input.source.name", "folder"), ("input.source.path", str(tmp_path))]
    assert complete.load(config_file, chosen).input.source.suffix == ".jpg"
    Image.new("RGB", (4, 4)).save(tmp_path / "a_red_cat.jpg")
    source = folder(path=str(tmp_path))
    assert isinstance(source, Source) and len(source) == 1
    assert source[0]["texts"] == ["a red cat"] and source[0]["id"] == "a_red_cat.jpg"


def test_the_transform_is_a_step_and_random_in_training_only(monkeypatch):
    monkeypatch.setitem(IMAGE_OPS, "erase", example("A transform")["erase"])
    preprocess = make_preprocess(Bytes(), res=8, image="decode | erase(0.5) | resize")
    white = np.full((8, 8, 3), 255, np.uint8)
    assert (preprocess.image(white) == white).all()
    blanked = (preprocess.image(white, np.random.default_rng(0)) != white).all(axis=-1)
    assert blanked.sum() == 16


def test_every_place_that_the_page_names_has_its_dict():
    for name, place in re.findall(r"\| `(\w+)` in `([\w/.]+\.py)`", PAGE):
        file = pathlib.Path(__file__).resolve().parents[2] / place
        assert re.search(rf"^{name}\b", file.read_text(), re.MULTILINE), (name, place)
