"""The plan of a run: its durations in steps, checks of its numbers, its place in the data."""

import dataclasses
import zlib
from typing import Any

import jax

from base.errors import UserError
from input_pipeline.order import order_of
from input_pipeline.transforms.corrupt import Corruption
from siglip.sharding import check_batch_size
from siglip.towers.two_towers import TOWERS
from trainers.config import durations


@dataclasses.dataclass(frozen=True)
class Plan:
    """The durations of a run in steps."""

    epoch: int  # examples
    order: int  # see order_hash
    total: int
    save_every: int | None
    keep_every: int | None
    evals: dict[str, int | None]  # None: only at the end

    def evaluators_due(self, step: int) -> list[str]:
        """Names of the evaluators that run after `step`. After the last step all run, which the
        caller knows, so the list is empty then."""
        if not 0 < step < self.total:
            return []
        return [name for name, every in self.evals.items() if every and step % every == 0]


def make_plan(config: Any, examples_per_epoch: int, order: int = 0) -> Plan:
    """The plan of this config with this data.

    Raises:
      UserError: a duration is invalid, or the run has no step.
    """
    if examples_per_epoch < 1:
        raise UserError("config.input.source holds no examples")

    def steps(text: str, key: str, total: int | None = None) -> int | None:
        return durations.to_steps(
            text,
            batch_size=config.input.batch_size,
            examples_per_epoch=examples_per_epoch,
            total_steps=total,
            key=f"config.{key}",
        )

    total = steps(config.total, "total")
    if not total:
        raise UserError(f"config.total={config.total!r} is no step at all")
    return Plan(
        examples_per_epoch,
        order,
        total,
        steps(config.checkpoint.every, "checkpoint.every", total),
        steps(config.checkpoint.keep_every, "checkpoint.keep_every", total),
        {k: steps(v.every, f"evals.{k}.every", total) for k, v in config.evals.items()},
    )


def position(config: Any, plan: Plan, step: int) -> dict[str, int]:
    """Where a run stands in its data after `step`, and which order the data have; it is saved with
    every checkpoint, as batches are a function of (seed, step)."""
    return {
        "step": step,
        "seed": config.seed,
        "examples": step * config.input.batch_size,
        "examples_per_epoch": plan.epoch,
        "order": plan.order,
    }


def order_hash(config: Any, source: Any) -> int:
    """A hash of examples and noise at sampled positions, to notice data in another order."""
    order = order_of(source, config.seed)
    sampled = [order[position] for position in range(0, 64 * 4099, 4099)]
    return zlib.crc32(repr((sampled, config.input.corrupt)).encode())


MINIMA = {
    "seed": 0,
    "log_every": 1,
    "input.microbatch": 0,
    "input.num_threads": 0,
    "input.prefetch": 1,
}


def check_batch(config: Any, mesh: jax.sharding.Mesh) -> None:
    """Checks numbers of the config before any work.

    Raises:
      UserError: one is out of range, or the devices do not divide the batch.
    """
    for key, minimum in MINIMA.items():
        block, _, name = key.rpartition(".")
        value = (config[block] if block else config)[name]
        if value < minimum:
            raise UserError(f"config.{key}={value} must be at least {minimum}")
    Corruption(config.input.corrupt, seed=0, batch_size=1)  # raises UserError for invalid text
    if not 0 <= config.input.max_bad_fraction < 1:
        raise UserError(
            f"config.input.max_bad_fraction={config.input.max_bad_fraction} must be from 0 to 1, "
            "as 0.01 for one in a hundred"
        )
    batch_size = config.input.batch_size
    check_batch_size("config.input.batch_size", batch_size, mesh)
    microbatch = config.input.microbatch
    if microbatch and (microbatch % mesh.size or batch_size % microbatch):
        local = batch_size // mesh.size
        fitting = [mesh.size * k for k in range(1, local + 1) if local % k == 0]
        raise UserError(
            f"config.input.microbatch={microbatch} must divide config.input.batch_size="
            f"{batch_size} and be a multiple of {mesh.size} devices: one of "
            f"{', '.join(map(str, fitting))}"
        )
    n = (microbatch or batch_size) // mesh.size
    for tower in TOWERS:
        group = config.model[tower].group
        if 0 < group < n and n % group:
            fitting = [k for k in range(1, n + 1) if n % k == 0]
            raise UserError(
                f"config.model.{tower}.group={group} must divide the {n} examples that a device "
                f"computes at a time: one of {', '.join(map(str, fitting))}"
            )
