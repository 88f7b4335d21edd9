"""The loss over emulated devices against open_clip's over gloo processes, value and gradients.

open_clip divides a rank's sum by the rank's rows n, and DistributedDataParallel takes the mean over
the D ranks: sum / (n D) = sum / N, which is ours. The peer does the same (peer.sigmoid_loss).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from siglip.losses import ring
from siglip.losses.exchange import EXCHANGES

N, D_EMBED = 48, 64
DIST_IMPLS = ["bidir", "shift", "reduce", "gather"]  # all that open_clip has
# At the start of training, and as released models end (L/16 384).
SCALARS = {"start": (np.log(10.0), -10.0), "released": (np.log(118.2), -12.7)}
NAMES = ("loss", "zimg", "ztxt", "t_prime", "b")


def embeddings_and_scalars(at: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    zimg, ztxt = rng.normal(size=(2, N, D_EMBED))
    ztxt = ztxt + 0.5 * zimg  # positives that stand out, as after some training
    given = dict(zip(("t_prime", "b"), SCALARS[at]), zimg=zimg, ztxt=ztxt)
    for name in ("zimg", "ztxt"):
        given[name] /= np.linalg.norm(given[name], axis=1, keepdims=True)
    return {name: np.float32(x) for name, x in given.items()}


@pytest.fixture(scope="module", params=[1, 2, 4], ids="{}-devices".format)
def devices(request) -> int:
    return request.param


@pytest.fixture(scope="module")
def theirs(peer, devices, tmp_path_factory):
    """at -> '<dist_impl> <dtype> <name>' -> array, as open_clip has it over `devices` processes."""
    folder, found = tmp_path_factory.mktemp("loss"), {}
    dist_impls = DIST_IMPLS if devices > 1 else DIST_IMPLS[:1]  # unused in one process
    for at in SCALARS:
        inputs, out = folder / f"{at}.npz", folder / f"{at}-out.npz"
        np.savez(inputs, **embeddings_and_scalars(at))
        peer("sigmoid_loss", inputs=inputs, out=out, processes=devices, dist_impls=dist_impls)
        found[at] = dict(np.load(out))
        assert len(found[at]) == len(dist_impls) * 2 * len(NAMES)
    return found


def relative_error(got, want) -> float:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.mark.parametrize("at", SCALARS)
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_loss_and_all_gradients_equal_open_clips(theirs, devices, exchange, at):
    mesh = jax.make_mesh(
        (devices,), ("data",), devices=jax.devices()[:devices], axis_types=(AxisType.Auto,)
    )

    def loss(zimg, ztxt, t_prime, b):
        return ring.sigmoid_loss(zimg, ztxt, jnp.exp(t_prime), b, mesh=mesh, exchange=exchange)

    given = embeddings_and_scalars(at)
    arguments = [jnp.asarray(given[name]) for name in NAMES[1:]]
    value, grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))(*arguments)
    ours = dict(zip(NAMES, (value, *grads)))
    for key, want in theirs[at].items():
        _, dtype, name = key.split()
        # Its float32 is itself off: the float64 of the same code is the sharper comparison.
        assert relative_error(ours[name], want) < {"float64": 1e-6, "float32": 2e-6}[dtype], key
