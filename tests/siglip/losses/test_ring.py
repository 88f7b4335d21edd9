"""The ring against the definition, and what its compiled program holds and sends."""

import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from siglip.losses import definitions, ring
from siglip.losses.exchange import EXCHANGES, choose
from siglip.losses.pairs import Pairs, labels, log_odds
from siglip.losses.plan import default_tile_rows

MESHES = [(1,), (2,), (3,), (4,), (8,), (2, 2), (4, 2)]


def mesh_of(*shape: int):
    devices = jax.devices()[: int(np.prod(shape))]
    axes = ("data", "fsdp")[: len(shape)]
    return jax.make_mesh(shape, axes, devices=devices, axis_types=(AxisType.Auto,) * len(shape))


def inputs(n: int, d: int, t: float, b: float, seed: int = 0, scale: float = 0.3):
    rng = np.random.default_rng(seed)
    zimg, ztxt = rng.normal(size=(2, n, d))
    ztxt = ztxt + scale * zimg  # positives that stand out, as after some training
    zimg, ztxt = (
        jnp.asarray(z / np.linalg.norm(z, axis=1, keepdims=True), jnp.float32) for z in (zimg, ztxt)
    )
    return zimg, ztxt, jnp.float32(t), jnp.float32(b)


def relative_error(got, want) -> float:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


DIFFERENTIATED = (0, 1, 2, 3)
SCALARS = 2048  # bytes: sums, loop counters, tables of buffers


def exact_value_and_grads(definition, args):
    """In float64, because the definition in float32 is itself off by up to 1e-6."""
    with jax.enable_x64(True):
        exact = [jnp.asarray(np.asarray(x, np.float64)) for x in args]
        want = jax.value_and_grad(definition, argnums=DIFFERENTIATED)(*exact)
        assert want[0].dtype == jnp.float64
        return jax.device_get(want)


def assert_equals_definition(fast, definition, args, tolerance=1e-6):
    want, want_grads = exact_value_and_grads(definition, args)
    # Where a difference of large numbers is all there is (dt of the softmax), float32 has no more
    # digits: a few times the definition's own error.
    own, own_grads = jax.value_and_grad(definition, argnums=DIFFERENTIATED)(*args)
    got, got_grads = jax.jit(jax.value_and_grad(fast, argnums=DIFFERENTIATED))(*args)
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
        got = jax.jit(jax.grad(fast, DIFFERENTIATED))(*args)
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


def compiled(
    devices: int, n: int = 1024, d: int = 256, argnums=DIFFERENTIATED, loss=ring.sigmoid_loss, **kw
):
    mesh = mesh_of(devices)
    rows = NamedSharding(mesh, PartitionSpec(("data",)))
    z = jax.ShapeDtypeStruct((n * devices, d), jnp.float32, sharding=rows)
    scalar = jax.ShapeDtypeStruct((), jnp.float32)

    def f(*args):
        return loss(*args, mesh=mesh, **({"exchange": "ring"} | kw))

    f = jax.value_and_grad(f, argnums=argnums) if argnums else f
    return jax.jit(f).lower(z, z, scalar, scalar).compile()


def ops(program, name: str) -> int:
    return len(re.findall(rf"= \S+ {name}(?:-start)?\(", program.as_text()))


def temporary(devices: int, n: int = 1024, d: int = 256, **kw) -> int:
    return compiled(devices, n, d, **kw).memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("exchange", ["ring", "bidirectional"])
@pytest.mark.parametrize("loss", [ring.sigmoid_loss, ring.softmax_loss])
def test_temporary_memory_per_device_does_not_grow_with_the_devices(exchange, loss):
    n, d = 1024, 256
    temp = {k: temporary(k, n, d, loss=loss, exchange=exchange) for k in (4, 8)}
    assert temp[8] == pytest.approx(temp[4], rel=0.01)
    tile = default_tile_rows(n, "cpu") * n * 4
    assert temp[8] <= 26 * n * d + tile + SCALARS
    # The definition, sharded by XLA, grows with D: this is what the ring is for.
    assert temp[8] < 0.1 * 4 * n * (8 * n) * 3


@pytest.mark.parametrize("tile", [0, 96, 128])
def test_memory_is_26_bytes_a_number_and_a_tile_whatever_the_tile(tile):
    n, d = 1024, 512
    logits = (tile or default_tile_rows(n, "cpu")) * n * 4
    assert temporary(8, n, d, tile=tile) <= 26 * n * d + logits + SCALARS


@pytest.mark.parametrize("negatives", ["hard", "random"])
def test_selection_of_negatives_keeps_memory_bounded(negatives):
    n, d = 512, 128
    pairs = Pairs(negatives, 16)
    temp = {k: temporary(k, n, d, pairs=pairs, tile=64) for k in (4, 8)}
    assert temp[8] == pytest.approx(temp[4], rel=0.01)
    assert temp[8] < 2 * temporary(8, n, d, tile=64)


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_the_unrolled_ring_sends_each_text_d_minus_1_and_each_accumulator_d_times(devices):
    unrolled = functools.partial(compiled, devices, n=64, d=32, unroll=devices)
    program = unrolled()
    assert ops(program, "collective-permute") == (devices - 1) + devices
    assert ops(program, "all-gather") == 0
    assert ops(program, "all-reduce") == 1
    assert ops(unrolled(argnums=()), "collective-permute") == devices - 1
    # Whichever tower is frozen, its embeddings travel and no accumulator does.
    assert ops(unrolled(argnums=(0, 2, 3)), "collective-permute") == devices - 1
    assert ops(unrolled(argnums=(1, 2, 3)), "collective-permute") == devices - 1


def test_the_looped_ring_has_the_same_hops():
    # Step 0 sends texts; the loop (D - 2 times) both; the last step and the way home accumulators.
    program = compiled(8, n=64, d=32)
    assert ops(program, "collective-permute") == 1 + 2 + 1 + 1
    assert '"known_trip_count":{"n":"6"}' in program.as_text()
    assert ops(program, "all-gather") == 0


def test_the_bidirectional_ring_sends_half_a_block_each_way():
    program = compiled(8, n=64, d=32, exchange="bidirectional", unroll=8)
    sent = re.findall(r"= (f32\[\d+,\d+\])\S* collective-permute(?:-start)?\(", program.as_text())
    assert sent == ["f32[32,32]"] * 2 * (7 + 8)
    targets = set(re.findall(r"source_target_pairs=\{\{0,(\d)\}", program.as_text()))
    assert targets == {"1", "7"}


def test_gather_sends_two_messages():
    program = compiled(8, n=64, d=32, exchange="gather")
    assert ops(program, "all-gather") == 1
    assert ops(program, "reduce-scatter") == 1
    assert ops(program, "collective-permute") == 0
    frozen = compiled(8, n=64, d=32, exchange="gather", argnums=(1, 2, 3))
    assert ops(frozen, "reduce-scatter") == 0


@pytest.mark.parametrize(
    "loss, argnums, matmuls",
    [
        (ring.sigmoid_loss, DIFFERENTIATED, 3),
        (ring.sigmoid_loss, (0, 2, 3), 2),  # frozen text
        (ring.sigmoid_loss, (1, 2, 3), 2),  # frozen images
        (ring.sigmoid_loss, (2, 3), 1),
        (ring.sigmoid_loss, (), 1),
        # Two tours, 1 + 3: in this small program XLA finds the logits of both to be the same.
        (ring.softmax_loss, (0, 1, 2), 3),
        (ring.softmax_loss, (0, 2), 2),
        (ring.softmax_loss, (), 1),
    ],
)
def test_matmuls_of_the_compiled_program(loss, argnums, matmuls):
    # One device and one tile, so that every matmul of the program is run once.
    program = compiled(1, n=64, d=32, loss=loss, argnums=argnums, tile=64)
    assert ops(program, "dot") + ops(program, "custom-call") == matmuls
    flops = program.cost_analysis()["flops"]
    assert 0.99 < flops / (matmuls * 2 * 64 * 64 * 32) < 1.6  # and elementwise work


def test_auto_takes_the_exchange_with_the_least_estimate_and_logs_it(caplog):
    mesh = mesh_of(8)
    small = choose(mesh, n=8, d=64, devices=8, itemsize=4)
    large = choose(mesh, n=65_536, d=768, devices=8, itemsize=4)
    assert small.name == "gather" and large.name == "ring"
    assert large.seconds["ring"] <= large.seconds["bidirectional"]
    zimg, ztxt, t, b = inputs(64, 4, 10.0, -10.0)
    with caplog.at_level("INFO", "siglip.losses.plan"):
        ring.sigmoid_loss(zimg, ztxt, t, b, mesh=mesh)
    assert "exchange gather (cpu, n=8, d=4, D=8: ring" in caplog.text


@pytest.mark.parametrize("n, expected", [(256, "gather"), (4096, "bidirectional"), (2**14, "ring")])
def test_a_torus_takes_both_ways_unless_blocks_are_small(n, expected, monkeypatch):
    device = types.SimpleNamespace(device_kind="TPU v4", platform="tpu", process_index=0)
    mesh = types.SimpleNamespace(devices=np.array([device] * 64))
    choice = choose(mesh, n=n, d=768, devices=64, itemsize=2)  # type: ignore
    assert choice.name == expected  # sends that compute hides anyway are not worth halving


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


def test_mistakes_are_named():
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
