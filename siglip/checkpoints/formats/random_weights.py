"""Models with random weights, for trying things out without a download."""

import dataclasses
import zlib

import numpy as np

from siglip import presets
from siglip.checkpoints import spec
from siglip.checkpoints.errors import CheckpointError
from siglip.checkpoints.files.lazy_array import Leaf
from siglip.checkpoints.weights import Weights

PREFIX, SMALL = "random:", ":small"


def read(name: str) -> Weights:
    """'random:siglip-b16-224', or 'random:siglip-b16-224:small' with towers of one narrow layer.

    Every array is random, biases and scales too, so that nothing of a comparison is trivially
    right. The same name gives the same arrays.
    """
    preset = name.removeprefix(PREFIX).removesuffix(SMALL)
    try:
        made = spec.of_preset(presets.find(preset))
    except ValueError as error:
        raise CheckpointError(f"{name}: {error} ('{SMALL}' may follow)") from None
    return make(shrink(made) if name.endswith(SMALL) else made, name)


def shrink(made: spec.Spec) -> spec.Spec:
    """The same inputs to towers of one narrow layer."""
    assert made.img is not None and made.txt is not None
    img = {**made.img, "variant": "mu/" + made.img["variant"].partition("/")[2]}
    out_dim = made.txt["out_dim"] and 32
    txt = {**made.txt, "variant": "mu", "out_dim": out_dim}
    return dataclasses.replace(made, img=img, txt=txt, preset="")


def make(made: spec.Spec, source: str = "random") -> Weights:
    """Random arrays of a model."""
    leaves = {}
    for name, shape in made.shapes().items():

        def array(name: str = name, shape: tuple[int, ...] = shape) -> np.ndarray:
            rng = np.random.default_rng(zlib.crc32(f"{source} {name}".encode()))
            noise = rng.standard_normal(shape, np.float32)
            last = name.rpartition("/")[2]
            if last in ("t", "b"):  # as in released models
                return (noise * 0.01 + {"t": 4.7, "b": -12.7}[last]).astype(np.float32)
            if last == "scale":
                return 1 + np.float32(0.1) * noise
            if last == "bias":
                return np.float32(0.1) * noise
            if last in ("embedding", "pos_embedding", "probe", "cls"):
                return noise * np.float32(shape[-1] ** -0.5)
            fan_in = np.prod(shape[:-1]) if "/out/" in name or len(shape) != 3 else shape[0]
            return noise * np.float32(fan_in**-0.5)

        leaves[name] = Leaf(shape, np.dtype(np.float32), f"{source}: {name}", array)
    return Weights(leaves, made, source, "random")
