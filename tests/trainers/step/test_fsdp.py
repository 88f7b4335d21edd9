"""Parameters split over devices: the step is that of one device, and moves no more than it must."""

import collections
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fsdp_traffic import sizes, traffic
from one_device import equations

from siglip import sharding
from siglip.losses import LOSSES, definitions
from siglip.objectives.contrastive import make_contrastive
from siglip.objectives.objective import Objective, Part, Rows
from siglip.sharding import make_mesh, params_sharding, to_device
from siglip.towers.two_towers import make_model
from siglip.towers.vit import images_of
from trainers.step.microbatches import Objectives
from trainers.step.train_state import TrainState

N, VOCAB, DEVICES = 16, 64, 8


@pytest.fixture(autouse=True)
def all_but_scalars_are_split(monkeypatch):
    monkeypatch.setattr(sharding, "SMALL", 512)


def make(width=64, depth=2, img=(), txt=(), **options):
    sizes = dict(width=width, depth=depth, mlp_dim=2 * width, num_heads=2)
    return make_model(
        img=dict(variant="mu/8", **sizes, **dict(img)),
        txt=dict(variant="mu", vocab_size=VOCAB, **sizes, **dict(txt)),
        t_init=2.0,  # gradients of about 1, whose rounding is about 1e-7
        **options,
    )


def make_batch(naflex=False):
    rng = np.random.default_rng(0)
    batch = {
        "text": rng.integers(0, VOCAB, (N, 6)).astype(np.int32),
        "mask": np.arange(N) != 3,
    }
    if not naflex:
        return batch | {"image": rng.integers(0, 256, (N, 16, 16, 3), np.uint8)}
    grid = rng.integers(1, 3, (N, 2)).astype(np.int32)
    return batch | {
        "image": rng.integers(0, 256, (N, 4, 8 * 8 * 3), np.uint8),
        "image_mask": np.arange(4) < grid.prod(axis=1, keepdims=True),
        "image_shape": grid,
    }


def init(model, batch):
    some = {key: x[:1] for key, x in batch.items()}
    return jax.jit(model.init)(jax.random.key(0), images_of(some), some["text"])["params"]


def gradients(model, terms, mesh, params, microbatch=0, frozen=()):
    """(params, batch) -> (loss, gradients)."""
    is_frozen = {k: jax.tree.map(lambda _, k=k: k in frozen, v) for k, v in params.items()}
    step = Objectives(model, terms, is_frozen, mesh, microbatch)

    def of(params, batch):
        state = TrainState(jnp.int32(0), params, (), {}, {})
        got = step(state, batch, {"mask": batch["mask"]}, jax.random.key(5))
        return got.loss, got.grads

    return of


def compiled(model, terms, mesh, params, batch, *, microbatch=0, frozen=()):
    """`gradients`, lowered for the mesh, and its arguments."""
    of = gradients(model, terms, mesh, params, microbatch, frozen)
    place = params_sharding(params, mesh)
    args = jax.device_put(params, place), to_device(batch, mesh)
    return jax.jit(of, out_shardings=(None, place)).lower(*args), args


def assert_equal(got, want, frozen=()):
    """To 1e-6 of the largest gradient of a subtree, which is about 1."""
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    for name, tree in want[1].items():
        if name in frozen:
            tree = jax.tree.map(jnp.zeros_like, tree)
        largest = max(1.0, *(float(jnp.abs(x).max()) for x in jax.tree.leaves(tree)))
        jax.tree.map(
            lambda x, y, atol=1e-6 * largest: np.testing.assert_allclose(x, y, rtol=0, atol=atol),
            *(got[1][name], tree),
        )


CASES = {
    "unrolled": dict(fsdp=4),
    "unrolled, again for the backward pass": dict(fsdp=8, remat="full", img={"drop_patches": 0.5}),
    "scan": dict(fsdp=2, scan=True, loss="softmax"),
    "scan, full": dict(fsdp=4, scan=True, remat="full", frozen=("txt", "t")),
    "scan, mlp, microbatches": dict(fsdp=4, scan=True, remat="mlp", microbatch=8),
    "frozen, microbatches": dict(fsdp=4, frozen=("img",), microbatch=8, loss="softmax"),
    "groups": dict(fsdp=2, remat="full", img={"group": 1}, txt={"group": 1}),
    "groups, scan, mlp": dict(fsdp=4, scan=True, remat="mlp", img={"group": 1}),
    "naflex": dict(fsdp=4, scan=True, img={"naflex_grid": 4}, txt={"pool": "map"}),
    "whole parameters, microbatches": dict(fsdp=1, microbatch=8, txt={"bottleneck": 32}),
}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_of_one_device(case):
    options = dict(CASES[case])
    fsdp, loss = options.pop("fsdp"), options.pop("loss", "sigmoid")
    run = {key: options.pop(key) for key in ("microbatch", "frozen") if key in options}
    model = make(b_init=-2.0 if loss == "sigmoid" else None, **options)
    batch, mesh = make_batch(naflex="naflex" in case), make_mesh(fsdp=fsdp)
    params = init(model, batch)
    terms = {"contrastive": make_contrastive(model, mesh, LOSSES[loss](mesh))}
    lowered, args = compiled(model, terms, mesh, params, batch, **run)

    def directly(params):
        zimg, ztxt, out = model.apply(
            {"params": params},
            *(images_of(batch), batch["text"]),
            train=True,
            rngs={"dropout": jax.random.key(5)},
        )
        if loss == "sigmoid":
            return definitions.sigmoid_loss(zimg, ztxt, out["t"], out["b"], batch["mask"])
        return definitions.softmax_loss(zimg, ztxt, out["t"], None, batch["mask"])

    want = jax.jit(jax.value_and_grad(directly))(params)
    assert_equal(lowered.compile()(*args), want, run.get("frozen", ()))


@pytest.mark.parametrize("remat", ["full", "mlp"])
def test_gradients_of_groups_are_added_up_in_float32(remat):
    group = {"group": 1}
    model = make(dtype="bfloat16", remat=remat, img=group, txt=group)
    batch, mesh = make_batch(), make_mesh(fsdp=2)
    params = init(model, batch)
    terms = {"contrastive": make_contrastive(model, mesh, LOSSES["sigmoid"](mesh))}
    kernels = {x.shape for x in jax.tree.leaves(params["img"]["Transformer"]) if x.ndim > 1}
    place = params_sharding(params, mesh)
    args = jax.device_put(params, place), to_device(batch, mesh)
    jaxpr = jax.make_jaxpr(gradients(model, terms, mesh, params))(*args).jaxpr
    sums = [
        var.aval.dtype
        for eqn in equations(jaxpr)
        if eqn.primitive.name == "scan"
        for var in eqn.outvars
        if var.aval.shape in kernels
    ]
    assert sums and set(sums) == {jnp.dtype("float32")}


def make_free(model) -> Objective:
    """An objective as for one device: it reads parameters of towers, changes others, and scans."""

    def rows(params, averaged, carried, part, key) -> Rows:
        table = params["txt"]["Embed_0"]["embedding"]
        halved = {**params, "img": jax.tree.map(lambda p: p / 2, params["img"])}
        logits = part.img(halved)[0] @ table.T + part.txt(params)[0] @ params["head"]

        def add(total, row_and_mask):
            row, mask = row_and_mask
            return total + jnp.where(mask, jax.nn.logsumexp(row), 0), None

        total, _ = jax.lax.scan(add, jnp.float32(0), (logits, part.batch["mask"]))
        return Rows(total=total)

    return Objective(rows)


@pytest.mark.parametrize("microbatch", [0, 8])
def test_an_objective_is_written_as_for_one_device(microbatch):
    model, batch, mesh = make(), make_batch(), make_mesh(fsdp=4)
    head = jax.random.normal(jax.random.key(1), (model.txt.width, VOCAB))
    params, free = {**init(model, batch), "head": head}, make_free(model)
    run = compiled(model, {"free": free}, mesh, params, batch, microbatch=microbatch)

    def directly(params):
        part = Part(model, {**batch, "row": jnp.arange(N)}, jax.random.key(5))
        return free.rows(params, {}, {}, part, None).total / batch["mask"].sum()

    assert_equal(run[0].compile()(*run[1]), jax.jit(jax.value_and_grad(directly))(params))


@pytest.mark.parametrize("fsdp", [1, 4])
@pytest.mark.parametrize("microbatch", [0, 8])
@pytest.mark.parametrize("scan, remat", [(True, "full"), (True, "mlp"), (False, "none")])
def test_bytes_between_devices(fsdp, microbatch, scan, remat):
    model, batch, mesh = make(scan=scan, remat=remat), make_batch(), make_mesh(fsdp=fsdp)
    params = init(model, batch)
    loss = LOSSES["sigmoid"](mesh, exchange="ring")  # its own exchange is by permutes
    terms = {"contrastive": make_contrastive(model, mesh, loss)}
    lowered, _ = compiled(model, terms, mesh, params, batch, microbatch=microbatch)
    found = traffic(lowered.compile().as_text(), DEVICES)
    block, rest, whole = sizes(params, mesh)
    assert (block > 10 * whole) == (fsdp > 1)
    parts = N // microbatch if microbatch else 1
    passes = (2 if microbatch else 1) + (remat == "full")  # embeddings first; again at the end
    gathered, scattered, summed = (
        {key[1:]: size for key, size in found.items() if key[0] == kind}
        for kind in ("all-gather", "reduce-scatter", "all-reduce")
    )
    if fsdp == 1:
        assert not scattered and sum(gathered.values()) < 1000  # the mask of the batch
    else:
        # XLA may take gathers that are the same for all microbatches out of their loop.
        most = parts * (passes * block + (2 if microbatch else 1) * rest)
        least = most if not microbatch else block + rest
        assert least - 1000 < sum(gathered.values()) < most + 1000
        if scan:  # layer by layer
            assert gathered[4, True] >= parts * passes * block
        assert sum(scattered.values()) == parts * (block + rest)
        assert {size for size, _ in (*gathered, *scattered)} <= {4, DEVICES}
    # Gradients are added up once a step: shards over `data`, what is not split over all devices.
    assert sum(size for (_, loop), size in summed.items() if loop) < 1000
    assert sum(summed.values()) == pytest.approx((block + rest) / fsdp + whole, abs=1000)


def test_matmuls_in_bfloat16_gather_their_kernels_in_it_and_sum_gradients_in_float32():
    model, batch, mesh = make(dtype="bfloat16", scan=True), make_batch(), make_mesh(fsdp=4)
    params = init(model, batch)
    terms = {"contrastive": make_contrastive(model, mesh, LOSSES["sigmoid"](mesh, exchange="ring"))}
    # Lowered, not compiled: XLA for CPUs makes float32 of all.
    text = compiled(model, terms, mesh, params, batch)[0].as_text()
    moved = collections.Counter()
    for kind in ("all_gather", "reduce_scatter"):
        for result in re.findall(
            rf'"stablehlo\.{kind}".*?-> tensor<([\dx]+x\w+)>', text, re.DOTALL
        ):
            *shape, dtype = result.split("x")
            if math.prod(map(int, shape)) >= 512:
                moved[kind, dtype] += 1
    assert set(moved) == {
        ("all_gather", "bf16"),
        ("all_gather", "f32"),
        ("reduce_scatter", "f32"),
    }
    kernels = [p for p, _ in jax.tree_util.tree_leaves_with_path(params) if "kernel" in str(p[-1])]
    assert moved["all_gather", "bf16"] == len(kernels)


def test_memory_falls_as_parameters_are_split_further():
    model, batch = make(width=128, depth=4, scan=True, remat="full"), make_batch()
    params = init(model, batch)

    def temporary(fsdp):
        mesh = make_mesh(fsdp=fsdp)
        terms = {"contrastive": make_contrastive(model, mesh, LOSSES["sigmoid"](mesh))}
        lowered, _ = compiled(model, terms, mesh, params, batch)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    one, two, eight = map(temporary, (1, 2, 8))
    assert two < 0.8 * one and eight < 0.5 * one
