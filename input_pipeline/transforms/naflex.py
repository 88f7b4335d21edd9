"""Images of any aspect ratio as a sequence of patches: the input of SigLIP 2 NaFlex models.

arXiv:2502.14786, section 2.4.2. Sizes and patches equal Hugging Face's Siglip2ImageProcessor.
"""

import math

import numpy as np
from jaxtyping import Bool, Int32, UInt8

from input_pipeline.transforms.resize import METHODS


def target_size(height: int, width: int, patch_size: int, max_patches: int) -> tuple[int, int]:
    """(height, width) in pixels: multiples of patch_size, with at most max_patches patches.

    It takes the largest scale of the image whose sides, rounded up to whole patches, fit; small
    images are enlarged, up to 100 times. Patch counts jump with the scale, so the bisection is in
    float64, operation by operation as in Hugging Face's get_image_size_for_max_num_patches.

    In big_vision, position embeddings are NaN beyond 64 patches a side, which an image with an
    aspect ratio above 64 ** 2 / max_patches can reach.
    """

    def patches(side: int, scale: float) -> int:
        return max(1, math.ceil(side * scale / patch_size))

    fits, exceeds = 1e-6, 100.0
    while exceeds - fits >= 1e-5:
        scale = (fits + exceeds) / 2
        if patches(height, scale) * patches(width, scale) <= max_patches:
            fits = scale
        else:
            exceeds = scale
    return patches(height, fits) * patch_size, patches(width, fits) * patch_size


def resize_to_budget(
    image: UInt8[np.ndarray, "h w 3"],
    patch_size: int,
    max_patches: int,
    method: str = "bilinear-pil",
) -> UInt8[np.ndarray, "h2 w2 3"]:
    """The image resized to its target_size, by a method of resize.METHODS."""
    height, width = target_size(image.shape[0], image.shape[1], patch_size, max_patches)
    return METHODS[method](image, height, width)


def patchify(
    image: UInt8[np.ndarray, "h w 3"], patch_size: int, max_patches: int
) -> tuple[
    UInt8[np.ndarray, "max_patches values"],
    Bool[np.ndarray, " max_patches"],
    Int32[np.ndarray, "2"],
]:
    """Patches, mask (True: a patch of the image) and shape (rows, columns of patches).

    Patches are ordered row by row; the patch_size * patch_size * 3 values of each by row, column
    and channel. Padding is zeros: black, once normalized to [-1, 1]. Hugging Face's processor pads
    after normalizing, so its padding is gray; the mask hides both.

    Raises:
      ValueError: the image is not a whole number of patches, or more than max_patches.
    """
    (rows, more_y), (columns, more_x) = (divmod(side, patch_size) for side in image.shape[:2])
    n = rows * columns
    if more_y or more_x or not 0 < n <= max_patches:
        raise ValueError(
            f"{image.shape[1]} x {image.shape[0]} pixels are not 1 to {max_patches} whole patches "
            f"of {patch_size} x {patch_size}; resize_to_budget first"
        )
    patches = np.zeros((max_patches, patch_size * patch_size * 3), np.uint8)
    grid = image.reshape(rows, patch_size, columns, patch_size, 3).swapaxes(1, 2)
    patches[:n] = grid.reshape(n, -1)
    return patches, np.arange(max_patches) < n, np.array([rows, columns], np.int32)
