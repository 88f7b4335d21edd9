"""A tiny model, and a source with bad examples and many languages, embedded here or by a process of
its own: python tiny_embed.py OUT KILL KEY=VALUE ..."""

import os
import pathlib
import signal
import sys

import jax.numpy as jnp
import numpy as np

from input_pipeline.errors import BadExample

D, RES, TOKEN_LEN = 8, 4, 6
EXAMPLES, SHARD, BATCH = 53, 20, 8  # three shards, the last one shorter; batches end within them
BAD = {7: "damaged record", 30: "damaged image", 52: "damaged record"}
DESCRIPTION = {"model": "tiny", "preprocessing": {"res": RES}, "source": ["tiny"]}


class Model:
    """zimg is a projection of the pixels, ztxt the mean of rows of a table."""

    def apply(self, variables, image=None, text=None):
        params = variables["params"]
        zimg = ztxt = None
        if image is not None:
            pixels = image.reshape(len(image), -1).astype(jnp.float32)
            zimg = _unit(pixels @ params["img"] + 1)  # zeros embed to something else than zeros
        if text is not None:
            ztxt = _unit(params["table"][text].mean(axis=1))
        return zimg, ztxt, {}


def _unit(z):
    return z / (jnp.linalg.norm(z, axis=-1, keepdims=True) + 1e-8)


class Preprocess:
    def pixels(self, example, rng=None):
        assert rng is None, "an embedding must not be random"
        if isinstance(example["image"], bytes):
            raise BadExample("damaged image", "no image header")
        return {"image": example["image"]}

    def text(self, text):
        ids = list(text.encode())[:TOKEN_LEN]
        return np.array(ids + [0] * (TOKEN_LEN - len(ids)), np.int32)


class Source:
    """Example i has i % 4 texts, in two languages."""

    class_names = ("x", "y")

    def __init__(self, examples=EXAMPLES, bad=BAD):
        self.bad, self.examples = bad, examples

    def __len__(self):
        return self.examples

    def __getitem__(self, i):
        if self.bad.get(i) == "damaged record":
            raise BadExample("damaged record", "checksum", id=f"id {i}", shard="a.tar")
        image = np.random.default_rng(i).integers(0, 256, (RES, RES, 3), np.uint8)
        example = {
            "image": b"no image" if i in self.bad else image,
            "texts": [f"{i} {k} é" for k in range(i % 4)],
            "languages": [("de", "en")[k % 2] for k in range(i % 4)],
            "id": f"id {i}",
        }
        return example | ({"label": i % 2} if i % 3 else {})


def make_params(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "img": rng.normal(size=(RES * RES * 3, D)).astype(np.float32),
        "table": rng.normal(size=(256, D)).astype(np.float32),
    }


def embed(out, **options):
    from embedding.job import embed_source

    seed, source = options.pop("seed", 0), options.pop("source", Source())
    preprocess = options.pop("preprocess", Preprocess())
    options = {"batch_size": BATCH, "shard_rows": SHARD, "max_bad_fraction": 0.1, **options}
    options = {"description": DESCRIPTION, "progress": lambda line: None, **options}
    return embed_source(Model(), make_params(seed), preprocess, source, out, **options)


def files(out):
    """Name -> bytes of what a run leaves; nothing temporary may be there."""
    contents = {path.name: path.read_bytes() for path in pathlib.Path(out).iterdir()}
    assert not [name for name in contents if name.endswith(".part")], sorted(contents)
    contents.pop(".lock", None)
    return contents


def kill_at(call: str, count: int):
    """SIGKILL to this process before the count-th call of os.replace, os.fsync or, of embeddings,
    append."""
    from embedding import store

    owner, name = (store._GrowingNpy, "append") if call == "append" else (os, call)
    original, calls = getattr(owner, name), [0]

    def counted(*args, **options):
        calls[0] += 1
        if calls[0] == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **options)

    setattr(owner, name, counted)


if __name__ == "__main__":
    out, kill, *words = sys.argv[1:]
    if kill != "never":
        kill_at(kill.partition(":")[0], int(kill.partition(":")[2]))
    embed(out, **{key: int(value) for key, value in (word.split("=") for word in words)})
