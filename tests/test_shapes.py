"""Tests hold calls to the shapes that signatures name (tests/conftest.py turns beartype on)."""

from typing import Any, cast

import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from base.errors import UserError
from embedding import neighbours
from siglip.losses import definitions


def test_another_shape_than_the_signature_names_is_refused():
    zimg, t = jnp.ones((4, 3)), jnp.float32(1)
    definitions.sigmoid_loss(zimg, zimg, t, None)
    with pytest.raises(jaxtyping.TypeCheckError, match="ztxt"):
        definitions.sigmoid_loss(zimg, jnp.ones((5, 3)), t, None)
    with pytest.raises(jaxtyping.TypeCheckError, match="mask"):
        definitions.sigmoid_loss(zimg, zimg, t, None, jnp.ones(4))


def test_every_file_that_names_shapes_is_held_to_them(request):
    (conftest,) = [
        plugin
        for plugin in request.config.pluginmanager.get_plugins()
        if hasattr(plugin, "WITH_SHAPES")
    ]
    some = {
        "embedding.neighbours",
        "evaluators.ranks",
        "input_pipeline.transforms.resize",
        "siglip.library",
        "siglip.losses.definitions",
        "trainers.step.update",
    }
    assert some <= set(conftest.WITH_SHAPES)


def test_other_annotations_of_these_files_are_held_too_but_not_where_a_test_turns_it_off(
    unchecked_shapes,
):
    z, k = np.ones((1, 4), np.float32), cast(Any, 2.0)
    with pytest.raises(UserError, match="nearest neighbours of 1 rows"):
        neighbours.nearest(z, z, k)
    jaxtyping.config.update("jaxtyping_disable", False)
    with pytest.raises(jaxtyping.TypeCheckError, match="k"):
        neighbours.nearest(z, z, k)
