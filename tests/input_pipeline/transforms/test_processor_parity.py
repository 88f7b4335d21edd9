"""Pixels equal to those of the installed transformers' image processors.

Exact against their PIL backend, which transformers has without PyTorch: uint8 before the rescale
and normalization, and after them within a rounding of x / 127.5 - 1. Against the torchvision
backend, which is the default where torchvision is installed, within two levels.

"The PIL backend" is of the installed Pillow: since 13.0 (Pillow PR 9549) a resize that takes off
much more of the height than of the width, as the squash of a 3:2 portrait does, goes along y first;
measured on noise, up to 7 levels (bicubic) from what older versions give.
"""

import functools

import numpy as np
import pytest

from input_pipeline.transforms import naflex, resize

transformers = pytest.importorskip(
    "transformers", "5.0", reason="the processors to compare with; pip install 'transformers>=5'"
)

RAW = dict(do_rescale=False, do_normalize=False, input_data_format="channels_last")
FIXED = {"bicubic-pil": 3, "bilinear-pil": 2}  # SigLIP, SigLIP 2: their `resample`
SIZES = [(480, 640), (640, 427), (224, 224), (16, 16), (31, 500), (1, 40), (40, 1), (720, 1280)]
BUDGETS = [(16, 256), (16, 64), (14, 729), (16, 1024), (32, 49), (16, 1)]


@functools.cache
def images():
    """Noise and something smooth of each size."""
    rng, made = np.random.default_rng(0), []
    for height, width in SIZES:
        made.append(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        y, x = np.mgrid[:height, :width]
        smooth = np.stack([y * 255 // height, x * 255 // width, (y + x) % 256], -1)
        made.append(smooth.astype(np.uint8))
    return made


@pytest.fixture
def torchvision_processors():
    pytest.importorskip("torchvision", reason="the processors' torchvision backend needs it")
    made = transformers.SiglipImageProcessor, transformers.Siglip2ImageProcessor
    assert {p().backend for p in made} == {"torchvision"}
    return made


@pytest.mark.parametrize("method", FIXED)
@pytest.mark.parametrize("res", [224, 378])
def test_fixed_sizes_equal_the_pil_processor_to_the_bit(method, res):
    processor = transformers.SiglipImageProcessorPil(
        size={"height": res, "width": res}, resample=FIXED[method]
    )
    for image in images():
        theirs = processor(image, return_tensors="np", **RAW)["pixel_values"][0].transpose(1, 2, 0)
        assert theirs.dtype == np.uint8
        ours = resize.squash(image, res, method)
        np.testing.assert_array_equal(ours, theirs)
        normal = processor(image, return_tensors="np", input_data_format="channels_last")
        np.testing.assert_allclose(
            ours.transpose(2, 0, 1) / 127.5 - 1, normal["pixel_values"][0], rtol=0, atol=3e-7
        )


@pytest.mark.parametrize(("patch_size", "max_patches"), BUDGETS)
def test_naflex_equals_the_pil_processor_to_the_bit(patch_size, max_patches):
    processor = transformers.Siglip2ImageProcessorPil(
        patch_size=patch_size, max_num_patches=max_patches
    )
    for image in images():
        sized = naflex.resize_to_budget(image, patch_size, max_patches)
        patches, mask, shape = naflex.patchify(sized, patch_size, max_patches)
        theirs = processor(image, return_tensors="np", **RAW)
        assert theirs["pixel_values"].dtype == np.uint8
        np.testing.assert_array_equal(patches, theirs["pixel_values"][0])
        np.testing.assert_array_equal(mask, theirs["pixel_attention_mask"][0])
        np.testing.assert_array_equal(shape, theirs["spatial_shapes"][0])
        normal = processor(image, return_tensors="np", input_data_format="channels_last")
        np.testing.assert_allclose(
            np.where(mask[:, None], patches / 127.5 - 1, 0),
            normal["pixel_values"][0],
            rtol=0,
            atol=3e-7,
        )


def test_naflex_sizes_equal_those_of_the_processor():
    theirs = transformers.models.siglip2.image_processing_pil_siglip2
    rng = np.random.default_rng(1)
    for height, width in np.exp(rng.uniform(0, np.log(20_000), (3000, 2))).astype(int).tolist():
        patch_size, max_patches = int(rng.choice([14, 16, 32])), int(rng.integers(1, 1100))
        given = (height, width, patch_size, max_patches)
        assert naflex.target_size(*given) == theirs.get_image_size_for_max_num_patches(*given)


@pytest.mark.parametrize("method", FIXED)
def test_fixed_sizes_are_within_two_levels_of_the_torchvision_processor(
    method, torchvision_processors
):
    processor = torchvision_processors[0](
        size={"height": 224, "width": 224}, resample=FIXED[method]
    )
    for image in images():
        if image.shape[0] > image.shape[1]:
            continue  # torchvision goes along x first, Pillow 13 may not
        theirs = processor(image, return_tensors="pt", **RAW)["pixel_values"][0].numpy()
        off = np.abs(resize.squash(image, 224, method).astype(int) - theirs.transpose(1, 2, 0))
        assert off.max() <= 2 and (off > 1).mean() < 1e-4
        assert (off > 0).mean() < 0.05


@pytest.mark.parametrize(("patch_size", "max_patches"), BUDGETS)
def test_naflex_is_within_two_levels_of_the_torchvision_processor(
    patch_size, max_patches, torchvision_processors
):
    processor = torchvision_processors[1](patch_size=patch_size, max_num_patches=max_patches)
    for image in images():
        sized = naflex.resize_to_budget(image, patch_size, max_patches)
        patches, mask, shape = naflex.patchify(sized, patch_size, max_patches)
        theirs = processor(image, return_tensors="pt", **RAW)
        assert np.abs(patches.astype(int) - theirs["pixel_values"][0].numpy()).max() <= 2
        np.testing.assert_array_equal(mask, theirs["pixel_attention_mask"][0].numpy())
        np.testing.assert_array_equal(shape, theirs["spatial_shapes"][0].numpy())
