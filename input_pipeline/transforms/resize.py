"""Resizes and crops, uint8 in and uint8 out.

Which resize a model was trained with is part of the model: the methods differ by up to 17 levels.
An image that does not allow a step (it is smaller than the crop) raises BadExample, so that
training leaves it out and counts it like one that does not decode.
"""

import math
from collections.abc import Callable

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from input_pipeline.errors import BadExample
from input_pipeline.transforms.decode import MAX_PIXELS


def _cv2(interpolation: int) -> Callable[[np.ndarray, int, int], np.ndarray]:
    def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
        return cv2.resize(image, (width, height), interpolation=interpolation)

    return resize


def _pil(resample: Image.Resampling) -> Callable[[np.ndarray, int, int], np.ndarray]:
    def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
        return np.asarray(Image.fromarray(image).resize((width, height), resample))

    return resize


def bilinear_exact(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bit for bit tf.image.resize(image, (height, width)), clipped and truncated to uint8.

    This is big_vision's resize. It repeats TensorFlow's float32 kernel operation by operation:
    half-pixel centres, no antialias, first along x, then along y.
    """
    top, bottom, y = _neighbours(image.shape[0], height)
    left, right, x = _neighbours(image.shape[1], width)

    def along_x(rows: np.ndarray) -> np.ndarray:
        lines = image.take(rows, axis=0)
        start = lines.take(left, axis=1).astype(np.float32)
        return start + (lines.take(right, axis=1) - start) * x[:, None]

    start = along_x(top)
    # No clipping is needed: weights of 0 to 1 stay between the pixels that they mix.
    return (start + (along_x(bottom) - start) * y[:, None, None]).astype(np.uint8)


def _neighbours(before: int, after: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two old neighbours of each new pixel of an axis, and the weight of the second."""
    scale = np.float32(before) / np.float32(after)
    position = (np.arange(after, dtype=np.float32) + np.float32(0.5)) * scale - np.float32(0.5)
    floor = np.floor(position)
    low = np.maximum(floor, 0).astype(np.int64)
    high = np.minimum(np.ceil(position), before - 1).astype(np.int64)
    return low, high, position - floor


# Pillow's results depend on the installed version: 13.0 changed them for portraits (PR 9549).
METHODS: dict[str, Callable[[np.ndarray, int, int], np.ndarray]] = {
    "bilinear": _cv2(cv2.INTER_LINEAR),  # no antialias; the fastest, within a level of the next
    "bilinear-exact": bilinear_exact,  # no antialias; big_vision's, bit for bit
    "area": _cv2(cv2.INTER_AREA),  # mean over the area of a new pixel; to enlarge: bilinear
    "bilinear-pil": _pil(Image.Resampling.BILINEAR),  # antialias; Hugging Face's SigLIP 2
    "bicubic-pil": _pil(Image.Resampling.BICUBIC),  # antialias; Hugging Face's SigLIP
}


def squash(image: UInt8[np.ndarray, "h w 3"], res: int, method: str) -> UInt8[np.ndarray, "r r 3"]:
    """The whole image as a square of `res` pixels a side, ignoring the aspect ratio."""
    return METHODS[method](image, res, res)


def shorter_side(
    image: UInt8[np.ndarray, "h w 3"], res: int, method: str
) -> UInt8[np.ndarray, "h2 w2 3"]:
    """The image with its shorter side `res`, and int(res * longer / shorter) as in torchvision.

    Raises:
      BadExample: the image is so thin that the result has more than decode.MAX_PIXELS pixels.
    """
    height, width = image.shape[:2]
    shorter, longer = min(height, width), max(height, width)
    longer = int(res * longer / shorter)
    if res * longer > MAX_PIXELS:
        detail = f"{width} x {height} is {res} x {longer} with the shorter side {res}"
        raise BadExample("image too large", detail)
    size = (res, longer) if height <= width else (longer, res)
    return METHODS[method](image, *size)


def center_crop(image: UInt8[np.ndarray, "h w 3"], res: int) -> UInt8[np.ndarray, "r r 3"]:
    """The central square of `res` pixels a side.

    Where the margins cannot be equal, the smaller is on top and left, as in big_vision and Hugging
    Face; torchvision rounds half a pixel to the even number.

    Raises:
      BadExample: the image is smaller.
    """
    down, across = _margins(image, res)
    return _cut(image, down // 2, across // 2, res)


def random_crop(
    image: UInt8[np.ndarray, "h w 3"], rng: np.random.Generator, res: int
) -> UInt8[np.ndarray, "r r 3"]:
    """A square of `res` pixels a side, anywhere in the image.

    Raises:
      BadExample: the image is smaller.
    """
    down, across = _margins(image, res)
    return _cut(image, int(rng.integers(down + 1)), int(rng.integers(across + 1)), res)


def random_resized_crop(
    image: UInt8[np.ndarray, "h w 3"],
    rng: np.random.Generator,
    res: int,
    area: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    method: str = "bilinear",
) -> UInt8[np.ndarray, "r r 3"]:
    """A random rectangle, squashed to `res` pixels a side (Szegedy et al. 2015, arXiv:1409.4842).

    Args:
      area: range of the rectangle's share of the image's area, drawn uniformly.
      ratio: range of width / height, whose logarithm is drawn uniformly.
    """
    height, width = image.shape[:2]
    for _ in range(10):
        pixels = rng.uniform(*area) * height * width
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            return squash(image[top : top + h, left : left + w], res, method)
    return squash(image, res, method)  # too long and thin for such a rectangle


def _margins(image: np.ndarray, res: int) -> tuple[int, int]:
    height, width = image.shape[:2]
    if min(height, width) < res:
        detail = f"{width} x {height} is smaller than the crop of {res} x {res}"
        raise BadExample("unusable image", detail)
    return height - res, width - res


def _cut(image: np.ndarray, top: int, left: int, res: int) -> np.ndarray:
    """The square as a copy: a view would keep the whole image in memory."""
    return image[top : top + res, left : left + res].copy()
