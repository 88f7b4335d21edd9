"""Sizes, patches and masks of NaFlex; test_processor_parity.py compares them with Hugging Face."""

import hashlib

import numpy as np
import pytest
from PIL import Image

from input_pipeline.transforms.naflex import patchify, resize_to_budget, target_size


def noise(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("given", "size"),
    [
        ((480, 640, 16, 256), (224, 288)),
        ((640, 480, 16, 256), (288, 224)),
        ((224, 224, 16, 196), (224, 224)),
        ((1, 1, 16, 256), (112, 112)),  # enlarged 100 times, not to the budget
        ((1, 5000, 16, 256), (16, 4096)),
        ((3000, 20, 14, 100), (1400, 14)),
        ((768, 1024, 16, 1024), (432, 576)),
        ((333, 500, 16, 128), (144, 224)),
        ((9, 9, 16, 1), (16, 16)),
        ((100, 101, 14, 729), (378, 378)),
        ((60_000, 60_000, 16, 1), (16, 16)),
    ],
)
def test_target_size_is_known(given, size):
    assert target_size(*given) == size


def test_target_size_is_hugging_faces():
    """SHA-256 of get_image_size_for_max_num_patches of transformers 5.23.0, 2000 sizes."""
    sides = np.exp(np.random.default_rng(0).uniform(0, np.log(5000), (2000, 2))).astype(int)
    sizes = [
        target_size(int(h), int(w), (14, 16, 32)[i % 3], (64, 128, 256, 576, 784, 1024)[i % 6])
        for i, (h, w) in enumerate(sides)
    ]
    digest = hashlib.sha256(np.array(sizes, np.int32).tobytes()).hexdigest()
    assert digest.startswith("0615789b63842abb")


def test_sequences_are_at_most_a_patch_from_the_images_aspect_ratio():
    for h, w in np.random.default_rng(0).integers(50, 3000, (300, 2)):
        height, width = target_size(int(h), int(w), 16, 256)
        assert height % 16 == width % 16 == 0 and height * width <= 256 * 16 * 16
        # The greatest scale that leaves each side within its last patch, for both sides.
        assert (height - 16) / h < width / w and (width - 16) / w < height / h


def test_resize_to_budget_is_the_processors_resize_to_the_target_size():
    image = noise(48, 80)
    across = target_size(48, 80, 16, 64)[::-1]
    expected = Image.fromarray(image).resize(across, Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(resize_to_budget(image, 16, 64), np.asarray(expected))
    other = Image.fromarray(image).resize(across, Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(resize_to_budget(image, 16, 64, "bicubic-pil"), np.asarray(other))


def test_patches_go_row_by_row_and_the_rest_is_masked_zeros():
    image, p = noise(6, 8) | 1, 2  # no zeros of its own
    patches, mask, shape = patchify(image, p, 15)
    assert (patches.dtype, mask.dtype, shape.dtype) == (np.uint8, np.bool_, np.int32)
    assert patches.shape == (15, p * p * 3) and shape.tolist() == [3, 4]
    for i in range(12):
        row, column = divmod(i, 4)
        patch = image[row * p : (row + 1) * p, column * p : (column + 1) * p]
        np.testing.assert_array_equal(patches[i].reshape(p, p, 3), patch)
    assert mask.tolist() == [True] * 12 + [False] * 3 and not patches[12:].any()
    assert patchify(image, p, 12)[1].all()


@pytest.mark.parametrize("size", [(6, 9), (7, 8), (6, 10), (0, 8)])
def test_what_is_no_sequence_of_patches_is_refused(size):
    message = rf"{size[1]} x {size[0]} pixels are not 1 to 12 whole patches of 2 x 2; resize_to"
    with pytest.raises(ValueError, match=message):
        patchify(noise(*size), 2, 12)
