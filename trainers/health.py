"""Checks that stop a run: its loss is not finite, or its data are bad."""

from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from base.errors import UserError
from input_pipeline.bad_examples import mostly_bad, too_many
from input_pipeline.errors import KINDS
from trainers.run import TrainingRun
from trainers.step.train_state import NONE, Tally

MIN_WINDOW = 256  # examples; fewer may be half bad by chance
MAX_MESSAGE_BYTES = 2000  # of each process in a message about all


class Diverged(Exception):
    """The loss or a gradient was not finite. The message names the last good checkpoint."""


def check(run: TrainingRun, step: int, tally: Tally) -> None:
    """Checks the tally after `step`; the outcome is the same on every process.

    Raises:
      UserError: too many examples are bad.
      Diverged: a step since the last check was not finite.
    """
    tally = jax.device_get(tally)
    run.bad_counts = np.asarray(tally.bad)
    _check_bad_examples(run, step)
    if tally.first_nonfinite != NONE:
        _raise_diverged(run, int(tally.first_nonfinite))


def _check_bad_examples(run: TrainingRun, step: int) -> None:
    batch_size = run.setup.config.input.batch_size
    allowed = run.setup.config.input.max_bad_fraction
    examples, bad = step * batch_size, int(run.bad_counts.sum())
    window, bad_in_window = examples - run.checked[0] * batch_size, bad - run.checked[1]
    if window >= MIN_WINDOW:
        if mostly_bad(bad_in_window, window, allowed):
            raise UserError(
                f"{bad_in_window} of the last {window} examples could not be used by step {step}; "
                f"the worst: {_of_all_processes(run.bad.worst())}"
            )
        run.checked = step, bad
    if too_many(bad, examples, allowed):
        kinds = ", ".join(f"{n} {kind}" for kind, n in zip(KINDS, run.bad_counts) if n)
        raise UserError(
            f"{bad} of {examples} examples could not be used by step {step} ({kinds}), more than "
            f"config.input.max_bad_fraction={allowed}; "
            f"the worst: {_of_all_processes(run.bad.worst())}"
        )


def _raise_diverged(run: TrainingRun, step: int) -> NoReturn:
    run.checkpoints.wait()
    last = run.checkpoints.latest_step()
    if last is None:
        advice = "there is no checkpoint yet; try a lower lr, or clip_norm, in a new workdir"
    else:
        where = run.checkpoints.directory / str(last)
        advice = (
            f"the last good checkpoint is {where}; try a lower lr, or clip_norm, in a new "
            f"workdir with --config.resume={where}"
        )
    raise Diverged(
        f"loss or gradient was not finite at step {step}, which has changed no parameter; {advice}"
    )


def _of_all_processes(message: str) -> str:
    """The messages of all processes in one line, gathered over the network."""
    if jax.process_count() == 1:
        return message
    encoded = message.encode()[:MAX_MESSAGE_BYTES]
    row = np.zeros(MAX_MESSAGE_BYTES, np.uint8)
    row[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(row))
    messages = [bytes(row).rstrip(b"\0").decode("utf-8", "replace") for row in rows]
    return "; ".join(f"process {i}: {text}" for i, text in enumerate(messages) if text)
