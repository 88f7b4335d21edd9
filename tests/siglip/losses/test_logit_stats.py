"""Statistics of positive and negative logits against the full matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from siglip.losses.logit_stats import logit_stats
from siglip.sharding import make_mesh


@pytest.mark.parametrize("fsdp", [1, 4])
def test_statistics_equal_those_of_the_full_matrix(fsdp):
    mesh, n = make_mesh(fsdp=fsdp), 40
    rng = np.random.default_rng(0)
    zimg, ztxt = (jnp.asarray(rng.normal(size=(n, 6)), jnp.float32) for _ in range(2))
    mask = rng.random(n) > 0.3
    got = jax.jit(lambda *a: logit_stats(*a, mesh=mesh, rows=3))(
        zimg, ztxt, jnp.float32(11), jnp.float32(-3), jnp.asarray(mask)
    )
    logits = 11 * np.asarray(zimg)[mask] @ np.asarray(ztxt)[mask].T - 3
    positive = np.eye(mask.sum(), dtype=bool)
    want = {
        "pos_logit_mean": logits[positive].mean(),
        "pos_logit_max": logits[positive].max(),
        "neg_logit_mean": logits[~positive].mean(),
        "neg_logit_max": logits[~positive].max(),
    }
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-4, err_msg=name)
