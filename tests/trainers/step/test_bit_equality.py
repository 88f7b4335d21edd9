"""The general step gives the bits of a step written by hand for two towers and one loss.

So it is on one device. On several, XLA places the arrays of the step by hand and sums gradients in
an order of its own, that of each microbatch for itself: there the two agree to 1e-6.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from siglip.losses import LOSSES
from siglip.objectives.contrastive import make_contrastive
from siglip.sharding import batch_sharding, params_sharding, replicated, to_device
from siglip.towers.two_towers import make_model
from trainers.step.microbatches import Objectives
from trainers.step.train_state import TrainState

N, VOCAB = 16, 600  # the table of tokens is large enough to be split over fsdp
SIZES = dict(width=32, depth=1, mlp_dim=32, num_heads=2)
SCALARS = ("t", "b")


def by_hand(model, loss, frozen, mesh, microbatch):
    """(params, batch, key) -> (loss, zimg, ztxt, grads), written for two towers alone."""

    def embed(params, key, part):
        params = {
            name: jax.lax.stop_gradient(tree) if name in frozen else tree
            for name, tree in params.items()
        }
        params = jax.lax.with_sharding_constraint(params, replicated(mesh))
        zimg, ztxt, out = model.apply(
            {"params": params},
            *(part.get("image"), part.get("text")),
            rows=part.get("row"),
            train=True,
            rngs={"dropout": key},
        )
        return *jax.lax.with_sharding_constraint((zimg, ztxt), batch_sharding(mesh)), *(
            out[name] for name in SCALARS
        )

    def whole(params, batch, key):
        def of(params):
            z = embed(params, key, batch)
            return loss(*z, batch["mask"]), z[:2]

        (value, z), grads = jax.value_and_grad(of, has_aux=True)(params)
        return value, *z, grads

    def in_microbatches(params, batch, key):
        parts = _split(batch, microbatch, mesh)
        z = jax.lax.map(lambda part: embed(params, key, part)[:2], parts)
        z = [_join(x, mesh) for x in z]
        scalars, pullback = jax.vjp(lambda params: embed(params, key, {})[2:], params)
        args = dict(zip(("img", "txt", *SCALARS), (*z, *scalars)))
        args = {name: x for name, x in args.items() if x is not None}
        learning = {name: x for name, x in args.items() if name not in frozen}
        value, dz = jax.value_and_grad(
            lambda some: loss(
                *({**args, **some}.get(k) for k in ("img", "txt", *SCALARS)), batch["mask"]
            )
        )(learning)
        dz = {name: dz.get(name, jnp.zeros_like(x)) for name, x in args.items()}

        def add(grads, part_and_dz):
            part, dz = part_and_dz
            _, pullback = jax.vjp(lambda params: embed(params, key, part)[:2], params)
            return jax.tree.map(jnp.add, grads, pullback(dz)[0]), None

        (grads,) = pullback(tuple(dz.get(name) for name in SCALARS))
        dz = _split((dz["img"], dz["txt"]), microbatch, mesh)
        grads, _ = jax.lax.scan(add, grads, (parts, dz))
        return value, *z, grads

    return in_microbatches if microbatch else whole


def _split(tree, size: int, mesh):
    """[N, ...] -> [N / size, size, ...] where every row stays on its device."""
    local, axes = size // mesh.size, mesh.axis_names
    return jax.shard_map(
        lambda tree: jax.tree.map(lambda x: x.reshape(-1, local, *x.shape[1:]), tree),
        mesh=mesh,
        in_specs=PartitionSpec(axes),
        out_specs=PartitionSpec(None, axes),
    )(tree)


def _join(x, mesh):
    """The inverse of `_split` for one array."""
    axes = mesh.axis_names
    return jax.shard_map(
        lambda x: x.reshape(-1, *x.shape[2:]),
        mesh=mesh,
        in_specs=PartitionSpec(None, axes),
        out_specs=PartitionSpec(axes),
    )(x)


def mesh_of(devices: int, fsdp: int = 1):
    axis_types = (jax.sharding.AxisType.Auto,) * 2
    shape = devices // fsdp, fsdp
    return jax.make_mesh(
        shape, ("data", "fsdp"), axis_types=axis_types, devices=jax.devices()[:devices]
    )


def assert_close(x, y):
    atol = 1e-6 * max(1.0, np.abs(y).max(initial=0))
    np.testing.assert_allclose(x, y, rtol=0, atol=atol)


def assert_same_bits(x, y):
    np.testing.assert_array_equal(np.asarray(x).view(np.uint32), np.asarray(y).view(np.uint32))


@pytest.mark.parametrize(
    "name, devices, fsdp, microbatch, frozen",
    [
        ("sigmoid", 1, 1, 0, ()),
        ("sigmoid", 1, 1, 4, ("img",)),
        ("softmax", 1, 1, 4, ()),
        ("sigmoid", 4, 1, 0, ("txt",)),
        ("sigmoid", 4, 2, 8, ()),
        ("sigmoid", 8, 1, 8, ("txt", "t")),
        ("sigmoid", 8, 4, 0, ()),
        ("softmax", 1, 1, 0, ()),
        ("softmax", 4, 1, 8, ()),
        ("softmax", 8, 4, 0, ("img",)),
    ],
)
def test_two_updates_are_those_of_the_step_by_hand(name, devices, fsdp, microbatch, frozen):
    mesh = mesh_of(devices, fsdp)
    model = make_model(
        b_init=-10.0 if name == "sigmoid" else None,
        img=dict(variant="mu/8", drop_patches=0.5, **SIZES),
        txt=dict(variant="mu", vocab_size=VOCAB, **SIZES),
    )
    loss = LOSSES[name](mesh)
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (N, 16, 16, 3), np.uint8),
        "text": rng.integers(0, VOCAB, (N, 6)).astype(np.int32),
        "mask": np.arange(N) != 3,
    }
    inputs = batch["image"][:1], batch["text"][:1]
    params = jax.jit(model.init)(jax.random.key(0), *inputs)["params"]
    is_frozen = {k: jax.tree.map(lambda _, k=k: k in frozen, v) for k, v in params.items()}
    terms = {"contrastive": make_contrastive(model, mesh, loss)}
    objectives = Objectives(model, terms, is_frozen, mesh, microbatch)
    hand = by_hand(model, loss, frozen, mesh, microbatch)

    def general(params, batch, key):
        state = TrainState(jnp.int32(0), params, (), {}, {})
        got = objectives(state, batch, {"mask": batch["mask"]}, key)
        z = got.z["contrastive"]
        return got.loss, z["img"], z["txt"], got.grads

    def directly(params, batch, key):
        return hand(params, {**batch, "row": jnp.arange(N, dtype=jnp.int32)}, key)

    tx = optax.sgd(0.1, momentum=0.9)

    def train(loss_and_grads):
        def update(params, opt_state, batch, key):
            *value_and_z, grads = loss_and_grads(params, batch, key)
            updates, opt_state = tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, value_and_z, grads

        state = params, tx.init(params)
        place = params_sharding(state, mesh)
        now, opt_state = jax.device_put(state, place)
        update = jax.jit(update, out_shardings=(*place, None, None))
        seen = []
        for step in range(2):
            now, opt_state, *others = update(
                now, opt_state, to_device(batch, mesh), jax.random.key(step)
            )
            seen.append((now, opt_state, others))
        return jax.device_get(seen)

    got, want = train(general), train(directly)
    jax.tree.map(assert_same_bits if devices == 1 else assert_close, got, want)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))
    assert any(np.any(g != 0) for g in jax.tree.leaves(got[1][-1][-1]))
