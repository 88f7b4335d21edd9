"""Models with random weights, for trying things out without a download."""

import dataclasses
import zlib

import numpy as np

from siglip import presets
from siglip.checkpoints import spec
from siglip.checkpoints.errors import CheckpointError
from siglip.checkpoints.files.lazy_array import LazyArray
from siglip.checkpoints.spec import Spec
from siglip.checkpoints.weights import Weights

PREFIX, SMALL = "random:", ":small"


def read(name: str) -> Weights:
    """The model 'random:siglip-b16-224'; 'random:siglip-b16-224:small' has towers of one narrow
    layer.

    Every array is random, biases and scales too, so that no comparison holds trivially. The same
    name gives the same arrays.

    Raises:
      CheckpointError: there is no released model of that name.
    """
    return make(read_contract(name), name)


def read_contract(name: str) -> Spec:
    """The contract of the model that `read` gives.

    Raises:
      CheckpointError: there is no released model of that name.
    """
    preset = name.removeprefix(PREFIX).removesuffix(SMALL)
    try:
        contract = spec.of_preset(presets.find(preset))
    except ValueError as error:
        raise CheckpointError(f"{name}: {error} ('{SMALL}' may follow)") from None
    return shrink(contract) if name.endswith(SMALL) else contract


def shrink(contract: Spec) -> Spec:
    """The contract of towers of one narrow layer that take the same images and texts."""
    assert contract.img is not None and contract.txt is not None
    img = {**contract.img, "variant": "mu/" + contract.img["variant"].partition("/")[2]}
    out_dim = contract.txt["out_dim"] and 32
    txt = {**contract.txt, "variant": "mu", "out_dim": out_dim}
    return dataclasses.replace(contract, img=img, txt=txt, preset="")


def make(contract: Spec, source: str = "random") -> Weights:
    """Random arrays of a model; those of another `source` are others."""
    arrays = {}
    for name, shape in contract.shapes().items():

        def sample(name: str = name, shape: tuple[int, ...] = shape) -> np.ndarray:
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

        arrays[name] = LazyArray(shape, np.dtype(np.float32), f"{source}: {name}", sample)
    return Weights(arrays, contract, source, "random")
