"""The ring against the definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_inputs import ARGNUMS, inputs, mesh_of

from siglip.losses import definitions, ring
from siglip.losses.exchange import EXCHANGES
from siglip.losses.pairs import Pairs, labels, log_odds

MESHES = [(1,), (2,), (3,), (4,), (8,), (2, 2), (4, 2)]


def relative_error(got, want) -> float:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def exact_value_and_grads(definition, args):
    """In float64, because the definition in float32 is itself off by up to 1e-6."""
    with jax.enable_x64(True):
        exact = [jnp.asarray(np.asarray(x, np.float64)) for x in args]
        want = jax.value_and_grad(definition, argnums=ARGNUMS)(*exact)
        assert want[0].dtype == jnp.float64
        return jax.device_get(want)


def assert_equals_definition(fast, definition, args, tolerance=1e-6):
    want, want_grads = exact_value_and_grads(definition, args)
    # Where a difference of large numbers is all there is (dt of the softmax), float32 has no more
    # digits: a few times the definition's own error.
    own, own_grads = jax.value_and_grad(definition, argnums=ARGNUMS)(*args)
    got, got_grads = jax.jit(jax.value_and_grad(fast, argnums=ARGNUMS))(*args)
    value_only = jax.jit(fast)(*args)
    for name, g, w, o in zip(
        ("loss", "value", "zimg", "ztxt", "t", "b"),
        (got, value_only, *got_grads),
        (want, want, *want_grads),
        (own, own, *own_grads),
    ):
        if np.any(w):
            assert relative_error(g, w) < max(tolerance, 6 * relative_error(o, w)), name
        else:
            assert not np.any(g), name


@pytest.mark.parametrize(
    "exchange, shape",
    [("ring", shape) for shape in MESHES]
    + [(e, shape) for e in ("bidirectional", "gather") for shape in ((1,), (2,), (3,), (4, 2))],
)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_ring_loss_equals_definition_with_all_gradients(exchange, shape, masked):
    # 7 rows a tile: neither 10, 5 nor 50 is a multiple.
    devices = int(np.prod(shape))
    mesh, n = mesh_of(*shape), 10 * devices * (1 if devices > 2 else 5)
    mask = np.random.default_rng(1).random(n) > 0.2 if masked else None
    for t, b in [(10.0, -10.0), (117.0, -12.9)][masked:]:
        assert_equals_definition(
            lambda *a: ring.sigmoid_loss(*a, mask, mesh=mesh, exchange=exchange, tile=7),
            lambda *a: definitions.sigmoid_loss(*a, mask),
            inputs(n, 128, t, b),
        )


@pytest.mark.parametrize(
    "exchange, shape",
    [
        ("ring", (1,)),
        ("ring", (2,)),
        ("ring", (4, 2)),
        ("bidirectional", (3,)),
        ("gather", (4, 2)),
    ],
)
def test_softmax_ring_equals_definition_with_all_gradients(exchange, shape):
    devices = int(np.prod(shape))
    mesh, n = mesh_of(*shape), 10 * devices * (1 if devices > 2 else 5)
    mask = np.random.default_rng(1).random(n) > 0.2 if devices % 2 == 0 else None
    assert_equals_definition(
        lambda *a: ring.softmax_loss(*a, mask, mesh=mesh, exchange=exchange, tile=7),
        lambda *a: definitions.softmax_loss(*a, mask),
        inputs(n, 128, 117.0, 0.0),
        1e-5,  # dt is a small difference of large sums
    )


@pytest.mark.parametrize("loss", ["sigmoid_loss", "softmax_loss"])
@pytest.mark.parametrize("side", ["img", "txt"])
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_one_sided_gradients_equal_those_of_the_definition(loss, side, exchange):
    zimg, ztxt, t, b = inputs(40, 16, 30.0, -5.0)
    mask = np.random.default_rng(1).random(40) > 0.2
    argnums = {"img": (0, 2), "txt": (1, 3)}[side]
    fast = functools.partial(getattr(ring, loss), mesh=mesh_of(4), exchange=exchange, tile=3)
    got = jax.jit(jax.value_and_grad(fast, argnums))(zimg, ztxt, t, b, mask)
    want = jax.value_and_grad(getattr(definitions, loss), argnums)(zimg, ztxt, t, b, mask)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        assert relative_error(g, w) < 1e-5 if np.any(w) else not np.any(g)


@pytest.mark.parametrize("row", [2, 4])
@pytest.mark.parametrize("axes", [("data", "fsdp"), ("fsdp", "data")])
def test_gather_in_two_steps_equals_the_definition(row, axes, monkeypatch):
    monkeypatch.setattr("siglip.losses.exchange.row_of", lambda mesh, devices: row)
    mask = np.random.default_rng(1).random(40) > 0.2
    options = dict(mesh=mesh_of(4, 2), axes=axes, exchange="gather", tile=7)
    assert_equals_definition(
        lambda *a: ring.sigmoid_loss(*a, mask, **options),
        lambda *a: definitions.sigmoid_loss(*a, mask),
        inputs(40, 16, 117.0, -12.9),
    )


OPTIONS = [
    Pairs(duplicates="ignore"),
    Pairs(duplicates="positive"),
    Pairs("hard", 5),
    Pairs("easy", 3),
    Pairs("random", 7),
    Pairs("hard", 1000),  # more than there are: all
    Pairs("hard", 4, "ignore"),
    Pairs("random", 4, "positive"),
]


@pytest.mark.parametrize(
    "pairs, exchange",
    [(pairs, "ring") for pairs in OPTIONS]
    + [(OPTIONS[i], e) for i in (1, 2, 4, 6) for e in ("bidirectional", "gather")],
    ids=str,
)
def test_options_of_pairs_equal_their_definition(pairs, exchange):
    n, d = 48, 16
    args = inputs(n, d, 30.0, -5.0)
    rng = np.random.default_rng(2)
    mask = rng.random(n) > 0.1
    ids = np.stack([rng.integers(-1, 12, n), np.arange(n)], 1).astype(np.int32)  # -1: none
    z = labels(pairs, args[0], args[1], mask, ids, seed=3)
    chosen = np.asarray(z)[mask]
    kept = (chosen == -1).sum(axis=1)
    if pairs.negatives != "all":
        assert (kept == min(pairs.ratio, kept.max())).all() and kept.max() <= mask.sum() - 1
    options = dict(mesh=mesh_of(4), exchange=exchange, tile=5, pairs=pairs)
    assert_equals_definition(
        lambda *a: ring.sigmoid_loss(*a, mask, ids, 3, **options),
        lambda *a: definitions.sigmoid_loss(*a, mask, z),
        args,
        2e-6,
    )


def test_hard_negatives_have_the_highest_and_easy_ones_the_lowest_loss():
    zimg, ztxt, t, b = inputs(32, 8, 10.0, -1.0)
    nll = np.logaddexp(0, np.asarray(t * zimg @ ztxt.T + b))
    np.fill_diagonal(nll, np.nan)
    for negatives, order in (("hard", -1), ("easy", 1)):
        z = np.asarray(labels(Pairs(negatives, 6), zimg, ztxt))
        for i in range(32):
            others = np.delete(np.arange(32), i)
            ranked = others[np.argsort(order * nll[i, others])]
            assert set(np.flatnonzero(z[i] == -1)) == set(ranked[:6])


def test_random_negatives_are_uniform_and_differ_by_seed():
    zeros = jnp.zeros((64, 2))
    z = np.stack([labels(Pairs("random", 16), zeros, zeros, seed=s) for s in range(200)])
    assert not np.array_equal(z[0], z[1])
    share = (z == -1).mean(axis=0)[~np.eye(64, dtype=bool)]
    # 200 draws of probability 16/63: five standard deviations
    assert abs(share - 16 / 63).max() < 5 * np.sqrt(16 / 63 * 47 / 63 / 200)


def test_the_softmax_of_well_separated_pairs_is_one_to_the_last_digit():
    zimg, ztxt, t, b = inputs(64, 512, 117.0, 0.0, scale=10)
    for devices in (1, 4):
        loss = functools.partial(ring.softmax_loss, mesh=mesh_of(devices), tile=16)
        value, grads = jax.value_and_grad(loss, argnums=(0, 1, 2))(zimg, ztxt, t, b)
        assert 0 <= value < 1e-7
        assert max(float(jnp.linalg.norm(g)) for g in grads) < 1e-7


def test_a_zero_has_one_key_whatever_its_sign():
    keys = jax.jit(lambda s: Pairs("easy", 1).key(s, {}, {}, 0))(jnp.float32([0.0, -0.0, 1e-9]))
    assert keys[0] == keys[1] > keys[2]


def test_softmax_ignores_duplicates_as_its_definition_does():
    args = inputs(48, 16, 30.0, -5.0)
    ids = np.random.default_rng(2).integers(-1, 12, (48, 1)).astype(np.int32)
    pairs = Pairs(duplicates="ignore")
    z = labels(pairs, args[0], args[1], None, ids)
    assert (np.asarray(z) == 0).any()
    assert_equals_definition(
        lambda *a: ring.softmax_loss(*a, None, ids, mesh=mesh_of(4), tile=5, pairs=pairs),
        lambda *a: definitions.softmax_loss(*a, None, z),
        args,
        2e-6,
    )


def test_relative_bias_is_a_bias_inside_the_temperature():
    args = inputs(24, 16, 30.0, 0.4)
    assert_equals_definition(
        lambda *a: ring.sigmoid_loss(*a, mesh=mesh_of(4), relative_bias=True),
        lambda zimg, ztxt, t, b: definitions.sigmoid_loss(zimg, ztxt, t, -t * b),
        args,
    )


def test_the_prior_is_where_the_bias_gradient_of_orthogonal_embeddings_is_zero():
    zeros = jnp.zeros((64, 4))
    for pairs, ratio in ((Pairs(), 0), (Pairs("random", 5), 5)):
        b = jnp.float32(log_odds(64, ratio))
        loss = functools.partial(ring.sigmoid_loss, mesh=mesh_of(4), pairs=pairs)
        assert abs(jax.grad(loss, argnums=3)(zeros, zeros, jnp.float32(10), b)) < 1e-5


@pytest.mark.parametrize(
    "exchange, devices",
    [("ring", 1), ("ring", 2), ("ring", 8), ("gather", 8), ("bidirectional", 8)],
)
def test_precision_in_a_trained_state_does_not_depend_on_the_devices(devices, exchange):
    # t = 117, b = -12.9, positives at cosine 0.13: float32 within 1e-6, bfloat16 within 2e-3.
    n, d = 512, 256
    zimg, ztxt, t, b = inputs(n, d, 117.0, -12.9, scale=0.131)
    assert 0.1 < float(jnp.mean(jnp.sum(zimg * ztxt, axis=1))) < 0.16
    for dtype, tolerance in (("float32", 1e-6), ("bfloat16", 2e-3)):
        args = [z.astype(dtype).astype(jnp.float32) for z in (zimg, ztxt)] + [t, b]
        _, want = exact_value_and_grads(definitions.sigmoid_loss, args)
        fast = functools.partial(
            ring.sigmoid_loss, mesh=mesh_of(devices), exchange=exchange, dtype=dtype
        )
        got = jax.jit(jax.grad(fast, ARGNUMS))(*args)
        for name, g, w in zip(("zimg", "ztxt", "t", "b"), got, want):
            assert g.dtype == jnp.float32
            assert relative_error(g, w) < tolerance, (dtype, name)


def test_no_bias_is_a_bias_of_zero():
    zimg, ztxt, t, _ = inputs(8, 16, 10.0, 0.0)
    want = definitions.sigmoid_loss(zimg, ztxt, t, jnp.float32(0))
    for loss in (definitions.sigmoid_loss, ring.make_sigmoid_loss(mesh_of(2))):
        assert relative_error(loss(zimg, ztxt, t, None), want) < 1e-6


def test_without_jit_too():
    args = inputs(8, 16, 10.0, -10.0)
    got = ring.sigmoid_loss(*args, mesh=mesh_of(2))
    assert relative_error(got, definitions.sigmoid_loss(*args)) < 1e-6


def test_gradients_scale_with_the_cotangent_and_may_be_asked_for_singly():
    args = inputs(16, 8, 10.0, -10.0)
    mesh = mesh_of(4)
    half = jax.grad(lambda *a: 0.5 * ring.sigmoid_loss(*a, mesh=mesh), argnums=(0, 2))(*args)
    whole = jax.grad(lambda *a: definitions.sigmoid_loss(*a), argnums=(0, 2))(*args)
    for h, w in zip(half, whole):
        assert relative_error(2 * h, w) < 1e-6


def test_t_gradient_is_the_inner_product_of_embeddings_and_their_gradients():
    zimg, ztxt, t, b = inputs(32, 8, 10.0, -10.0)
    grads = jax.grad(lambda *a: ring.sigmoid_loss(*a, mesh=mesh_of(4)), argnums=(0, 1, 2))
    dx, dy, dt = grads(zimg, ztxt, t, b)
    np.testing.assert_allclose(np.vdot(zimg, dx), t * dt, rtol=1e-5)
    np.testing.assert_allclose(np.vdot(ztxt, dy), t * dt, rtol=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(exchange="circle"), "none of auto, ring, bidirectional, gather"),
        (dict(dtype="float16"), "none of float32, bfloat16"),
        (dict(tile=-1), "tile must be"),
        (dict(unroll=0), "unroll must be at least 1"),
        (dict(negatives="hard"), "needs ratio"),
        (dict(negatives="tough", ratio=3), "none of all, random, hard, easy"),
        (dict(ratio=3), "ratio 3 needs negatives"),
        (dict(duplicates="keep"), "none of negative, ignore, positive"),
    ],
)
def test_options_that_are_none_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ring.make_sigmoid_loss(mesh_of(2), **options)


def test_mistakes_are_named(unchecked_shapes):
    zimg, ztxt, t, b = inputs(12, 4, 10.0, -10.0)
    with pytest.raises(ValueError, match="12 pairs do not divide over 8 devices"):
        ring.sigmoid_loss(zimg, ztxt, t, b, mesh=mesh_of(8))
    with pytest.raises(ValueError, match="must be two arrays"):
        ring.sigmoid_loss(zimg, ztxt[:4], t, b, mesh=mesh_of(2))
    with pytest.raises(ValueError, match="axes data, not 'model'"):
        ring.sigmoid_loss(zimg, ztxt, t, b, mesh=mesh_of(2), axes=("model",))
    with pytest.raises(ValueError, match="needs ids"):
        ring.make_sigmoid_loss(mesh_of(2), duplicates="ignore")(zimg, ztxt, t, b)
    with pytest.raises(ValueError, match="the softmax loss takes duplicates"):
        ring.make_softmax_loss(mesh_of(2), duplicates="positive")
