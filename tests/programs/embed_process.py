"""`python -m programs.embed` with a tiny model in the place of a released one; run by
test_embed_program.py, as a program and for its model."""

import functools
import runpy
import sys
import time

import jax
import numpy as np

import siglip
from embedding import store
from input_pipeline.transforms import tokenizer
from input_pipeline.transforms.preprocess import make_preprocess
from siglip.checkpoints.spec import Spec
from siglip.library import Model
from siglip.sharding import local_mesh
from siglip.towers.two_towers import make_model

RES, TOKEN_LEN = 16, 8
SIZES = {"width": 16, "depth": 1, "mlp_dim": 32, "num_heads": 2}
IMG, TXT = {"variant": "mu/8", **SIZES}, {"variant": "mu", "vocab_size": 259, **SIZES}


def load(path, *, seed: int = 0, lacks: str = ""):
    """A model of random parameters, as siglip.load returns one."""
    if path != "tiny":
        raise ValueError(f"there is no checkpoint\n or preset {path!r}")
    spec = Spec(img=None if lacks == "img" else IMG, txt=None if lacks == "txt" else TXT)
    return Model(
        name=path,
        spec=spec,
        module=made(seed)[0],
        params=made(seed)[1],
        preprocess=make_preprocess(tokenizer.Bytes(), res=RES, token_len=TOKEN_LEN),
        mesh=local_mesh(),
        has_tokenizer=lacks != "tokenizer",
    )


@functools.cache
def made(seed: int):
    """(module, its parameters)."""
    module = make_model(img=IMG, txt=TXT)
    inputs = np.zeros((1, RES, RES, 3), np.uint8), np.zeros((1, TOKEN_LEN), np.int32)
    return module, module.init(jax.random.key(seed), *inputs)["params"]


if __name__ == "__main__":
    finish = store.ShardWriter.finish  # it waits long after a shard, for a signal
    store.ShardWriter.finish = lambda self: (finish(self), time.sleep(9999))
    siglip.load = load  # pyright: ignore[reportAttributeAccessIssue]
    sys.argv = ["embed", *sys.argv[1:]]
    runpy.run_module("programs.embed", run_name="__main__", alter_sys=True)
