"""A source out of arrays."""

import numpy as np
import pytest

from base.errors import UserError
from input_pipeline.sources.in_memory import Memory

IMAGES = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)


def test_examples():
    source = Memory(images=IMAGES, texts=["a", ["b", "c"]], labels=[1, 0], class_names=["x", "y"])
    assert len(source) == 2 and source.class_names == ["x", "y"]
    np.testing.assert_array_equal(source[1]["image"], IMAGES[1])
    assert source[0]["texts"] == ["a"] and source[1]["texts"] == ["b", "c"]
    assert source[0]["label"] == 1 and source[1]["id"] == "memory/1"
    plain = Memory(images=[b"x"], texts=["a"], ids=["mine"])
    assert plain[0] == {"image": b"x", "texts": ["a"], "id": "mine"} and plain.class_names is None


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"texts": ["a"]}, "2 images but 1 texts"),
        ({"labels": [0]}, "2 images but 1 labels"),
        ({"ids": ["a"] * 3}, "2 images but 3 ids"),
        ({"labels": [0, 2], "class_names": ["x", "y"]}, "labels go from 0 to 2, but there are 2"),
        ({"labels": [-1, 1], "class_names": ["x", "y"]}, "labels go from -1 to 1, but there are 2"),
    ],
)
def test_what_does_not_fit_is_refused(given, told):
    with pytest.raises(UserError, match=told):
        Memory(**{"images": IMAGES, "texts": ["a", "b"], **given})
