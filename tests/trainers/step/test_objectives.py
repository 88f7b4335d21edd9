"""Any objective through the step equals plain autodiff, in parts, frozen or not, with a teacher."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from siglip import sharding
from siglip.losses import LOSSES
from siglip.objectives.contrastive import make_contrastive
from siglip.objectives.objective import Objective, Part, Rows, objective_key
from siglip.sharding import make_mesh, to_device
from siglip.towers.two_towers import make_model
from trainers.step.averaging import Average
from trainers.step.microbatches import Objectives, Outcome
from trainers.step.train_state import TrainState, init_params, make_state, new_tally, with_params
from trainers.step.update import _metrics, make_update

SIZES = dict(width=16, depth=1, mlp_dim=32, num_heads=2)
N, CLASSES, VOCAB = 16, 5, 50
WEIGHTS = {"contrastive": 1.0, "classes": 0.5, "teacher": 0.25}


@pytest.fixture(scope="module")
def model():
    return make_model(
        img=dict(variant="mu/8", **SIZES), txt=dict(variant="mu", vocab_size=VOCAB, **SIZES)
    )


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(fsdp=2)


@pytest.fixture(scope="module")
def batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (N, 16, 16, 3), np.uint8),
        "text": rng.integers(0, VOCAB, (N, 6)).astype(np.int32),
        "mask": np.arange(N) != 3,
    }


def make_classes(model, mesh) -> Objective:
    """A sum over examples, with a head of its own: the class of an image is its first token."""

    def init(key, params):
        del params
        return {"classes": jax.random.normal(key, (model.img.width, CLASSES))}

    def rows(params, averaged, carried, part, key) -> Rows:
        del averaged, carried, key
        logits = part.img(params)[0] @ params["classes"]
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, part.batch["text"][:, 0] % 5)
        return Rows(total=jnp.sum(nll, where=part.batch["mask"]))

    return Objective(rows, init=init, weight=WEIGHTS["classes"])


def make_teacher(model, mesh) -> Objective:
    """Self-distillation: a moving average of the image tower teaches noisy embeddings, centred,
    and the cosines of the batch."""

    def rows(params, averaged, carried, part, key) -> Rows:
        def noise(row):
            return 0.1 * jax.random.normal(jax.random.fold_in(key, row), (model.img.width,))

        teacher, mask = part.img(averaged)[0], part.batch["mask"][:, None]
        target = jax.nn.softmax((teacher - carried["centre"][None]) / 0.04)
        student = part.img(params)[0] + jax.vmap(noise)(part.batch["row"])
        nll = -target * jax.nn.log_softmax(student / 0.1)
        total, stats = (
            jnp.sum(x, axis=axis, where=mask) for x, axis in ((nll, None), (teacher, 0))
        )
        return Rows({"img": part.img(params)[0], "averaged/img": teacher}, total, stats)

    def batch(z, params, facts):
        return jnp.mean((z["img"] @ z["img"].T - z["averaged/img"] @ z["averaged/img"].T) ** 2)

    def carry(carried, stats, count):
        return {"centre": 0.9 * carried["centre"] + 0.1 * stats / count}

    return Objective(
        rows,
        batch=batch,
        start=lambda: {"centre": jnp.zeros(model.img.width)},
        carry=carry,
        weight=WEIGHTS["teacher"],
    )


def make_spread(model, mesh) -> Objective:
    """A function of the whole batch alone: image embeddings of different first tokens lie apart
    from each other, and so do tokens of an inner block."""

    def rows(params, averaged, carried, part, key) -> Rows:
        zimg, out = part.img(params)
        inner = jnp.mean(out["block:0"], axis=1)
        return Rows({"img": zimg, "img/inner": inner, "token": part.batch["text"][:, 0]})

    def batch(z, params, facts):
        apart = z["token"][:, None] != z["token"][None]
        cosines = z["img"] @ z["img"].T + z["img/inner"] @ z["img/inner"].T / 16
        return jnp.mean(jnp.exp(cosines), where=apart)

    return Objective(rows, batch=batch, capture=("img/block:0",))


@pytest.fixture(scope="module")
def objectives(model, mesh):
    return {
        "contrastive": make_contrastive(model, mesh, LOSSES["sigmoid"](mesh)),
        "spread": make_spread(model, mesh),
        "classes": make_classes(model, mesh),
        "teacher": make_teacher(model, mesh),
    }


@pytest.fixture(scope="module")
def state(model, objectives, batch):
    params = init_params(
        model, objectives, jax.random.key(0), (batch["image"][:1], batch["text"][:1])
    )
    averaged = {"img": jax.tree.map(lambda p: 0.9 * p, params["img"])}
    return TrainState(
        jnp.int32(0), params, (), averaged, {"teacher": {"centre": jnp.full(16, 0.1)}}
    )


def directly(model, objectives, state, batch, key):
    """The definition: every objective on the whole batch at once, summed, one jax.grad."""

    def loss(params):
        total, count, stats = 0.0, batch["mask"].sum(), {}
        for name, objective in objectives.items():
            part = Part(model, {**batch, "row": jnp.arange(N)}, key, objective.capture)
            carried = state.carried.get(name, {})
            z, of_rows, stats[name] = objective.rows(
                params, state.averaged, carried, part, objective_key(key, name)
            )
            total += objective.weight * of_rows / count
            if objective.batch is not None:
                own = {k: params[k] for k in objective.reads}
                total += objective.weight * objective.batch(z, own, {"mask": batch["mask"]})
        return total, stats

    (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
    return value, grads, stats


@pytest.fixture(scope="module")
def wanted(model, objectives, state, batch):
    key = jax.random.key(7)
    return jax.jit(lambda s, b: directly(model, objectives, s, b, key))(state, batch)


@pytest.mark.parametrize("frozen", [(), ("img",), ("txt", "t")], ids=str)
@pytest.mark.parametrize("parts", [1, 2, 8])
def test_every_kind_of_objective_equals_plain_autodiff(
    model, mesh, objectives, state, batch, wanted, parts, frozen, monkeypatch
):
    monkeypatch.setattr(sharding, "SMALL", 64)  # with fsdp=2: a teacher and a head are split too
    mesh = make_mesh_of_two(fsdp=2 if parts == 2 else 1)
    terms = {**objectives, "contrastive": make_contrastive(model, mesh, LOSSES["sigmoid"](mesh))}
    is_frozen = {k: jax.tree.map(lambda _, k=k: k in frozen, v) for k, v in state.params.items()}
    step = Objectives(model, terms, is_frozen, mesh, N // parts if parts > 1 else 0)

    def of(state, batch):
        got = step(state, batch, {"mask": batch["mask"]}, jax.random.key(7))
        return got.loss, got.grads, got.stats

    loss, grads, stats = jax.jit(of)(state, to_device(batch, mesh))
    value, all_grads, all_stats = wanted
    expected = {
        k: jax.tree.map(jnp.zeros_like, v) if k in frozen else v for k, v in all_grads.items()
    }
    np.testing.assert_allclose(loss, value, rtol=1e-6)
    for name in expected:
        largest = max(1.0, *(float(jnp.abs(x).max()) for x in jax.tree.leaves(all_grads[name])))
        assert_close(grads[name], expected[name], atol=1e-6 * largest)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), stats, all_stats)


def assert_close(a, b, atol):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=atol), a, b)


def make_mesh_of_two(fsdp=1):
    axis_types = (jax.sharding.AxisType.Auto,) * 2
    shape = 2 // fsdp, fsdp
    return jax.make_mesh(shape, ("data", "fsdp"), axis_types=axis_types, devices=jax.devices()[:2])


def test_a_z_that_leads_to_nothing_that_learns_gets_no_gradient(model, objectives, state, batch):
    """The losses save the matmul of such a gradient: a teacher's, a frozen tower's, integers'."""
    rng = np.random.default_rng(1)
    z = {name: jnp.asarray(rng.normal(size=(N, 16)), jnp.float32) for name in ("img", "img/inner")}
    spread = {**z, "token": jnp.arange(N)}
    teacher = {"img": z["img"], "averaged/img": z["img/inner"]}
    mesh, facts = make_mesh_of_two(), {"mask": jnp.ones(N, bool)}
    terms = {name: objectives[name] for name in ("spread", "teacher")}

    def gradients(*frozen):
        tree = {k: jax.tree.map(lambda _, k=k: k in frozen, v) for k, v in state.params.items()}
        step = Objectives(model, terms, tree, mesh)
        _, _, dz, _ = step._batch({"spread": spread, "teacher": teacher}, state.params, facts)
        return {f"{of}:{k}": bool(jnp.any(g != 0)) for of, z in dz.items() for k, g in z.items()}

    img = {"spread:img": True, "spread:img/inner": True, "teacher:img": True}
    assert gradients() == {**img, "teacher:averaged/img": False}
    assert gradients("img") == {**dict.fromkeys(img, False), "teacher:averaged/img": False}


TEACHER = Average(what=("img",), decay=0.9)


def make(model, mesh, objectives, batch, *, average=TEACHER):
    tx = optax.sgd(1e-2, momentum=0.9)
    inputs = batch["image"][:1], batch["text"][:1]
    abstract, init = make_state(model, objectives, tx, mesh, seed=0, inputs=inputs, average=average)
    update = make_update(
        model,
        objectives,
        tx,
        lambda step: jnp.float32(1e-2),
        jax.tree.map(lambda _: False, abstract.params),
        mesh,
        jax.tree.map(lambda x: x.sharding, abstract),
        seed=0,
        log_every=1,
        average=average,
    )
    return types.SimpleNamespace(
        abstract=abstract, state=init(), tally=new_tally(mesh), update=update
    )


@pytest.fixture(scope="module")
def compiled(model, objectives, batch, mesh):
    return make(model, mesh, objectives, batch)


def fresh(compiled):
    return jax.tree.map(jnp.copy, (compiled.state, compiled.tally))


def test_averages_follow_the_parameters_and_carried_state_the_statistics(compiled, batch, mesh):
    state, tally = fresh(compiled)
    before = jax.device_get(state)
    state, tally, _ = compiled.update(state, tally, to_device(batch, mesh))
    after = jax.device_get(state)
    expected = jax.tree.map(
        lambda a, p: 0.9 * a + 0.1 * p, before.averaged["img"], after.params["img"]
    )
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), after.averaged["img"], expected
    )
    changed = jax.tree.map(lambda x, y: not np.array_equal(x, y), after.averaged, before.averaged)
    assert any(jax.tree.leaves(changed))
    assert np.any(after.carried["teacher"]["centre"] != 0)


def test_averages_are_sharded_like_parameters_and_start_as_copies_of_them(compiled):
    shardings = jax.tree.map(
        lambda p, a: p.sharding == a.sharding,
        compiled.state.params["img"],
        compiled.state.averaged["img"],
    )
    assert all(jax.tree.leaves(shardings))
    other = jax.tree.map(lambda p: p + 1, compiled.state.params)
    started = with_params(compiled.state, other)
    jax.tree.map(np.testing.assert_array_equal, started.averaged["img"], other["img"])
    assert all(
        x is not y
        for x, y in zip(jax.tree.leaves(started.averaged["img"]), jax.tree.leaves(other["img"]))
    )


def test_logs_have_each_objectives_loss_and_the_temperature(compiled, batch, mesh):
    state, tally = fresh(compiled)
    _, _, metrics = compiled.update(state, tally, to_device(batch, mesh))
    of = {
        name: float(metrics[f"objective/{name}"])
        for name in ("contrastive", "spread", "classes", "teacher")
    }
    assert float(metrics["loss"]) == pytest.approx(
        sum(WEIGHTS.get(name, 1.0) * value for name, value in of.items()), rel=1e-5
    )
    assert {"t", "b", "neg_logit_max"} <= set(metrics)


def test_the_guard_covers_averages_and_carried_state(model, mesh, objectives, batch):
    def rows(params, averaged, carried, part, key) -> Rows:
        poison = jnp.where(part.batch["mask"].all(), 0.0, jnp.inf)  # only in what is carried
        return Rows(total=0.0 * jnp.sum(params["t"]), stats=poison)

    poisoned = Objective(rows, start=lambda: jnp.float32(0), carry=lambda c, stats, n: c + stats)
    terms = {"contrastive": objectives["contrastive"], "poisoned": poisoned}
    it = make(model, mesh, terms, batch)
    state, tally = it.state, it.tally
    before = jax.device_get(state)
    state, tally, metrics = it.update(state, tally, to_device(batch, mesh))
    assert np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"])
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), before)
    assert int(tally.first_nonfinite) == 1


def test_objectives_that_call_the_same_tower_share_its_passes(model, mesh, objectives, batch):
    def flops(*names):
        it = make(model, mesh, {name: objectives[name] for name in names}, batch, average=Average())
        program = it.update.lower(it.state, it.tally, to_device(batch, mesh)).compile()
        return program.cost_analysis()["flops"]

    alone = flops("contrastive")
    assert flops("contrastive", "classes", "spread") < 1.1 * alone


def test_mistakes_of_an_objective_are_named(model, mesh, objectives, batch):
    inputs = batch["image"][:1], batch["text"][:1]
    taken = Objective(lambda *_: Rows(), init=lambda key, params: {"img": {}})
    with pytest.raises(ValueError, match="objective 'x' adds parameters 'img', a taken name"):
        init_params(model, {"x": taken}, jax.random.key(0), inputs)
    for name in ("averaged", "carried"):  # branches of the state
        hidden = Objective(lambda *_: Rows(), init=lambda key, params, name=name: {name: {}})
        with pytest.raises(ValueError, match=f"objective 'x' adds parameters '{name}', a taken"):
            init_params(model, {"x": hidden}, jax.random.key(0), inputs)
    lost = Objective(
        lambda *_: Rows({"image": jnp.ones((N, 2))}), batch=lambda z, p, f: z["image"].sum()
    )
    with pytest.raises(
        ValueError, match=r"objective 'x' calls a z 'image'.*there are b, img, t, txt"
    ):
        it = make(model, mesh, {"x": lost}, batch, average=Average())
        it.update(it.state, it.tally, to_device(batch, mesh))
    lost = Objective(lambda *_: Rows(), reads=("t", "hed"))
    with pytest.raises(ValueError, match="objective 'x' reads parameters 'hed'; there are b, img"):
        init_params(model, {"x": lost}, jax.random.key(0), inputs)
    with pytest.raises(ValueError, match="an objective asks for 'idz'; facts of a batch are ids"):
        Objective(lambda *_: Rows(), needs=("idz",))
    with pytest.raises(ValueError, match="there are no parameters 'image'"):
        Average(what=("image",)).check({"img": {}})
    with pytest.raises(ValueError, match="decay must be in"):
        Average(what=("img",), decay=1.0)
    with pytest.raises(ValueError, match=r"decay=0\.9 averages nothing.*set what"):
        Average(decay=0.9)
    with pytest.raises(ValueError, match="both start and carry"):
        Objective(lambda *_: Rows(), start=lambda: {})


def test_a_metric_of_an_objective_never_hides_that_of_the_step_or_of_another():
    def logging(**scalars):
        rows = lambda *_: Rows()  # noqa: E731
        metrics = {name: jnp.float32(value) for name, value in scalars.items()}
        return Objective(rows, metrics=lambda z, params, facts, logged: metrics)

    terms = {"a": logging(loss=1, own=2, same=3), "b": logging(same=4)}
    losses = {"a": jnp.float32(5), "b": jnp.float32(6)}
    outcome = Outcome(jnp.float32(11), losses, grads={}, z={"a": {}, "b": {}}, stats={})
    assert _metrics(terms, outcome, {}, {}, jnp.bool_(True)) == {
        "a/loss": 1, "own": 2, "a/same": 3, "b/same": 4, "objective/a": 5, "objective/b": 6
    }  # fmt: skip
