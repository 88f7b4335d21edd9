"""What a loss may ask of a batch, and that it says so."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from siglip.losses import LOSSES, definitions
from siglip.losses.definitions import Loss
from siglip.losses.facts import FACTS, facts

BATCH = {"text": jnp.asarray([[1, 2], [3, 4], [1, 2]]), "index": jnp.asarray([5, 5, 6])}


def test_only_what_is_needed_is_made():
    assert facts((), BATCH, seed=0, step=0) == {}
    assert set(facts(("seed",), {}, seed=0, step=0)) == {"seed"}
    assert set(facts(FACTS, BATCH, seed=0, step=0)) == set(FACTS)


def test_rows_of_one_caption_or_of_one_example_share_an_id():
    ids = np.asarray(facts(("ids",), BATCH, seed=0, step=0)["ids"])
    same = (ids[:, None] == ids[None]).any(axis=-1)
    np.testing.assert_array_equal(same, [[1, 1, 1], [1, 1, 0], [1, 0, 1]])


def test_the_seed_differs_from_step_to_step_and_from_run_to_run():
    def seed(run, step):
        return int(facts(("seed",), {}, seed=run, step=step)["seed"])

    assert len({seed(run, step) for run in (0, 1, -1, 2**40 + 3) for step in range(100)}) == 400
    traced = jax.jit(lambda step: facts(("seed",), {}, seed=7, step=step))(jnp.int32(3))["seed"]
    assert int(traced) == seed(7, 3) and traced.dtype == jnp.uint32


@pytest.mark.parametrize(
    "name, options, needs",
    [
        ("sigmoid", {}, ()),
        ("sigmoid", dict(negatives="hard", ratio=2), ()),
        ("sigmoid", dict(negatives="random", ratio=2), ("seed",)),
        ("sigmoid", dict(duplicates="positive"), ("ids",)),
        ("sigmoid", dict(duplicates="ignore", negatives="random", ratio=2), ("ids", "seed")),
        ("softmax", {}, ()),
        ("softmax", dict(duplicates="ignore"), ("ids",)),
    ],
)
def test_a_loss_needs_ids_and_seed_only_where_its_options_do(name, options, needs):
    mesh = jax.make_mesh((1, 1), ("data", "fsdp"))
    assert LOSSES[name](mesh, **options).needs == needs


def test_a_loss_that_asks_for_an_unknown_fact_is_refused():
    with pytest.raises(ValueError, match="asks for 'labels'; facts of a batch are ids, seed"):
        Loss(definitions.sigmoid_loss, needs=("ids", "labels"))
