"""Blocks that take a few examples at a time; that towers' numbers stay is in test_towers.py too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from one_device import equations, on_a_device

from siglip.towers.transformer import Encoder
from trainers.fit.flops import matmul_flops

N, TOKENS, WIDTH = 4, 6, 32


def encoder(group: int, remat: str = "none", scan: bool = False) -> Encoder:
    return Encoder(2, 64, 4, jnp.dtype("float32"), scan, remat, "xla", group)


def inputs(n: int = N):
    """Tokens, and a mask that has nothing True in its first row."""
    rng = np.random.default_rng(0)
    mask = rng.random((n, TOKENS)) < 0.6
    mask[0] = False
    return jnp.asarray(rng.normal(size=(n, TOKENS, WIDTH)), jnp.float32), jnp.asarray(mask)


def parameters(scan: bool = False):
    return encoder(0, scan=scan).init(jax.random.key(0), inputs()[0])


def gradient(group: int, remat: str = "none"):
    """The gradient of the sum of the tokens, by the parameters and the tokens."""
    module = encoder(group, remat)
    return jax.grad(lambda params, x: (module.apply(params, x)[0] ** 2).sum(), argnums=(0, 1))


def loops(f, *args):
    """How often loops of a function run."""
    program = jax.make_jaxpr(f)(*args).jaxpr
    return {eqn.params["length"] for eqn in equations(program) if eqn.primitive.name == "scan"}


@pytest.mark.parametrize("remat", ["none", "dense", "full"])
def test_groups_compute_what_the_whole_computes_and_no_more(remat):
    params, (x, _) = parameters(), inputs()

    def flops(group):
        return matmul_flops(jax.make_jaxpr(on_a_device(gradient(group, remat)))(params, x).jaxpr)

    def runs(group):
        return loops(on_a_device(gradient(group, remat)), params, x)

    assert runs(2) == {2} and runs(1) == {4}
    assert flops(2) == flops(1) == flops(0)
    assert not runs(0) and not runs(4)
    assert not runs(3)  # which does not divide 4 examples


@pytest.mark.parametrize("scan", [False, True])
def test_masks_and_captured_blocks_go_through_in_groups_too(scan):
    params, (x, mask) = parameters(scan), inputs()

    def run(group):
        return on_a_device(
            lambda p: encoder(group, "full", scan).apply(p, x, mask, ("block:0", "block:-1"))
        )

    assert 4 in loops(run(1), params)
    for got, want in zip(
        jax.tree.leaves(run(1)(params)), jax.tree.leaves(run(0)(params)), strict=True
    ):
        np.testing.assert_allclose(got, want, atol=2e-6)


def test_outside_of_the_training_step_all_examples_go_through_at_once():
    """A loop over groups of a batch that is split over devices has each compute all of it."""
    assert not loops(gradient(1), parameters(), inputs()[0])


def test_with_groups_a_block_needs_the_memory_of_one():
    params, (x, _) = parameters(), inputs(64)

    def temp(group):
        lowered = on_a_device(gradient(group, "full")).lower(params, x)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temp(4) < 0.5 * temp(0)
