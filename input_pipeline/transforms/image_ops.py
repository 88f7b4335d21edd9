"""Steps of config.input.image: plain functions from an image to an image.

Each takes the image and `at`: the side of the model's images, and in training a generator. Without
one (evaluation) what is random does nothing, or what comes nearest to it.
"""

import dataclasses
from typing import Any

import numpy as np

from input_pipeline.errors import BadExample
from input_pipeline.transforms import augment, naflex, resize
from input_pipeline.transforms import decode as files


@dataclasses.dataclass(frozen=True)
class At:
    """Where a step is taken.

    Attributes:
      res: side of the model's images, in pixels (config.input.res).
      rng: draws of this example, in training; None in evaluation.
    """

    res: int
    rng: np.random.Generator | None = None


def decode(image: bytes | np.ndarray, at: At, *, shrink: int = 0) -> np.ndarray:
    """Bytes -> pixels. shrink: a large JPEG is decoded at 1/2, 1/4 or 1/8 of its size as long as
    both sides keep at least so many pixels; much faster, and not the same pixels. 0: never."""
    return files.decode(image, _at_least(0, shrink=shrink))


def squash(image: np.ndarray, at: At, *, method: str = "bilinear") -> np.ndarray:
    """To res x res whatever the aspect ratio, as the released models were trained."""
    return resize.squash(image, at.res, _method(method))


def shorter_side(
    image: np.ndarray, at: At, *, size: int = 0, method: str = "bilinear"
) -> np.ndarray:
    """The aspect ratio stays, the shorter side becomes `size` (0: res)."""
    return resize.shorter_side(image, _at_least(0, size=size) or at.res, _method(method))


def center_crop(image: np.ndarray, at: At) -> np.ndarray:
    """The middle res x res."""
    return resize.center_crop(image, at.res)


def random_crop(image: np.ndarray, at: At) -> np.ndarray:
    """Any res x res; in evaluation the middle one."""
    if at.rng is None:
        return resize.center_crop(image, at.res)
    return resize.random_crop(image, at.rng, at.res)


def random_resized_crop(
    image: np.ndarray,
    at: At,
    *,
    area: tuple = (0.08, 1.0),
    ratio: tuple = (3 / 4, 4 / 3),
    method: str = "bilinear",
) -> np.ndarray:
    """A random rectangle of a share of the area and an aspect ratio between these, to res x res
    (Szegedy et al. 2015, arXiv:1409.4842); in evaluation all of the image."""
    for name, (low, high), most in (("area", area, 1.0), ("ratio", ratio, np.inf)):
        if not 0 < low <= high <= most:
            raise ValueError(f"{name}={(low, high)} must be (low, high), above 0")
    if at.rng is None:
        return resize.squash(image, at.res, _method(method))
    return resize.random_resized_crop(image, at.rng, at.res, area, ratio, _method(method))


def flip(image: np.ndarray, at: At) -> np.ndarray:
    """Every second image mirrored. Captions that say left or right become wrong."""
    return image if at.rng is None else augment.flip(image, at.rng)


def color_jitter(
    image: np.ndarray,
    at: At,
    *,
    brightness: float = 0.4,
    contrast: float = 0.4,
    saturation: float = 0.4,
    hue: float = 0.0,
) -> np.ndarray:
    """Brightness, contrast and saturation times 1 - x to 1 + x, hue by up to `hue` of a turn."""
    if at.rng is None:
        return image
    return augment.color_jitter(image, at.rng, brightness, contrast, saturation, hue)


def rand_augment(image: np.ndarray, at: At, *, layers: int = 2, magnitude: int = 10) -> np.ndarray:
    """RandAugment (arXiv:1909.13719)."""
    return image if at.rng is None else augment.rand_augment(image, at.rng, layers, magnitude)


def to_patches(
    image: np.ndarray,
    at: At,
    *,
    max_patches: int = 256,
    patch_size: int = 16,
    method: str = "bilinear-pil",
) -> dict[str, Any]:
    """NaFlex: keeps the aspect ratio, to at most max_patches patches (SigLIP 2, arXiv:2502.14786).

    image: uint8 [max_patches, patch_size ** 2 * 3], image_mask: bool [max_patches] (False: filled
    up), image_shape: int32 [2] (rows and columns of patches).
    """
    _at_least(1, max_patches=max_patches, patch_size=patch_size)
    sized = naflex.resize_to_budget(image, patch_size, max_patches, _method(method))
    patches, mask, shape = naflex.patchify(sized, patch_size, max_patches)
    return {"image": patches, "image_mask": mask, "image_shape": shape}


def embedding(image: bytes | np.ndarray, at: At) -> np.ndarray:
    """What a frozen tower made of the image, floats [d] -> float32 [d]: the only step of images of
    a model whose tower is precomputed."""
    if isinstance(image, bytes) and not image:
        raise BadExample("no image", "the embedding is missing")
    if not isinstance(image, np.ndarray) or image.ndim != 1 or image.dtype.kind != "f":
        is_array = isinstance(image, np.ndarray)
        told = f"{image.dtype}{[*image.shape]}" if is_array else type(image).__name__
        raise BadExample("unusable image", f"an embedding must be floats [d], not {told}")
    with np.errstate(over="ignore"):  # what float32 cannot hold is refused below
        made = image.astype(np.float32)
    if not np.isfinite(made).all():
        raise BadExample("unusable image", "an embedding must be finite")
    return made


def _at_least(least: int, **option: int) -> int:
    value = 0
    for name, value in option.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name}={value!r} is no whole number from {least} on")
    return value


def _method(name: str) -> str:
    if name not in resize.METHODS:
        raise ValueError(f"method={name!r} is none of {', '.join(resize.METHODS)}")
    return name


IMAGE_OPS = {
    "decode": decode,
    "resize": squash,
    "shorter_side": shorter_side,
    "center_crop": center_crop,
    "random_crop": random_crop,
    "random_resized_crop": random_resized_crop,
    "flip": flip,
    "color_jitter": color_jitter,
    "rand_augment": rand_augment,
    "naflex": to_patches,
    "embedding": embedding,
}

# What released models were trained or are served with, to the pixel. A name of these stands for
# its steps; to augment, write the steps out.
PRESETS = {
    "big_vision": "decode | resize('bilinear-exact')",
    "hf-siglip": "decode | resize('bicubic-pil')",
    "hf-siglip2": "decode | resize('bilinear-pil')",
    "hf-naflex": "decode | naflex(method='bilinear-pil')",
}
