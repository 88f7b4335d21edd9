"""One update: the same whatever the devices, and safe against what is not finite."""

import dataclasses
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from siglip import chips
from siglip.leaf_names import path_name
from siglip.losses import definitions, ring
from siglip.losses.definitions import Loss
from siglip.objectives.contrastive import make_contrastive
from siglip.sharding import make_mesh, to_device
from siglip.towers.two_towers import make_model
from trainers.step import train_state
from trainers.step.update import make_update

SIZES = dict(width=32, depth=1, mlp_dim=64, num_heads=2)


@pytest.fixture(scope="module")
def batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (16, 16, 16, 3), np.uint8),
        "text": rng.integers(0, 600, (16, 6)).astype(np.int32),
        "mask": np.ones(16, bool),
    }


def make(
    mesh,
    loss_fn=None,
    frozen=lambda name: False,
    log_every=1,
    drop_patches=0.0,
    microbatch=0,
    b_init=-10.0,
):
    model = make_model(
        b_init=b_init,
        img=dict(variant="mu/8", drop_patches=drop_patches, **SIZES),
        txt=dict(variant="mu", vocab_size=600, **SIZES),  # a table large enough to be split
    )
    tx = optax.sgd(1e-2, momentum=0.9)  # Adam would blow rounding errors up
    inputs = np.zeros((1, 16, 16, 3), np.uint8), np.zeros((1, 6), np.int32)
    loss_fn = loss_fn or ring.make_sigmoid_loss(mesh)
    objectives = {"contrastive": make_contrastive(model, mesh, loss_fn)}
    abstract, init = train_state.make_state(model, objectives, tx, mesh, seed=0, inputs=inputs)
    frozen = jax.tree_util.tree_map_with_path(
        lambda path, _: frozen(path_name(path)),
        abstract.params,
    )
    update = make_update(
        model,
        objectives,
        tx,
        lambda step: jnp.float32(1e-2),
        frozen,
        mesh,
        jax.tree.map(lambda x: x.sharding, abstract),
        seed=0,
        log_every=log_every,
        microbatch=microbatch,
    )
    return types.SimpleNamespace(
        abstract=abstract, state=init(), update=update, mesh=mesh, tally=train_state.new_tally(mesh)
    )


def run(it, *batches):
    state, tally = it.state, it.tally
    for batch in batches:
        state, tally, metrics = it.update(state, tally, to_device(batch, it.mesh))
    return jax.device_get((state, tally, metrics))


def assert_close(a, b, rtol=2e-4, atol=2e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


@pytest.mark.parametrize("fsdp", [1, 2, 8])
def test_a_train_step_with_the_ring_is_that_of_the_definition(fsdp, batch):
    mesh = make_mesh(fsdp=fsdp)
    got, _, metrics = run(make(mesh), batch, batch)
    want, _, expected = run(make(mesh, Loss(definitions.sigmoid_loss)), batch, batch)
    assert_close(got.params, want.params)
    assert metrics["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert metrics["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    assert got.step == 2


def test_the_step_is_compiled_with_the_options_of_its_chip(batch, monkeypatch):
    options = {"no_such_option": "1"}
    chip = dataclasses.replace(chips.UNKNOWN, compiler_options=options)
    monkeypatch.setitem(chips.CHIPS, "cpu", chip)
    with pytest.raises(jax.errors.JaxRuntimeError, match="no_such_option"):
        run(make(make_mesh()), batch)


def test_the_state_is_born_and_stays_sharded(batch):
    it = make(make_mesh(data=2, fsdp=4))

    def check(state):
        for tree in (state.params, state.opt_state[0].trace):
            table = tree["txt"]["Embed_0"]["embedding"]
            assert table.shape == (600, 32)
            assert {shard.data.shape for shard in table.addressable_shards} == {(600, 8)}

    check(it.state)
    check(it.update(it.state, it.tally, to_device(batch, it.mesh))[0])


def test_with_fsdp_parameters_are_gathered_and_activations_are_not(batch):
    mesh = make_mesh(data=2, fsdp=4)
    it = make(mesh, ring.make_sigmoid_loss(mesh, exchange="ring"))
    program = it.update.lower(it.state, it.tally, to_device(batch, it.mesh)).compile().as_text()
    gathered = set(re.findall(r"= \(?(\w+\[[\d,]*\])\S* all-gather(?:-start)?\(", program))
    # The one parameter that is large enough to be split; XLA may gather its transpose.
    assert gathered in ({"f32[600,32]"}, {"f32[32,600]"})
    assert "all-to-all" not in program


def test_the_norm_of_the_update_makes_no_copy_of_the_state(batch):
    it = make(make_mesh())
    program = it.update.lower(it.state, it.tally, to_device(batch, it.mesh)).compile().as_text()
    entry = program[program.index("\nENTRY") :]
    copied = re.findall(r" = (f32\[\d+,\S*?\])\S* copy\(", entry)
    assert copied == []  # of parameters and momentum, all that has two dimensions or more


def test_frozen_parameters_stay_and_their_tower_has_no_backward_pass(batch):
    it = make(make_mesh(), frozen=lambda name: name.startswith("img/"))
    before = jax.device_get(it.state.params)
    batch_on = to_device(batch, it.mesh)
    flops = it.update.lower(it.state, it.tally, batch_on).compile().cost_analysis()["flops"]
    free = make(make_mesh())
    all_flops = free.update.lower(free.state, free.tally, batch_on).compile().cost_analysis()
    assert flops < 0.8 * all_flops["flops"]
    state, _, _ = run(it, batch)
    assert_close(state.params["img"], before["img"], rtol=0, atol=0)
    assert np.any(state.params["txt"]["head"]["kernel"] != before["txt"]["head"]["kernel"])


def test_a_frozen_tower_moves_no_accumulator(batch):
    # Nobody says so: the loss sees that no derivative is asked for.
    def permutes(frozen, microbatch=0):
        mesh = make_mesh()
        loss_fn = ring.make_sigmoid_loss(mesh, exchange="ring", unroll=8)
        it = make(mesh, loss_fn, lambda name: name.startswith(frozen), microbatch=microbatch)
        program = it.update.lower(it.state, it.tally, to_device(batch, mesh)).compile().as_text()
        return len(re.findall(r"= \S+ collective-permute(?:-start)?\(", program))

    # Embeddings and mask make D - 1 hops each, accumulators D; logit statistics have 2 in a loop.
    assert permutes("nothing") == 2 * 7 + 8 + 2
    assert permutes("img/") == 2 * 7 + 2
    assert permutes("txt/", microbatch=8) == 2 * 7 + 2


def test_t_and_b_can_be_fixed(batch):
    it = make(make_mesh(), frozen=lambda name: name in ("t", "b"))
    state, _, metrics = run(it, batch, batch)
    assert metrics["t"] == pytest.approx(10, rel=1e-6) and metrics["b"] == -10
    assert state.params["t"] == np.float32(np.log(10)) and state.params["b"] == -10


@pytest.mark.parametrize("frozen, fsdp", [("nothing", 1), ("img/", 2)])
def test_microbatches_give_the_same_loss_gradient_and_update(batch, frozen, fsdp, microbatch=8):
    mesh = make_mesh(fsdp=fsdp)
    options = dict(drop_patches=0.5, frozen=lambda name: name.startswith(frozen))
    got, _, metrics = run(make(mesh, microbatch=microbatch, **options), batch, batch)
    want, _, expected = run(make(mesh, **options), batch, batch)
    assert_close(got.params, want.params, rtol=1e-5, atol=1e-6)
    assert_close(got.opt_state, want.opt_state, rtol=1e-4, atol=1e-6)
    for name in ("loss", "grad_norm", "neg_logit_max"):
        assert metrics[name] == pytest.approx(expected[name], rel=1e-5), name


def test_microbatches_of_the_softmax_with_a_bad_row_and_a_fixed_temperature(batch):
    mesh = make_mesh()
    batch = {**batch, "mask": np.arange(16) != 3}
    options = dict(b_init=None, frozen=lambda name: name == "t")
    (got, _, metrics), (want, _, expected) = (
        run(make(mesh, ring.make_softmax_loss(mesh), microbatch=m, **options), batch)
        for m in (8, 0)
    )
    assert_close(got.params, want.params, rtol=1e-5, atol=1e-6)
    assert metrics["loss"] == pytest.approx(expected["loss"], rel=1e-5)


def test_activations_in_memory_are_those_of_one_microbatch(batch):
    mesh = make_mesh()
    large = {k: np.repeat(v, 32, axis=0) for k, v in batch.items()}

    def temporary(microbatch, rows=32 * 16):
        it = make(mesh, microbatch=microbatch)
        on = to_device({k: v[:rows] for k, v in large.items()}, mesh)
        compiled = it.update.lower(it.state, it.tally, on).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    whole, small, eighth = temporary(0), temporary(64), temporary(0, rows=64)
    assert small < 0.4 * whole
    assert small < 2 * eighth


def test_a_loss_that_asks_for_ids_and_seed_gets_them(batch):
    mesh, seen = make_mesh(), {}

    def loss_fn(zimg, ztxt, t, b, mask, *, ids, seed):
        seen.update(ids=ids.shape, seed=seed.dtype)
        same = jnp.sum(jnp.any(ids[:, None] == ids[None], axis=-1))
        return definitions.sigmoid_loss(zimg, ztxt, t, b, mask) * 0 + same

    # Rows 0 and 1 share a caption, 2 and 3 an image; each row is its own duplicate.
    text, index = batch["text"].copy(), np.arange(16, dtype=np.int32)
    text[1], index[3] = text[0], index[2]
    _, _, metrics = run(
        make(mesh, Loss(loss_fn, needs=("ids", "seed"))), {**batch, "text": text, "index": index}
    )
    assert metrics["loss"] == 16 + 4
    assert seen == {"ids": (16, 2), "seed": jnp.uint32}


def test_masked_examples_are_counted_and_their_content_does_not_matter(batch):
    masked = {**batch, "mask": np.arange(16) != 3}
    other = {**masked, "image": masked["image"].copy(), "text": masked["text"].copy()}
    other["image"][3], other["text"][3] = 9, 9
    one, tally, _ = run(make(make_mesh()), masked)
    two, _, _ = run(make(make_mesh()), other)
    assert_close(one.params, two.params, rtol=1e-6, atol=1e-6)
    assert tally.bad.tolist() == [1] + [0] * (len(tally.bad) - 1)
    assert tally.first_nonfinite == train_state.NONE


def test_a_step_that_is_not_finite_changes_nothing_and_is_remembered(batch):
    mesh = make_mesh()

    def loss_fn(zimg, ztxt, t, b, mask):
        loss = definitions.sigmoid_loss(zimg, ztxt, t, b, mask)
        return jnp.where(mask.all(), loss, jnp.nan)  # a masked row poisons

    it = make(mesh, Loss(loss_fn))
    state, tally, _ = it.update(it.state, it.tally, to_device(batch, mesh))
    before = jax.device_get(state)
    bad = to_device({**batch, "mask": np.arange(16) != 3}, mesh)
    state, tally, _ = it.update(state, tally, bad)
    state, tally, metrics = it.update(state, tally, bad)
    assert_close(jax.device_get(state), before, rtol=0, atol=0)
    assert int(tally.first_nonfinite) == 2
    assert np.isnan(metrics["loss"])


def test_metrics_of_a_step(batch):
    _, _, metrics = run(make(make_mesh(), log_every=2), batch)
    assert metrics["t"] == pytest.approx(10, rel=1e-6) and metrics["b"] == -10
    for name in ("pos_logit_mean", "pos_logit_max", "neg_logit_mean", "neg_logit_max"):
        assert np.isnan(metrics[name])  # not due
    _, _, metrics = run(make(make_mesh(), log_every=2), batch, batch)
    assert metrics["neg_logit_mean"] <= metrics["neg_logit_max"] <= 0.1
    assert metrics["pos_logit_mean"] <= metrics["pos_logit_max"] <= 0.1
    for name in ("grad_norm", "update_norm", "param_norm", "lr"):
        assert metrics[name] > 0


def test_patch_dropping_depends_on_seed_and_step_only(batch):
    it, again = (make(make_mesh(), drop_patches=0.5) for _ in range(2))
    one, _, first = run(it, batch, batch)
    two, _, second = run(again, batch, batch)
    assert_close(one, two, rtol=0, atol=0)
    assert first["loss"] == second["loss"]
    _, _, whole = run(make(make_mesh()), batch)
    _, _, dropped = run(make(make_mesh(), drop_patches=0.5), batch)
    assert whole["loss"] != dropped["loss"]
