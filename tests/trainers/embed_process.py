"""`python -m trainers.embed` with a tiny model in the place of a released one; run by
test_embed_program.py, as a program and for its model."""

import runpy
import sys
import time
import types

import jax
import numpy as np

import siglip
from evaluators import embedding_store
from input_pipeline import tokenizers
from input_pipeline.transforms import make_preprocess
from siglip.two_towers import make_model

RES, TOKEN_LEN = 16, 8


def load(path, *, seed: int = 0, slow: float = 0.0):
    """A model of random parameters, as siglip.load returns one. slow: seconds after each shard."""
    if path != "tiny":
        raise ValueError(f"there is no checkpoint\n or preset {path!r}")
    preprocess = make_preprocess(
        tokenizers.Bytes(), res=RES, token_len=TOKEN_LEN, image="decode | resize"
    )
    if slow:
        finish = embedding_store.Writer.finish
        embedding_store.Writer.finish = lambda self: (finish(self), time.sleep(slow))
    sizes = {"width": 16, "depth": 1, "mlp_dim": 32, "num_heads": 2}
    module = make_model(
        img={"variant": "mu/8", **sizes}, txt={"variant": "mu", "vocab_size": 259, **sizes}
    )
    inputs = np.zeros((1, RES, RES, 3), np.uint8), np.zeros((1, TOKEN_LEN), np.int32)
    params = module.init(jax.random.key(seed), *inputs)["params"]
    return types.SimpleNamespace(module=module, params=params, preprocess=preprocess, name=path)


if __name__ == "__main__":
    siglip.load = load  # pyright: ignore[reportAttributeAccessIssue]
    sys.argv = ["embed", *sys.argv[1:]]
    runpy.run_module("trainers.embed", run_name="__main__", alter_sys=True)
