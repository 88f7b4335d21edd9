"""Losses that need more of a batch than its embeddings, from the config to the results."""

import math

import pytest
import tiny_run

import main as program


@pytest.mark.parametrize(
    "flags",
    [
        ("duplicates=ignore",),
        ("negatives=random", "ratio=3"),
    ],
    ids=["ids", "seed"],
)
def test_a_loss_that_needs_facts_of_the_batch_trains_and_is_evaluated(flags, tmp_path):
    tiny = tiny_run.Tiny(tmp_path)
    flags = [f"--config.objectives.contrastive.{flag}" for flag in flags]
    flags = (*flags, "--config.total=2 steps", "--config.evals.val.every=2 steps")
    assert tiny.main(tmp_path / "run", *flags, evals="val") == program.DONE
    assert all(map(math.isfinite, tiny_run.losses(tmp_path / "run")))
    value = tiny_run.results(tmp_path / "run")["val"]["loss"]["value"]
    assert math.isfinite(value)
