"""Tests hold calls to the shapes that signatures name (tests/conftest.py turns beartype on)."""

import jax.numpy as jnp
import jaxtyping
import pytest

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
    assert {"siglip.losses.definitions", "siglip.towers.vit"} <= set(conftest.WITH_SHAPES)
