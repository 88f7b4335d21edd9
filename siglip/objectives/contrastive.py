"""The contrastive objective: a loss of LOSSES over the embeddings of the whole batch."""

import functools
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from siglip.losses.definitions import Loss
from siglip.losses.logit_stats import logit_stats
from siglip.objectives.objective import Objective, Rows, when


def make_contrastive(model: Any, mesh: Mesh, loss: Loss) -> Objective:
    """The objective whose value is `loss(zimg, ztxt, t, b, mask, ...)`."""

    def rows(params, averaged, carried, part, key) -> Rows:
        del averaged, carried, key
        return Rows({"img": part.img(params)[0], "txt": part.txt(params)[0]})

    def scalars(params):
        _, _, out = model.apply({"params": params})  # neither image nor text: no tower runs
        return out["t"], out["b"]

    def batch(z, params, facts):
        return loss(z["img"], z["txt"], *scalars(params), **facts)

    def metrics(z, params, facts, logged):
        t, b = scalars(params)
        stats = functools.partial(logit_stats, mesh=mesh)
        bias = jnp.float32(0) if b is None else b
        logits = when(logged, stats, z["img"], z["txt"], t, bias, facts["mask"])
        return ({"t": t} if b is None else {"t": t, "b": b}) | logits

    return Objective(rows, batch=batch, reads=("t", "b"), needs=loss.needs, metrics=metrics)
