"""Which checkpoint or weights a run begins with, and the state that it begins with."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import PyTree

from base.errors import UserError
from input_pipeline.errors import KINDS
from siglip.checkpoints.formats import workdir as workdir_format
from siglip.checkpoints.formats.workdir import FOLDER, steps_on_disk
from trainers.plan import Plan, position
from trainers.setup import Setup
from trainers.state import initial, prolong, restoring
from trainers.state.checkpointing import Checkpoints
from trainers.step.train_state import with_params


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a run begins. `path` is a step directory, or config.init; None from scratch."""

    kind: str  # 'workdir' | 'resume' | 'init' | 'scratch'
    path: pathlib.Path | str | None = None  # with 'init' as config.init has it
    step: int | None = None


def find_start(
    workdir: str | pathlib.Path,
    resume: str | pathlib.Path | None = None,
    init: str | pathlib.Path | None = None,
) -> Start:
    """Which checkpoint wins:

    1. the newest of the workdir: the same command goes on with its own run;
    2. config.resume: everything of another run's checkpoint (state, data position, step);
    3. config.init: weights only, the run starts at step 0 (see initial.py);
    4. scratch.

    Raises UserError where the winner of 2 is a path without a checkpoint.
    """
    root = pathlib.Path(workdir).absolute() / FOLDER
    if steps := steps_on_disk(root):
        return Start("workdir", root / str(steps[0]), steps[0])
    if resume:
        path = restoring.locate(resume, key="config.resume")
        return Start("resume", path, int(path.name))
    if init and workdir_format.is_one(pathlib.Path(init)):
        path = restoring.locate(init, key="config.init")
        return Start("init", path, int(path.name))
    return Start("init", init) if init else Start("scratch")


@dataclasses.dataclass
class Beginning:
    """The state that a run begins with.

    Attributes:
      start: where it comes from; its step is that of the checkpoint that could be read.
      step: updates made before.
      bad_counts: bad examples met before, by kind (input_pipeline.errors.KINDS).
      notes: what people should know about the weights of config.init.
    """

    start: Start
    state: PyTree
    step: int
    bad_counts: np.ndarray
    notes: list[str]


def begin(
    setup: Setup,
    plan: Plan,
    workdir: pathlib.Path,
    checkpoints: Checkpoints,
    abstract_state: PyTree,
    init: Callable[[], Any],
) -> Beginning:
    """Restores or makes the state that find_start decides for.

    Raises:
      UserError: the checkpoint cannot be read, or does not fit the model, the data or the plan.
    """
    config = setup.config
    start = find_start(workdir, config.resume, config.init)
    if config.fresh and not config.resume:
        raise UserError("config.fresh says what of config.resume's run starts fresh; set that too")
    step, saved, notes = 0, {}, []
    match start.kind:
        case "workdir":
            state, saved, step = checkpoints.restore(abstract_state)
            start = dataclasses.replace(start, step=step)  # not the newest if that is damaged
        case "resume":
            state, saved, step = restoring.restore_state(
                str(start.path), abstract_state, fresh=config.fresh, init=init
            )
        case "init":
            state = init()
            params, notes = initial.initial_params(setup, state.params, start.path or "")
            state = with_params(state, params)
        case _:
            state = init()
    _check_position(saved, position(config, plan, step), start)
    if step > plan.total:
        raise UserError(
            f"the checkpoint to go on from is at step {step}, beyond the {plan.total} steps of "
            f"config.total={config.total!r} with this data"
        )
    if start.kind == "workdir":
        prolong.check_total(config, plan, workdir, step)
    elif start.kind == "resume":
        run = pathlib.Path(str(start.path)).parents[1]
        prolong.check_total(config, plan, run, step, may_shrink=True)
    counts = saved.get("bad", {})
    bad_counts = np.array([counts.get(kind, 0) for kind in KINDS], np.int32)
    return Beginning(start, state, step, bad_counts, notes)


def _check_position(saved: dict[str, Any], wanted: dict[str, int], start: Start) -> None:
    if differing := [key for key in wanted if saved.get(key, wanted[key]) != wanted[key]]:
        raise UserError(
            f"the run goes on in the data where {start.path} stopped, but "
            + ", ".join(f"{key} is {saved[key]} there, {wanted[key]} here" for key in differing)
            + " (config.seed, config.input.batch_size and the data must be those of that run; "
            "config.init takes its weights alone)"
        )
