"""Models of kilobytes, every array random, and what tests do with them all."""

import dataclasses

import numpy as np

from siglip.checkpoints.formats import random_weights
from siglip.checkpoints.spec import Spec
from siglip.checkpoints.weights import Weights

TINY = Spec(
    {"variant": "mu/16", "depth": 3},
    {"variant": "mu", "depth": 2, "vocab_size": 259, "out_dim": 32},
    res=32,
    token_len=16,
    vocab_size=259,
    pad_id=0,
    image="hf-siglip",
    text="lower | tokenize(pad_id=0)",
    tokenizer={"name": "bytes"},
)


def tiny(**changes) -> Weights:
    """Random weights of TINY with other fields."""
    return random_weights.make(dataclasses.replace(TINY, **changes), "tiny")


def arrays(weights: Weights) -> dict[str, tuple]:
    """Everything of the arrays, to compare to the bit."""
    content = {}
    for name, lazy in weights.arrays.items():
        array = lazy.read()
        assert (array.shape, array.dtype) == (lazy.shape, lazy.dtype), name
        content[name] = (str(array.dtype), array.shape, np.ascontiguousarray(array).tobytes())
    return content


def without_paths(spec: Spec) -> Spec:
    """The spec without where its tokenizer lies."""
    block = {k: v for k, v in (spec.tokenizer or {}).items() if k != "path"}
    return dataclasses.replace(spec, tokenizer=block or None)


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def one_line(error) -> str:
    """The message of an exception, which is one line."""
    message = str(error.value)
    assert message and "\n" not in message, message
    return message
