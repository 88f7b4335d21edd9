"""Meshes of emulated devices, and embeddings like those of a model in training."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

ARGNUMS = (0, 1, 2, 3)  # of a loss: zimg, ztxt, t, b


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
