"""What a TPU's compiler makes of a step whose parameters are split, for slices that are not here.

Here reduce-scatters must stay what they are: XLA makes an all-reduce of the whole of most others.
"""

import jax
import jax.numpy as jnp
import pytest
from fsdp_traffic import sizes, traffic
from jax.sharding import NamedSharding, PartitionSpec
from topologies import compile_for, devices_of

from siglip.losses import LOSSES
from siglip.objectives.contrastive import make_contrastive
from siglip.sharding import make_mesh, params_sharding
from siglip.towers.two_towers import make_model
from trainers.step.microbatches import Objectives
from trainers.step.train_state import TrainState

SIZES = dict(width=256, depth=2, mlp_dim=1024, num_heads=4)


@pytest.mark.parametrize("name, fsdp", [("v5e:4x8", 8), ("v4:2x2x4", 8)])
def test_gradients_are_reduce_scattered_and_layers_gathered_in_bfloat16(name, fsdp):
    mesh = make_mesh(devices_of(name), fsdp=fsdp)
    model = make_model(
        img=dict(variant="mu/16", **SIZES),
        txt=dict(variant="mu", vocab_size=1024, **SIZES),
        dtype="bfloat16",
        scan=True,
        remat="full",
    )
    n, rows = 8 * mesh.size, NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    batch = {
        key: jax.ShapeDtypeStruct((n, *shape), dtype, sharding=rows)
        for key, shape, dtype in (
            ("image", (64, 64, 3), jnp.uint8),
            ("text", (16,), jnp.int32),
            ("mask", (), bool),
        )
    }
    some = (jnp.zeros((1, *batch[key].shape[1:]), batch[key].dtype) for key in ("image", "text"))
    params = jax.eval_shape(model.init, jax.random.key(0), *some)["params"]
    place = params_sharding(params, mesh)
    placed = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, place
    )
    loss = LOSSES["sigmoid"](mesh, exchange="ring")
    terms = {"contrastive": make_contrastive(model, mesh, loss)}
    frozen = jax.tree.map(lambda _: False, params)
    step = Objectives(model, terms, frozen, mesh)

    def of(params, batch):
        state = TrainState(jnp.int32(0), params, (), {}, {})
        grads = step(state, batch, {"mask": batch["mask"]}, jax.random.key(5)).grads
        return jax.lax.with_sharding_constraint(grads, place)

    # Quickly: the bytes are right, and no collective is hidden in an asynchronous fusion.
    program = compile_for(of, placed, batch, exec_time_optimization_effort=-1.0)
    found = traffic(program.as_text(), mesh.size)
    kernels, others, whole = sizes(params, mesh)
    total = {
        kind: sum(size for key, size in found.items() if key[0] == kind)
        for kind in ("all-gather", "reduce-scatter", "all-reduce")
    }
    # Blocks twice, in two bytes; what is outside of them once, in four at most.
    assert 2 * kernels / 2 < total["all-gather"] <= 1.05 * (2 * kernels / 2 + others)
    assert total["reduce-scatter"] == pytest.approx(kernels + others, rel=0.05)
    # Over `data` shards, which lie padded; over `fsdp` nothing but what is not split.
    summed = {size: x for (kind, size, _), x in found.items() if kind == "all-reduce"}
    data = mesh.size // fsdp
    assert summed.pop(data) <= 2 * (kernels + others) / fsdp
    assert sum(summed.values()) <= 2 * whole
    assert found["all-gather", fsdp, True] >= 2 * kernels / 2
