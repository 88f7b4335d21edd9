"""Training on what is not a square: NaFlex patches, and embeddings of a frozen tower (SigLiT)."""

import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from tiny_run import Tiny, events, losses, results

from base.errors import UserError
from evaluators.embed import eval_image
from input_pipeline.loader import train_batches
from input_pipeline.sources.in_memory import Memory
from siglip.leaf_names import path_name
from siglip.losses import ring
from siglip.objectives.contrastive import make_contrastive
from siglip.sharding import AXES, make_mesh, to_device
from siglip.towers.two_towers import make_model
from siglip.towers.vit import Patches, images_of
from trainers import setup
from trainers.step import train_state
from trainers.step.update import make_update

SIZES = dict(width=32, depth=1, mlp_dim=64, num_heads=2)
NAFLEX = {
    "model__img__drop_patches": 0,
    "model__img__naflex_grid": 4,
    "input__image": "decode | naflex(max_patches=18, patch_size=4)",
}
READY = {
    "model__img__variant": "precomputed",
    "model__img__drop_patches": 0,
    "input__image": "embedding",
    **{f"model__img__{name}": None for name in ("depth", "mlp_dim", "num_heads")},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("tiny"))


def batch(kind: str) -> dict[str, np.ndarray]:
    """Sixteen pairs, one of them bad."""
    rng = np.random.default_rng(0)
    made = {
        "text": rng.integers(0, 600, (16, 6)).astype(np.int32),
        "mask": np.ones(16, bool),
    }
    if kind == "squares":
        return {**made, "image": rng.integers(0, 256, (16, 16, 16, 3), np.uint8)}
    made["mask"][3] = False
    if kind == "embeddings":
        image = rng.normal(size=(16, 32)).astype(np.float32)
    else:
        image = rng.integers(0, 256, (16, 12, 192), np.uint8)
        shape = np.stack([rng.integers(1, 4, 16), rng.integers(1, 5, 16)], axis=1)
        shape[3] = 0
        made["image_shape"] = shape.astype(np.int32)
        made["image_mask"] = np.arange(12) < shape.prod(axis=1, keepdims=True)
    image[3] = 0
    return {**made, "image": image}


TOWERS = {
    "squares": dict(variant="mu/8", **SIZES),
    "patches": dict(variant="mu/8", naflex_grid=3, **SIZES),
    "embeddings": dict(variant="precomputed", width=32),
}


def make(kind: str, mesh, frozen=lambda name: False, microbatch=0, **loss):
    model = make_model(img=TOWERS[kind], txt=dict(variant="mu", vocab_size=600, **SIZES))
    tx = optax.sgd(1e-2, momentum=0.9)
    rows = {k: v[:1] for k, v in batch(kind).items()}
    objectives = {
        "contrastive": make_contrastive(model, mesh, ring.make_sigmoid_loss(mesh, **loss))
    }
    abstract, init = train_state.make_state(
        model, objectives, tx, mesh, seed=0, inputs=(images_of(rows), rows["text"])
    )
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
        log_every=1,
        microbatch=microbatch,
    )
    return types.SimpleNamespace(
        state=init(), update=update, mesh=mesh, tally=train_state.new_tally(mesh)
    )


def run(it, batch, steps=2):
    state, tally, told = it.state, it.tally, []
    for _ in range(steps):
        state, tally, metrics = it.update(state, tally, to_device(batch, it.mesh))
        told.append(float(metrics["loss"]))
    return jax.device_get(state), told


def program(it, batch) -> str:
    return it.update.lower(it.state, it.tally, to_device(batch, it.mesh)).compile().as_text()


@pytest.mark.parametrize("kind, fsdp", [("patches", 2), ("embeddings", 1)])
def test_microbatches_give_the_same_losses_and_update(kind, fsdp):
    mesh = make_mesh(fsdp=fsdp)
    (got, one), (want, other) = (
        run(make(kind, mesh, microbatch=microbatch), batch(kind)) for microbatch in (8, 0)
    )
    assert np.isfinite(one).all() and one[1] < one[0]
    np.testing.assert_allclose(one, other, rtol=1e-5)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), got.params, want.params
    )
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))


def test_only_the_text_side_of_a_precomputed_tower_learns():
    it = make("embeddings", make_mesh())
    before = jax.device_get(it.state.params)
    state, told = run(it, batch("embeddings"), steps=6)
    assert told[-1] < told[0]
    assert set(state.params) == {"txt", "t", "b"}
    for name in ("t", "b"):
        assert np.any(state.params[name] != before[name])
    assert np.any(state.params["txt"]["head"]["kernel"] != before["txt"]["head"]["kernel"])


@pytest.mark.parametrize("microbatch", [0, 8])
def test_a_precomputed_tower_saves_its_matmul_and_its_hops_in_the_loss(microbatch):
    # As tests/trainers/step/test_update.py counts for a frozen tower: embeddings and mask make
    # D - 1 hops each and an accumulator would make D; logit statistics have 2 in a loop.
    mesh = make_mesh()
    it = make("embeddings", mesh, microbatch=microbatch, exchange="ring", unroll=8)
    text = program(it, batch("embeddings"))
    assert len(re.findall(r"= \S+ collective-permute(?:-start)?\(", text)) == 2 * 7 + 2


def test_a_step_with_a_precomputed_tower_has_a_matmul_less_than_with_one_that_learns():
    # One device and one tile, so that every matmul of the program is run once.
    axes = (AxisType.Auto,) * 2
    mesh = jax.make_mesh((1, 1), AXES, axis_types=axes, devices=jax.devices()[:1])
    loss_fn = ring.make_sigmoid_loss(mesh, exchange="gather", tile=16)
    model = make_model(img=TOWERS["embeddings"], txt=dict(variant="mu", vocab_size=600, **SIZES))
    rows = {k: jnp.asarray(v) for k, v in batch("embeddings").items()}
    params = model.init(jax.random.key(0), rows["image"], rows["text"])["params"]

    def loss(params, image):
        zimg, ztxt, out = model.apply({"params": params}, image, rows["text"])
        return loss_fn(zimg, ztxt, out["t"], out["b"], rows["mask"])

    def matmuls(argnums):
        text = jax.jit(jax.grad(loss, argnums)).lower(params, rows["image"]).compile().as_text()
        return len(re.findall(r"= \S+ (?:dot|custom-call)\(", text))

    assert matmuls((0,)) == matmuls((0, 1)) - 1  # as if a tower stood behind the images


def test_a_run_on_patches_trains_evaluates_and_embeds_in_microbatches(tiny, tmp_path):
    kept = {**NAFLEX, "total": "3 steps", "checkpoint__every": "9 steps"}
    tiny.train(tmp_path / "whole", evals="val+retrieval+zeroshot", **kept)
    tiny.train(tmp_path / "parts", evals="", input__microbatch=8, **kept)
    found = losses(tmp_path / "whole")
    assert len(found) == 3 and np.isfinite(found).all()
    np.testing.assert_allclose(losses(tmp_path / "parts"), found, rtol=1e-5)
    assert {e["bad_examples"] for e in events(tmp_path / "whole") if "loss" in e} == {0}
    told = results(tmp_path / "whole")
    for name, metric in (("val", "loss"), ("retrieval", "t2i_R@5"), ("zeroshot", "top1")):
        assert np.isfinite(told[name][metric]["value"])
    table = (tmp_path / "whole" / "parameters.txt").read_text()
    assert "(4, 4, 16)" in table and "(48, 16)" in table  # positions, and a Dense embedding


def test_inputs_have_the_shapes_of_batches(tiny):
    image, text = setup.make_setup(tiny.load(**NAFLEX)).inputs
    assert isinstance(image, Patches) and text.shape == (1, 24)
    assert [x.shape for x in image] == [(1, 18, 48), (1, 18), (1, 2)]
    assert [x.dtype for x in image] == [np.uint8, bool, np.int32]
    image, _ = setup.make_setup(tiny.load(**READY)).inputs
    assert image.shape == (1, 16) and image.dtype == np.float32
    image, _ = setup.make_setup(tiny.load()).inputs
    assert image.shape == (1, 16, 16, 3) and image.dtype == np.uint8


def test_embeddings_of_another_width_are_refused_by_name(tiny):
    """Before anything is trained: the loader makes a row to see its shapes."""
    source = Memory(images=np.ones((16, 17), np.float32), texts=["a"] * 16, ids=list("abcd" * 4))
    things = setup.make_setup(tiny.load(**READY))
    told = "embedding of a has 17 numbers, the model takes config.model.img.width=16"
    with pytest.raises(UserError, match=told):
        next(train_batches(source, things.preprocess, batch_size=8, seed=0))
    with pytest.raises(UserError, match=told):
        eval_image(things.preprocess, source[0])


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"input__image": "hf-naflex"},
            "config.input.image ends in naflex, but this image tower takes squares; set "
            "config.model.img.naflex_grid",
        ),
        (
            {**NAFLEX, "input__image": "decode | resize"},
            "naflex_grid=4 makes a tower of patches, but config.input.image makes squares",
        ),
        (
            {**NAFLEX, "input__image": "hf-naflex"},
            r"makes patches of 16 pixels .* takes patches of 4; end .*`naflex\(patch_size=4\)`",
        ),
        ({"input__image": "embedding"}, "variant='precomputed' and .* go together"),
        ({**READY, "input__image": "hf-siglip"}, "go together"),
    ],
)
def test_programs_that_make_what_the_tower_does_not_take_are_named(tiny, settings, message):
    with pytest.raises(UserError, match=message) as error:
        setup.make_setup(tiny.load(**settings))
    assert "\n" not in str(error.value)
