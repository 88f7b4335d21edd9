"""The definitions against known answers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from siglip.losses import definitions


def unit_rows(seed: int, n: int, d: int) -> jax.Array:
    z = np.random.default_rng(seed).normal(size=(n, d))
    return jnp.asarray(z / np.linalg.norm(z, axis=1, keepdims=True), jnp.float32)


@pytest.mark.parametrize(
    "n, b, expected",
    [(8, -10, 10.0004), (512, -10, 10.0232), (512, 0, 354.9), (1024, -10, 10.0465)],
)
def test_sigmoid_loss_at_cosine_zero_is_the_value_of_the_algebra(n, b, expected):
    zeros = jnp.zeros((n, 4))
    loss = definitions.sigmoid_loss(zeros, zeros, jnp.float32(10), jnp.float32(b))
    assert loss == pytest.approx(expected, rel=5e-5)
    exact = np.log1p(np.exp(-b)) + (n - 1) * np.log1p(np.exp(b))
    assert loss == pytest.approx(exact, rel=1e-5)


def test_sigmoid_loss_of_two_pairs_by_hand():
    zimg, ztxt = jnp.eye(2), jnp.asarray([[1.0, 0.0], [0.6, 0.8]])
    t, b = 3.0, -1.0
    logits = np.array([[3.0, 1.8], [0.0, 2.4]]) - 1
    signs = np.array([[1, -1], [-1, 1]])
    expected = -np.log(1 / (1 + np.exp(-signs * logits))).sum() / 2
    assert definitions.sigmoid_loss(zimg, ztxt, jnp.float32(t), jnp.float32(b)) == pytest.approx(
        expected, rel=1e-6
    )


def test_softmax_loss_is_log_n_at_cosine_zero_and_the_mean_of_both_directions():
    zeros = jnp.zeros((256, 4))
    assert definitions.softmax_loss(zeros, zeros, jnp.float32(10)) == pytest.approx(
        np.log(256), rel=1e-6
    )
    zimg, ztxt = unit_rows(0, 5, 3), unit_rows(1, 5, 3)
    logits = np.asarray(zimg @ ztxt.T) * 7.0
    i2t = np.mean([np.log(np.exp(logits[i]).sum()) - logits[i, i] for i in range(5)])
    t2i = np.mean([np.log(np.exp(logits[:, i]).sum()) - logits[i, i] for i in range(5)])
    loss = definitions.softmax_loss(zimg, ztxt, jnp.float32(7), jnp.float32(3))
    assert loss == pytest.approx((i2t + t2i) / 2, rel=1e-5)


@pytest.mark.parametrize("loss", [definitions.sigmoid_loss, definitions.softmax_loss])
def test_masked_rows_have_no_part_in_the_loss_or_its_gradients(loss):
    zimg, ztxt = unit_rows(0, 6, 4), unit_rows(1, 6, 4)
    mask = jnp.asarray([True, False, True, True, False, True])
    t, b = jnp.float32(10), jnp.float32(-10)
    value_and_grad = jax.value_and_grad(loss, argnums=(0, 1, 2))
    value, grads = value_and_grad(zimg, ztxt, t, b, mask)
    kept, kept_grads = value_and_grad(zimg[mask], ztxt[mask], t, b)
    np.testing.assert_allclose(value, kept, rtol=1e-6)
    for grad, kept_grad in zip(grads[:2], kept_grads[:2]):
        np.testing.assert_allclose(grad[mask], kept_grad, rtol=1e-4, atol=1e-7)
        assert not np.any(grad[~mask])
    np.testing.assert_allclose(grads[2], kept_grads[2], rtol=1e-5)


@pytest.mark.parametrize("loss", [definitions.sigmoid_loss, definitions.softmax_loss])
def test_a_batch_without_a_valid_pair_has_a_finite_loss_and_zero_gradient(loss):
    z, nothing = unit_rows(0, 4, 3), jnp.zeros(4, bool)
    value, grads = jax.value_and_grad(loss, argnums=(0, 1))(
        z, z, jnp.float32(10), jnp.float32(-10), nothing
    )
    assert value == 0
    assert not np.any(np.asarray(grads))


def test_the_temperature_is_never_clamped():
    z = unit_rows(0, 4, 3)
    for loss in (definitions.sigmoid_loss, definitions.softmax_loss):
        below, above = (loss(z, -z, jnp.float32(t), jnp.float32(0)) for t in (100, 118))
        assert above != below
