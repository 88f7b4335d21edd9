"""A training run under way: its parts, and what the loop does with them together."""

import dataclasses
import pathlib
from typing import Any, NoReturn

import jax
import numpy as np

from input_pipeline.bad_examples import BadExamples
from input_pipeline.errors import KINDS
from trainers.machine.preemption import Interrupted
from trainers.plan import Plan, position
from trainers.report.clock import Clock
from trainers.report.metrics import MetricsWriter
from trainers.report.progress import TrainingProgress, memory
from trainers.setup import Setup
from trainers.state.checkpointing import Checkpoints
from trainers.step.train_state import TrainState

INDEX = "index"  # folder in the workdir that keeps the indexes of tar files


@dataclasses.dataclass
class TrainingRun:
    """What the parts of the loop share during one life of a run."""

    setup: Setup
    workdir: pathlib.Path
    plan: Plan
    first_step: int  # updates before this life of the run
    logged: frozenset[str]  # evaluators whose numbers of first_step an earlier life has logged
    evaluators: dict[str, Any]
    checkpoints: Checkpoints
    writer: MetricsWriter
    clock: Clock
    progress: TrainingProgress
    bad: BadExamples  # bad examples that this process met, by name
    bad_counts: np.ndarray  # bad examples of all processes, by kind, in all steps so far
    checked: tuple[int, int]  # (step, bad examples) when health.check last saw a good window

    def save(self, step: int, state: TrainState) -> None:
        """Starts to write the state and the position in the data."""
        self.writer.flush()  # a power cut must not leave a checkpoint that is ahead of the log
        counts = {kind: int(count) for kind, count in zip(KINDS, self.bad_counts) if count}
        data = {**position(self.setup.config, self.plan, step), "bad": counts}
        self.checkpoints.save(step, state, data)

    def interrupt(self, step: int, state: TrainState) -> NoReturn:
        """Saves, waits until the checkpoint is on disk and raises Interrupted."""
        self.save(step, state)
        self.checkpoints.wait()
        where = self.checkpoints.directory / str(step)
        raise Interrupted(f"stopped at step {step} of {self.plan.total}, saved in {where}")

    def log(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Writes one event with all numbers of a step, and updates the progress line."""
        scalars = {k: float(v) for k, v in jax.device_get(metrics).items()}
        # A last step that is not due has no logit statistics: the update returns NaN for them.
        scalars = {k: v for k, v in scalars.items() if not np.isnan(v)}
        scalars |= {"epoch": step * self.setup.config.input.batch_size / self.plan.epoch}
        scalars |= {"bad_examples": int(self.bad_counts.sum())}
        scalars |= {f"bad/{kind}": int(n) for kind, n in zip(KINDS, self.bad_counts) if n}
        scalars |= self.clock.rates() | memory()
        self.writer.write_scalars(step, scalars)
        self.progress.update(loss=scalars["loss"], lr=scalars["lr"])
