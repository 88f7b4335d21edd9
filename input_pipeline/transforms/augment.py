"""Random changes of an image, uint8 in and out, of the same size; a function of the rng.

They use PIL, by whose operations the papers define theirs. Captions do not change along: one that
names a side or a colour may become wrong.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageEnhance, ImageOps

Pixels = UInt8[np.ndarray, "h w 3"]


def flip(image: Pixels, rng: np.random.Generator) -> Pixels:
    """The image, mirrored left to right with probability 1/2."""
    return np.ascontiguousarray(image[:, ::-1]) if rng.random() < 0.5 else image


def color_jitter(
    image: Pixels,
    rng: np.random.Generator,
    brightness: float = 0.4,
    contrast: float = 0.4,
    saturation: float = 0.4,
    hue: float = 0.0,
) -> Pixels:
    """The image with changed colours, as by torchvision's ColorJitter.

    Brightness, contrast and saturation are multiplied by 1 - x to 1 + x (not below 0), hue is
    turned by -x to x (at most 0.5, half the colour circle), in random order.

    Raises:
      ValueError: an argument below 0, or hue above 0.5.
    """
    if min(brightness, contrast, saturation, hue) < 0 or hue > 0.5:
        raise ValueError("brightness, contrast, saturation must be 0 or more, hue 0 to 0.5")
    changes: list[tuple[Callable[[Image.Image, float], Image.Image], float]] = [
        (enhance, rng.uniform(max(0.0, 1 - strength), 1 + strength))
        for enhance, strength in (
            (_brightness, brightness),
            (_contrast, contrast),
            (_color, saturation),
        )
    ]
    changes.append((_turn_hue, rng.uniform(-hue, hue)))
    changed = Image.fromarray(image)
    for i in rng.permutation(4):
        change, amount = changes[i]
        changed = change(changed, amount)
    return np.asarray(changed)


def rand_augment(
    image: Pixels, rng: np.random.Generator, layers: int = 2, magnitude: float = 10
) -> Pixels:
    """The image after `layers` of the 14 OPS, drawn with repetition: RandAugment.

    Cubuk et al., arXiv:1909.13719. The strength of an op grows with the magnitude, from 0, no
    change, to 10, the end of the range that AutoAugment gives it (arXiv:1805.09501, table 6); the
    signs are random. torchvision does the same. big_vision's randaug differs: it has 16 ops,
    Posterize and Solarize are weakest at 10, and the factors of Color, Contrast, Brightness and
    Sharpness go from 0.1 at 0 to 1.9 at 10.

    Raises:
      ValueError: a magnitude outside of 0 to 10.
    """
    if not 0 <= magnitude <= 10:
        raise ValueError(f"magnitude={magnitude} must be 0 to 10")
    changed = Image.fromarray(image)
    for i in rng.integers(len(OPS), size=layers):
        changed = OPS[i](changed, magnitude / 10 * rng.choice((-1.0, 1.0)))
    return np.asarray(changed)


def _brightness(image: Image.Image, factor: float) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(factor)


def _contrast(image: Image.Image, factor: float) -> Image.Image:
    return ImageEnhance.Contrast(image).enhance(factor)


def _color(image: Image.Image, factor: float) -> Image.Image:
    return ImageEnhance.Color(image).enhance(factor)


def _sharpness(image: Image.Image, factor: float) -> Image.Image:
    return ImageEnhance.Sharpness(image).enhance(factor)


def _turn_hue(image: Image.Image, turn: float) -> Image.Image:
    steps = round(256 * turn)
    if not steps:
        return image  # converting to HSV and back would change some pixels
    hue, saturation, value = image.convert("HSV").split()
    hue = hue.point([(h + steps) % 256 for h in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


def _affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    return image.transform(
        image.size,
        Image.Transform.AFFINE,
        matrix,
        Image.Resampling.BILINEAR,
        fillcolor=(128, 128, 128),
    )


# (image, strength from -1 to 1) -> image; ops without two directions ignore the sign.
OPS: tuple[Callable[[Image.Image, float], Image.Image], ...] = (
    lambda image, s: image,
    lambda image, s: ImageOps.autocontrast(image),
    lambda image, s: ImageOps.equalize(image),
    lambda image, s: image.rotate(30 * s, Image.Resampling.BILINEAR, fillcolor=(128, 128, 128)),
    lambda image, s: ImageOps.solarize(image, round(256 * (1 - abs(s)))),
    lambda image, s: _color(image, 1 + 0.9 * s),
    lambda image, s: ImageOps.posterize(image, 8 - round(4 * abs(s))),
    lambda image, s: _contrast(image, 1 + 0.9 * s),
    lambda image, s: _brightness(image, 1 + 0.9 * s),
    lambda image, s: _sharpness(image, 1 + 0.9 * s),
    lambda image, s: _affine(image, (1, 0.3 * s, 0, 0, 1, 0)),  # shear along x
    lambda image, s: _affine(image, (1, 0, 0, 0.3 * s, 1, 0)),  # shear along y
    # Shifts along x and y: by up to 150 of AutoAugment's 331 pixels.
    lambda image, s: _affine(image, (1, 0, 150 / 331 * s * image.width, 0, 1, 0)),
    lambda image, s: _affine(image, (1, 0, 0, 0, 1, 150 / 331 * s * image.height)),
)
