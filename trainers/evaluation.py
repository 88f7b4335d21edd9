"""Evaluations: on their own (--eval_only), and between the updates of a run."""

import json
import pathlib
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from base.errors import UserError
from input_pipeline.sources import storage
from trainers import announce
from trainers.config import stored
from trainers.machine.preemption import StopNow, StopRequest
from trainers.report.results import Results
from trainers.run import INDEX, TrainingRun
from trainers.setup import Setup, make_evaluators, make_setup, sharded
from trainers.state import initial, restoring
from trainers.state.start import Start, find_start
from trainers.step.train_state import TrainState


def evaluate(config: Any, workdir: str | pathlib.Path) -> Results:
    """Runs all evaluators on the newest checkpoint of the workdir, or, where it holds none, on the
    weights of config.init; writes results.json.

    Raises:
      UserError: there is no evaluator, no checkpoint, or it does not fit.
    """
    if not config.evals:
        raise UserError("config.evals names no evaluator, there is nothing to evaluate")
    workdir = pathlib.Path(workdir)
    start = find_start(workdir, init=config.init)
    if start.kind == "scratch":
        raise UserError(
            f"{workdir} holds no checkpoint to evaluate; train first, or pass --config and "
            "--config.init=WEIGHTS"
        )
    if start.kind == "init":
        other = [d for d in stored.differences(config, workdir) if d.key == "init"]
        if other:
            raise UserError(
                f"{workdir} holds results of other weights ({other[0]}); choose another"
            )
    storage.keep_indexes_in(str(workdir / INDEX))
    if start.kind == "init" and "averaged" in {block.params for block in config.evals.values()}:
        raise UserError(
            "config.evals.*.params=averaged needs a run's own checkpoint: of the weights of "
            "config.init there are no averages; pass --workdir of the run alone"
        )
    setup = make_setup(config)
    evaluators = make_evaluators(setup)
    averaged = averages_to_evaluate(setup, start)
    params = params_to_evaluate(setup, start, averaged)
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        if start.kind == "init":  # results without a run: config.json says of which weights
            stored.save(config, workdir)
        initial.save_spec(setup, workdir)
    final = {}
    for name, evaluator in evaluators.items():
        if jax.process_index() == 0:
            what = f"at step {start.step}" if start.kind == "workdir" else f"of {start.path}"
            print(f"evaluating {name} {what}", flush=True)
        wants_averaged = config.evals[name].params == "averaged"
        final[name] = _numbers(evaluator, {**params, **averaged} if wants_averaged else params)
    announce.report(final, evaluators, workdir)
    return final


def params_to_evaluate(setup: Setup, start: Start, averaged: PyTree = ()) -> PyTree:
    """The parameters of a checkpoint, or of config.init, on the devices.

    Notes say what else there is, but for the subtrees whose moving averages are used too.
    """
    abstract = sharded(setup.abstract_towers(), setup.mesh)
    if start.kind == "workdir":
        params, notes = restoring.restore_params(str(start.path), abstract, averaged=averaged)
        announce.notes(notes)
        return params
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    key, inputs = jax.random.key(setup.config.seed), setup.inputs
    fresh = jax.jit(lambda: setup.model.init(key, *inputs)["params"], out_shardings=shardings)()
    params, notes = initial.initial_params(setup, fresh, start.path or "")
    announce.notes(notes)
    return params


def averages_to_evaluate(setup: Setup, start: Start) -> PyTree:
    """Moving averages of the towers' parameters, where an evaluator asks for them."""
    config = setup.config
    if "averaged" not in {block.params for block in config.evals.values()}:
        return {}
    towers = sharded(setup.abstract_towers(), setup.mesh)
    abstract = {name: towers[name] for name in config.average.what if name in towers}
    return restoring.restore_averaged(str(start.path), abstract)


def run_evaluators(run: TrainingRun, state: TrainState, step: int, names: Iterable[str]) -> Results:
    """Runs some evaluators of a run, and logs the numbers that no earlier life has logged."""
    numbers: Results = {}
    for name in names:
        run.progress.note(f"evaluating {name} at step {step}")
        with run.clock.evaluating(name, step):
            params = _params_of(state, run.setup.config.evals[name].params)
            numbers[name] = _numbers(run.evaluators[name], params)
        scalars = {f"{name}/{metric}": got["value"] for metric, got in numbers[name].items()}
        if step != run.first_step or name not in run.logged:
            run.writer.write_scalars(step, scalars)
        run.progress.note("  " + ", ".join(f"{k} {v:.4f}" for k, v in scalars.items()))
    return numbers


def run_between_updates(
    run: TrainingRun, stop: StopRequest, step: int, state: TrainState, names: list[str]
) -> None:
    """Runs evaluators that are due before the end. They may take minutes, which a preempted machine
    does not have: a request to stop breaks them off, and the next life of the run repeats them."""
    if names:
        try:
            with stop.at_once():
                run_evaluators(run, state, step, names)
        except StopNow:
            run.interrupt(step, state)


def logged_evaluators(workdir: pathlib.Path, step: int, names: Iterable[str]) -> frozenset[str]:
    """Names of the evaluators with numbers of `step` in metrics.jsonl, as process 0 sees it."""
    names, keys = sorted(names), set()
    if jax.process_index() == 0 and (file := workdir / "metrics.jsonl").exists():
        for event in map(json.loads, file.read_text().splitlines()):
            keys |= set(event) if event["step"] == step else set()
    logged = np.array([any(key.startswith(f"{name}/") for key in keys) for name in names], bool)
    if names and jax.process_count() > 1:
        logged = multihost_utils.broadcast_one_to_all(logged)
    return frozenset(name for name, is_logged in zip(names, logged) if is_logged)


def _params_of(state: TrainState, which: str) -> PyTree:
    """What evals.x.params says: the parameters, or those of them that have an average as that."""
    return state.params if which == "params" else {**state.params, **state.averaged}


def _numbers(evaluator: Any, params: PyTree) -> dict[str, dict[str, float | None]]:
    return {m: {"value": float(v), "chance": c} for m, v, c in evaluator.run(params)}
