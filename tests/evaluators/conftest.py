"""A model, a preprocessing and a source small enough to know every answer by hand."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from input_pipeline.errors import BadExample

D = 4  # width of the embeddings
TOKEN_LEN = 3


class FakeModel:
    """An image is its first D bytes; a text is the row of the table of its first byte."""

    def __init__(self, b=-1.0):
        self.b = b

    def apply(self, variables, image=None, text=None, train=False):
        params = variables["params"]
        zimg = ztxt = None
        if image is not None:
            zimg = _unit(image.reshape(len(image), -1)[:, :D].astype(jnp.float32) @ params["img"])
        if text is not None:
            ztxt = _unit(params["table"][text[:, 0]])
        b = None if self.b is None else jnp.float32(self.b)
        return zimg, ztxt, {"t": jnp.exp(params["t"]), "b": b}


def _unit(z):
    return z / (jnp.linalg.norm(z, axis=-1, keepdims=True) + 1e-8)


class FakePreprocess:
    def image(self, image, rng=None):
        assert rng is None, "evaluation must not augment"
        if isinstance(image, bytes):
            raise BadExample("damaged image", "no image header")
        return image

    def pixels(self, example, rng=None):
        return {"image": self.image(example["image"], rng)}

    def text(self, text):
        ids = list(text.lower().encode())[:TOKEN_LEN]
        return np.array(ids + [0] * (TOKEN_LEN - len(ids)), np.int32)


class FakeSource(list):
    class_names = None


def make_image(vector):
    image = np.zeros(2 * 2 * 3, np.uint8)
    image[: len(vector)] = vector
    return image.reshape(2, 2, 3)


def make_mesh(data, fsdp=1):
    devices = jax.devices()[: data * fsdp]
    axes = (AxisType.Auto,) * 2
    return jax.make_mesh((data, fsdp), ("data", "fsdp"), axis_types=axes, devices=devices)


def make_source(images, texts, labels=None, class_names=None):
    """images: vectors of at most D bytes; texts: a list of texts for each."""
    source = FakeSource(
        {"image": make_image(v), "texts": list(t), "id": f"image {i}"}
        for i, (v, t) in enumerate(zip(images, texts))
    )
    for example, label in zip(source, labels if labels is not None else []):
        example["label"] = label
    source.class_names = class_names
    return source


def make_params(table=None, img=None, t=0.0):
    """table: {character: vector}; other characters get fixed random vectors."""
    rows = np.random.default_rng(0).normal(size=(256, D)).astype(np.float32)
    for character, vector in (table or {}).items():
        rows[ord(character)] = vector
    img = np.eye(D, dtype=np.float32) if img is None else np.asarray(img, np.float32)
    return {"table": rows, "img": img, "t": np.float32(t)}


def random_source(n, seed=0, classes=3):
    """n images with 1 to 3 one-letter texts and a label."""
    rng = np.random.default_rng(seed)
    texts = [[chr(c) for c in rng.integers(97, 123, rng.integers(1, 4))] for _ in range(n)]
    labels = [int(x) for x in rng.integers(0, classes, n)]
    names = [chr(65 + i) for i in range(classes)]
    return make_source(rng.integers(0, 256, (n, D)), texts, labels, names)


def fakes_namespace():
    return types.SimpleNamespace(
        Model=FakeModel,
        Preprocess=FakePreprocess,
        image=make_image,
        mesh=make_mesh,
        source=make_source,
        params=make_params,
        random_source=random_source,
    )


@pytest.fixture
def fakes():
    return fakes_namespace()
