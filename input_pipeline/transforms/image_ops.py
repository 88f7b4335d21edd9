"""Steps of config.input.image: plain functions (image, context, *, options) -> image.

In training the context has a random generator. In evaluation it has none: random steps then do
nothing, or the nearest deterministic thing, such as the centre crop.
"""

import dataclasses
from typing import Any

import numpy as np

from input_pipeline.errors import BadExample
from input_pipeline.transforms import augment, naflex, resize
from input_pipeline.transforms import decode as image_files


@dataclasses.dataclass(frozen=True)
class ImageContext:
    """What a step knows beside the image.

    Attributes:
      res: side of the model's images, in pixels (config.input.res).
      rng: random generator of this example in training; None in evaluation.
    """

    res: int
    rng: np.random.Generator | None = None


def decode(image: bytes | np.ndarray, context: ImageContext, *, shrink: int = 0) -> np.ndarray:
    """Decodes bytes to pixels. shrink: decode a large JPEG at 1/2, 1/4 or 1/8 of its size as long
    as both sides keep at least this many pixels; much faster, but other pixels. 0: never."""
    _check_at_least(0, shrink=shrink)
    return image_files.decode(image, shrink)


def squash(image: np.ndarray, context: ImageContext, *, method: str = "bilinear") -> np.ndarray:
    """Resizes to res x res, ignoring the aspect ratio, as the released models were trained."""
    return resize.squash(image, context.res, _known_method(method))


def shorter_side(
    image: np.ndarray, context: ImageContext, *, size: int = 0, method: str = "bilinear"
) -> np.ndarray:
    """Resizes so that the shorter side is `size` (0: res), keeping the aspect ratio."""
    _check_at_least(0, size=size)
    return resize.shorter_side(image, size or context.res, _known_method(method))


def center_crop(image: np.ndarray, context: ImageContext) -> np.ndarray:
    """Crops the central res x res."""
    return resize.center_crop(image, context.res)


def random_crop(image: np.ndarray, context: ImageContext) -> np.ndarray:
    """Crops a random res x res; in evaluation the central one."""
    if context.rng is None:
        return resize.center_crop(image, context.res)
    return resize.random_crop(image, context.rng, context.res)


def random_resized_crop(
    image: np.ndarray,
    context: ImageContext,
    *,
    area: tuple = (0.08, 1.0),
    ratio: tuple = (3 / 4, 4 / 3),
    method: str = "bilinear",
) -> np.ndarray:
    """Resizes a random rectangle to res x res, with a share of the image's area and an aspect ratio
    in these ranges (Szegedy et al. 2015, arXiv:1409.4842); in evaluation the whole image."""
    for name, (low, high), limit in (("area", area, 1.0), ("ratio", ratio, np.inf)):
        if not 0 < low <= high <= limit:
            raise ValueError(f"{name}={(low, high)} must be (low, high), above 0")
    if context.rng is None:
        return resize.squash(image, context.res, _known_method(method))
    return resize.random_resized_crop(
        image, context.rng, context.res, area, ratio, _known_method(method)
    )


def flip(image: np.ndarray, context: ImageContext) -> np.ndarray:
    """Mirrors every second image, at random. Captions that say left or right become wrong."""
    return image if context.rng is None else augment.flip(image, context.rng)


def color_jitter(
    image: np.ndarray,
    context: ImageContext,
    *,
    brightness: float = 0.4,
    contrast: float = 0.4,
    saturation: float = 0.4,
    hue: float = 0.0,
) -> np.ndarray:
    """Scales brightness, contrast and saturation by 1 - x to 1 + x, turns hue by up to `hue`."""
    if context.rng is None:
        return image
    return augment.color_jitter(image, context.rng, brightness, contrast, saturation, hue)


def rand_augment(
    image: np.ndarray, context: ImageContext, *, layers: int = 2, magnitude: int = 10
) -> np.ndarray:
    """Applies `layers` random changes of this magnitude: RandAugment (arXiv:1909.13719)."""
    return (
        image
        if context.rng is None
        else augment.rand_augment(image, context.rng, layers, magnitude)
    )


def to_patches(
    image: np.ndarray,
    context: ImageContext,
    *,
    max_patches: int = 256,
    patch_size: int = 16,
    method: str = "bilinear-pil",
) -> dict[str, Any]:
    """NaFlex: at most max_patches patches, with the aspect ratio kept (SigLIP 2, arXiv:2502.14786).

    Returns image: uint8 [max_patches, patch_size ** 2 * 3], image_mask: bool [max_patches] (False:
    padding), image_shape: int32 [2] (rows and columns of patches).
    """
    _check_at_least(1, max_patches=max_patches, patch_size=patch_size)
    resized = naflex.resize_to_budget(image, patch_size, max_patches, _known_method(method))
    patches, mask, shape = naflex.patchify(resized, patch_size, max_patches)
    return {"image": patches, "image_mask": mask, "image_shape": shape}


def embedding(image: bytes | np.ndarray, context: ImageContext) -> np.ndarray:
    """Checks an embedding by a frozen tower, floats [d] -> float32 [d]. It is the only step for a
    model whose image tower is precomputed."""
    if isinstance(image, bytes) and not image:
        raise BadExample("no image", "the embedding is missing")
    if not isinstance(image, np.ndarray) or image.ndim != 1 or image.dtype.kind != "f":
        is_array = isinstance(image, np.ndarray)
        kind = f"{image.dtype}{[*image.shape]}" if is_array else type(image).__name__
        raise BadExample("unusable image", f"an embedding must be floats [d], not {kind}")
    with np.errstate(over="ignore"):  # overflow becomes inf, which is refused below
        values = image.astype(np.float32)
    if not np.isfinite(values).all():
        raise BadExample("unusable image", "an embedding must be finite")
    return values


def _check_at_least(minimum: int, **options: int) -> None:
    for name, value in options.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise ValueError(f"{name}={value!r} is no whole number from {minimum} on")


def _known_method(name: str) -> str:
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

# Preprocessing of released models, equal to the pixel. A preset's name stands for its steps; to
# augment, write the steps out.
PRESETS = {
    "big_vision": "decode | resize('bilinear-exact')",
    "hf-siglip": "decode | resize('bicubic-pil')",
    "hf-siglip2": "decode | resize('bilinear-pil')",
    "hf-naflex": "decode | naflex(method='bilinear-pil')",
}
