"""The same weights for other sizes and types."""

import ml_dtypes
import numpy as np
import pytest
from tiny_models import TINY, arrays, one_line, tiny

from siglip.checkpoints import CheckpointError, adapt
from siglip.towers import positions


@pytest.mark.parametrize("method", positions.METHODS)
def test_image_positions_are_resized_by_the_method_and_nothing_else_is(method):
    given = tiny(preset="x")
    made = adapt.to_res(given, 48, method)
    table = given.arrays["img/pos_embedding"].read().reshape(2, 2, 32)
    expected = positions.resize_images(table, (3, 3), method).reshape(1, 9, 32)
    np.testing.assert_array_equal(made.arrays["img/pos_embedding"].read(), expected)
    assert (made.spec.res, made.spec.preset) == (48, "")
    made.check()
    before, after = arrays(given), arrays(made)
    assert [n for n in before if before[n] != after[n]] == ["img/pos_embedding"]


@pytest.mark.parametrize("method", positions.TEXT_METHODS)
def test_text_positions_are_changed_by_the_method(method):
    given = tiny()
    made = adapt.to_token_len(given, 20, method)
    expected = positions.resize_text(given.arrays["txt/pos_embedding"].read()[0], 20, method)
    np.testing.assert_array_equal(made.arrays["txt/pos_embedding"].read()[0], expected)
    assert made.spec.token_len == 20
    made.check()


def test_what_fits_already_is_not_touched():
    given = tiny(preset="x")
    assert adapt.to_res(given, 32, None) is given
    assert adapt.to_token_len(given, 16, None) is given
    same_patches = adapt.to_res(given, 40, None)  # 2 x 2 of them too
    assert arrays(same_patches) == arrays(given) and same_patches.spec.res == 40


def test_a_change_needs_a_method_and_the_right_tower():
    naflex = tiny(img={"variant": "mu/16", "naflex_grid": 2}, res=None)
    for change, what in (
        (lambda: adapt.to_res(tiny(), 64, None), r"32 pixels \(2 x 2 patches\), not 64"),
        (lambda: adapt.to_res(tiny(), 64, "cubic"), "'cubic' is none of bilinear-corners"),
        (lambda: adapt.to_res(tiny(), 8, "bicubic"), "smaller than a patch of 16"),
        (lambda: adapt.to_res(naflex, 64, "bicubic"), "no tower for square images"),
        (lambda: adapt.to_res(tiny().only("txt"), 64, "bicubic"), "no tower for square images"),
        (lambda: adapt.to_token_len(tiny(), 32, None), "texts of 16 tokens, not 32"),
        (lambda: adapt.to_token_len(tiny(), 32, "pad"), "'pad' is none of linear, keep"),
        (lambda: adapt.to_token_len(tiny(), 1, "keep"), "too short"),
        (lambda: adapt.to_token_len(tiny().only("img"), 32, "keep"), "no text tower"),
        (lambda: adapt.cast(tiny(), "int8"), "'int8' is none of float32"),
    ):
        with pytest.raises(CheckpointError, match=what) as error:
            change()
        one_line(error)


def test_a_cast_rounds_to_nearest_even():
    made = adapt.cast(tiny(), "bfloat16")
    for name, stored in made.arrays.items():
        x = tiny().arrays[name].read()
        bits = x.view(np.uint32).astype(np.uint64)
        expected = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        assert stored.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(stored.read().view(np.uint16), expected)
    half = adapt.cast(tiny(), "float16")
    adapted = adapt.to_res(adapt.to_token_len(half, 20, "keep"), 48, "bicubic")
    assert {str(stored.read().dtype) for stored in adapted.arrays.values()} == {"float16"}
    assert TINY.res == 32
