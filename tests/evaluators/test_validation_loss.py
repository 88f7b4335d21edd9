import math

import numpy as np
import pytest

from base.errors import UserError
from evaluators.loss import Evaluator
from siglip.losses import LOSSES, definitions, ring
from siglip.losses.definitions import Loss
from siglip.losses.facts import facts
from siglip.losses.pairs import Pairs, labels

SIGMOID = Loss(definitions.sigmoid_loss, chance=Pairs().prior_loss)
SOFTMAX = Loss(definitions.softmax_loss, chance=math.log)


def run(fakes, source, params, loss_fn=SIGMOID, mesh_shape=(2, 1), batch_size=4, b=-1.0):
    args = (fakes.Model(b), fakes.mesh(*mesh_shape), fakes.Preprocess(), source, loss_fn)
    ((name, value, chance),) = list(Evaluator(*args, batch_size=batch_size).run(params))
    assert name == "loss"
    return value, chance


def embeddings(fakes, source, params):
    images = np.stack([e["image"] for e in source])
    texts = np.stack([fakes.Preprocess().text(e["texts"][0]) for e in source])
    zimg, ztxt, scalars = fakes.Model().apply({"params": params}, images, texts)
    return np.asarray(zimg), np.asarray(ztxt), scalars


def by_batches(fakes, source, params, batch_size):
    zimg, ztxt, scalars = embeddings(fakes, source, params)
    total = 0.0
    for start in range(0, len(source), batch_size):
        rows = slice(start, start + batch_size)
        loss = definitions.sigmoid_loss(zimg[rows], ztxt[rows], **scalars)
        total += float(loss) * len(zimg[rows])
    return total / len(source)


@pytest.mark.parametrize("n", [3, 8, 11, 16])
@pytest.mark.parametrize(("mesh_shape", "batch_size"), [((2, 1), 4), ((4, 2), 8), ((1, 1), 5)])
def test_loss_is_the_mean_over_pairs_with_padding_masked(fakes, n, mesh_shape, batch_size):
    source, params = fakes.random_source(n), fakes.params(t=1.5)
    value, _ = run(fakes, source, params, mesh_shape=mesh_shape, batch_size=batch_size)
    assert value == pytest.approx(by_batches(fakes, source, params, batch_size), rel=1e-5)


def test_loss_depends_on_the_batch_size_and_not_on_the_mesh(fakes):
    source, params = fakes.random_source(16), fakes.params(t=1.5)
    values = {n: run(fakes, source, params, batch_size=n)[0] for n in (2, 8, 16)}
    assert values[2] < 0.8 * values[8] < 0.8 * values[16]
    for mesh_shape in [(1, 1), (8, 1), (2, 4)]:
        value, _ = run(fakes, source, params, mesh_shape=mesh_shape, batch_size=8)
        assert value == pytest.approx(values[8], rel=1e-6)


def test_the_ring_loss_gives_the_definitions_value(fakes):
    source, params = fakes.random_source(13), fakes.params(t=1.5)
    loss_fn = ring.make_sigmoid_loss(fakes.mesh(4, 2))
    value, chance = run(fakes, source, params, loss_fn, mesh_shape=(4, 2), batch_size=8)
    assert value == pytest.approx(by_batches(fakes, source, params, 8), rel=1e-5)
    assert chance == pytest.approx((8 * Pairs().prior_loss(8) + 5 * Pairs().prior_loss(5)) / 13)


def test_a_model_that_knows_only_the_prior_scores_the_chance_level(fakes):
    # Equal logits everywhere, log odds of 1 in n.
    n = 8
    source = fakes.source(np.full((24, 4), 5), [["a"]] * 24)
    params = fakes.params({"a": [0, 0, 0, 1]}, img=np.zeros((4, 4)))  # every zimg is 0
    value, chance = run(fakes, source, params, batch_size=n, b=-math.log(n - 1))
    assert value == pytest.approx(chance, rel=1e-5)
    p = 1 / n
    assert chance == pytest.approx(-n * (p * math.log(p) + (1 - p) * math.log(1 - p)))
    value, chance = run(fakes, source, params, SOFTMAX, batch_size=n, b=None)
    assert value == pytest.approx(chance, rel=1e-5)
    assert chance == pytest.approx(math.log(n))


def test_chance_of_a_short_last_batch_is_that_of_its_pairs(fakes):
    source, params = fakes.random_source(11), fakes.params()
    _, chance = run(fakes, source, params, SOFTMAX, batch_size=8, b=None)
    assert chance == pytest.approx((8 * math.log(8) + 3 * math.log(3)) / 11)


def test_a_loss_brings_its_own_chance_level_or_none(fakes):
    source, params = fakes.random_source(8), fakes.params()
    own = Loss(definitions.softmax_loss, chance=lambda n: 100.0 + n)
    assert run(fakes, source, params, own, batch_size=8)[1] == 108.0
    assert run(fakes, source, params, Loss(definitions.softmax_loss), batch_size=8)[1] is None


def by_definition(fakes, source, params, batch_size, pairs):
    """The mean over full batches of the definition with the labels of `pairs`."""
    zimg, ztxt, scalars = embeddings(fakes, source, params)
    text = np.stack([fakes.Preprocess().text(e["texts"][0]) for e in source])
    losses = []
    for start in range(0, len(source), batch_size):
        rows = slice(start, start + batch_size)
        known = facts(pairs.needs, {"text": text[rows]}, seed=0, step=0)
        z = labels(pairs, zimg[rows], ztxt[rows], **known)
        losses.append(float(definitions.sigmoid_loss(zimg[rows], ztxt[rows], **scalars, z=z)))
    return np.mean(losses)


@pytest.mark.parametrize("duplicates", ["ignore", "positive"])
def test_a_loss_that_needs_ids_gives_the_definitions_value(fakes, duplicates):
    source, params = fakes.random_source(16), fakes.params(t=1.5)
    for example in source:
        example["texts"] = ["ab"[len(example["texts"]) % 2]]  # many share a caption
    mesh = fakes.mesh(2)
    value, _ = run(fakes, source, params, LOSSES["sigmoid"](mesh, duplicates=duplicates), (2, 1), 8)
    expected = by_definition(fakes, source, params, 8, Pairs(duplicates=duplicates))
    assert value == pytest.approx(expected, rel=1e-5)
    assert value != pytest.approx(by_batches(fakes, source, params, 8), rel=1e-2)


def test_a_loss_that_needs_a_seed_gives_the_definitions_value_every_time(fakes):
    source, params = fakes.random_source(16), fakes.params(t=1.5)
    loss_fn = LOSSES["sigmoid"](fakes.mesh(2), negatives="random", ratio=2)
    value, chance = run(fakes, source, params, loss_fn, batch_size=8)
    expected = by_definition(fakes, source, params, 8, Pairs("random", 2))
    assert value == pytest.approx(expected, rel=1e-5)
    assert value != pytest.approx(by_batches(fakes, source, params, 8), rel=1e-2)
    assert chance == pytest.approx(Pairs("random", 2).prior_loss(8))
    assert run(fakes, source, params, loss_fn, batch_size=8)[0] == value


def test_one_pair_alone_has_no_uncertainty():
    assert Pairs().prior_loss(1) == 0.0


def test_the_first_text_counts(fakes):
    source, params = fakes.random_source(8), fakes.params(t=1.0)
    once, _ = run(fakes, source, params)
    for example in source:
        example["texts"] = [*example["texts"][:1], "z"]
    assert run(fakes, source, params)[0] == once
    for example in source:
        example["texts"] = ["z", *example["texts"]]
    assert run(fakes, source, params)[0] != once


def test_bad_input_is_refused(fakes):
    source, params = fakes.random_source(8), fakes.params()
    with pytest.raises(UserError, match=r"batch_size=5 .* 2 devices"):
        run(fakes, source, params, batch_size=5)
    with pytest.raises(UserError, match="loss is not finite"):
        run(fakes, source, fakes.params(t=np.nan))
    with pytest.raises(UserError, match="no examples"):
        run(fakes, fakes.source([], []), params)
    source[6]["image"] = b"?"
    with pytest.raises(UserError, match="image 6 cannot be read"):
        run(fakes, source, params)


def test_protocol_states_the_batch_size(fakes):
    args = (fakes.Model(), fakes.mesh(2), fakes.Preprocess(), fakes.random_source(5), SIGMOID)
    assert Evaluator(*args, batch_size=4).protocol == "5 pairs (first captions) in batches of 4"


def test_a_pair_without_a_caption_is_named(fakes):
    source = fakes.random_source(4)
    source[2]["texts"] = []
    with pytest.raises(UserError, match="has no caption; evaluation skips nothing"):
        run(fakes, source, fakes.params())
