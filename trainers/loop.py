"""The life of a run: start or go on, update, log, save, evaluate, stop."""

import collections
import dataclasses
import pathlib
import sys
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from clu import parameter_overview

from input_pipeline import SOURCES, loader
from input_pipeline.device import to_device
from input_pipeline.errors import UserError
from trainers import checkpointing, contrastive, results, setup
from trainers import config as configs
from trainers.clock import Clock
from trainers.metrics import Writer
from trainers.optimizer import frozen_mask, make_tx
from trainers.preemption import Interrupted, StopRequest
from trainers.progress import Progress, memory
from trainers.results import Results

__all__ = ["Diverged", "Interrupted", "evaluate", "train"]

AHEAD = 2  # updates in flight: the host prepares one while the device does another


class Diverged(Exception):
    """The loss or a gradient was not finite. The message names the last good checkpoint."""


@dataclasses.dataclass
class Run:
    """What the parts of the loop share."""

    setup: setup.Setup
    workdir: pathlib.Path
    plan: setup.Plan
    evaluators: dict[str, Any]
    checkpoints: checkpointing.Checkpoints
    writer: Writer
    clock: Clock
    progress: Progress

    def save(self, step: int, state: contrastive.TrainState) -> None:
        """The state and the position in the data: batches are a function of (seed, step)."""
        config = self.setup.config
        examples = step * config.input.batch_size
        self.checkpoints.save(
            step, state, {"step": step, "seed": config.seed, "examples": examples}
        )


def train(config: Any, workdir: str | pathlib.Path) -> Results:
    """Trains to the end of config.total, from wherever the workdir stands, and evaluates.

    Returns what it writes to <workdir>/results.json.

    Raises:
      UserError: config, data and checkpoint do not fit each other.
      Interrupted: Ctrl-C or SIGTERM; the state is saved.
      Diverged: a loss was not finite; the state before it is saved.
    """
    workdir, is_main = pathlib.Path(workdir), jax.process_index() == 0
    things = setup.make_setup(config)
    setup.check_batch(config, things.mesh)
    source = setup.chosen(SOURCES, config.input.source)
    plan = setup.make_plan(config, len(source))
    evaluators = setup.make_evaluators(things)
    params = things.abstract_params()
    tx, schedule = make_tx(
        config,
        params,
        total_steps=plan.total,
        batch_size=config.input.batch_size,
        examples_per_epoch=len(source),
    )
    abstract, init = contrastive.make_state(
        things.model, tx, things.mesh, seed=config.seed, inputs=things.inputs
    )
    if is_main:
        configs.save(config, workdir)
    checkpoints = checkpointing.Checkpoints(
        str(workdir),
        every=plan.save_every,
        keep_last=config.checkpoint.keep_last,
        keep_every=plan.keep_every,
    )
    state, first, told = _start(config, workdir, checkpoints, abstract, init)

    writer = Writer(workdir, is_main=is_main)
    writer.rewind(first if first else -1)
    clock = Clock(
        total_steps=plan.total,
        batch_size=config.input.batch_size,
        num_devices=things.mesh.size,
        start_step=first,
        evals=plan.evals,
    )
    progress = Progress(clock, is_main=is_main)
    run = Run(things, workdir, plan, evaluators, checkpoints, writer, clock, progress)
    _introduce(run, source, state, first, told)
    update = contrastive.make_update(
        things.model,
        things.loss_fn,
        tx,
        schedule,
        frozen_mask(config, params),
        things.mesh,
        jax.tree.map(lambda x: x.sharding, abstract),
        seed=config.seed,
        log_every=config.log_every,
    )
    batches = loader.train_batches(
        source,
        things.preprocess,
        batch_size=config.input.batch_size,
        seed=config.seed,
        start_step=first,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        num_threads=config.input.num_threads,
        prefetch=config.input.prefetch,
    )
    try:
        state = _updates(run, update, state, batches, first)
        run.save(plan.total, state)
        final = _evaluations(run, state.params, plan.total, list(evaluators))
        checkpoints.wait()
    finally:
        progress.close()
        batches.close()
        checkpoints.close()
        writer.close()
    _report(final, workdir)
    return final


def evaluate(config: Any, workdir: str | pathlib.Path) -> Results:
    """All evaluators on the newest checkpoint of the workdir; writes results.json.

    Raises:
      UserError: there is no checkpoint, or it does not fit.
    """
    workdir = pathlib.Path(workdir)
    start = checkpointing.find_start(str(workdir))
    if start.kind == "scratch":
        raise UserError(f"{workdir} holds no checkpoint to evaluate; train first")
    things = setup.make_setup(config)
    evaluators = setup.make_evaluators(things)
    abstract = setup.sharded(things.abstract_params(), things.mesh)
    params = checkpointing.restore_params(str(start.path), abstract)
    final = {}
    for name, evaluator in evaluators.items():
        if jax.process_index() == 0:
            print(f"evaluating {name} at step {start.step}", flush=True)
        final[name] = _evaluate_one(evaluator, params)
    _report(final, workdir)
    return final


def _start(config, workdir, checkpoints, abstract, init) -> tuple[Any, int, str]:
    """Which checkpoint wins is find_start's; (state, its step, a sentence about it)."""
    start = checkpointing.find_start(str(workdir), config.resume, config.init)
    match start.kind:
        case "workdir":
            state, _, step = checkpoints.restore(abstract)
            return state, step, f"going on from step {step}"
        case "resume":
            state, _ = checkpointing.restore_state(str(start.path), abstract)
            return state, start.step, f"going on from step {start.step} of {start.path}"
        case "init":
            params = checkpointing.restore_params(str(start.path), abstract.params)
            return init().replace(params=params), 0, f"starting from the weights of {start.path}"
        case _:
            return init(), 0, "starting from scratch"


def _updates(run: Run, update, state, batches: Iterable[dict], first: int):
    """All updates from step `first` to the end, and what falls due between them."""
    config, plan, mesh = run.setup.config, run.plan, run.setup.mesh
    tally, in_flight = contrastive.new_tally(mesh), collections.deque()
    with StopRequest() as stop:
        for step in range(first + 1, plan.total + 1):
            with run.clock.waiting():
                batch = next(batches)
            batch = {k: v for k, v in batch.items() if k in ("image", "text", "mask")}
            state, tally, metrics = update(state, tally, to_device(batch, mesh))
            in_flight.append(metrics["loss"])
            if len(in_flight) > AHEAD or step == first + 1:
                jax.block_until_ready(in_flight.popleft())
            if step == first + 1:
                run.clock.tick(step)  # from here on without compilation

            stopping = stop.reached(step)
            saving = run.checkpoints.due(step) or stopping
            if step % config.log_every == 0 or step == plan.total or saving:
                _check(run, step, tally)
                run.clock.tick(step)
            if step % config.log_every == 0 or step == plan.total:
                _log(run, step, metrics, tally)
            if saving and step < plan.total:
                run.save(step, state)
            if stopping and step < plan.total:
                run.checkpoints.wait()
                raise Interrupted(f"stopped at step {step} of {plan.total}, saved")
            due = [k for k, every in plan.evals.items() if every and step % every == 0]
            if due and step < plan.total:
                _evaluations(run, state.params, step, due)
    return state


def _log(run: Run, step: int, metrics: dict[str, jax.Array], tally) -> None:
    """One event of everything; logit statistics are NaN on a last step that is not due."""
    scalars = {k: float(v) for k, v in jax.device_get(metrics).items()}
    scalars = {k: v for k, v in scalars.items() if not np.isnan(v)}
    scalars |= {"epoch": step * run.setup.config.input.batch_size / run.plan.epoch}
    scalars |= {"bad_examples": int(tally.bad_examples)}
    scalars |= run.clock.rates() | memory()
    run.writer.write_scalars(step, scalars)
    run.progress.update(loss=scalars["loss"], lr=scalars["lr"])


def _check(run: Run, step: int, tally: contrastive.Tally) -> None:
    """Stops a run that has diverged, or whose data are bad. The same on every process."""
    tally = jax.device_get(tally)
    if tally.first_nonfinite != contrastive.NONE:
        bad = int(tally.first_nonfinite)
        run.checkpoints.wait()
        last = run.checkpoints.latest_step()
        where = f"{run.checkpoints.directory / str(last)}" if last is not None else "none yet"
        raise Diverged(
            f"loss or gradient is not finite at step {bad}; no later step has changed the "
            f"parameters. Last good checkpoint: {where}. Try a lower lr, or clip_norm"
        )
    allowed = run.setup.config.input.max_bad_fraction
    share = tally.bad_examples / max(1, tally.examples)
    if share > allowed:
        raise UserError(
            f"{tally.bad_examples} of {tally.examples} examples did not decode by step {step}, "
            f"more than config.input.max_bad_fraction={allowed}; the worst: "
            f"{run.setup.preprocess.bad.worst()}"
        )


def _evaluations(run: Run, params, step: int, names: list[str]) -> Results:
    """Runs and logs some of the evaluators."""
    found: Results = {}
    for name in names:
        run.progress.note(f"evaluating {name} at step {step}")
        with run.clock.evaluating(name, step):
            found[name] = _evaluate_one(run.evaluators[name], params)
        scalars = {f"{name}/{metric}": got["value"] for metric, got in found[name].items()}
        run.writer.write_scalars(step, scalars)
        run.progress.note("  " + ", ".join(f"{k} {v:.4f}" for k, v in scalars.items()))
    return found


def _evaluate_one(evaluator, params) -> dict[str, dict[str, float | None]]:
    return {m: {"value": float(v), "chance": c} for m, v, c in evaluator.run(params)}


def _introduce(run: Run, source, state, first: int, told: str) -> None:
    """What is about to be trained, on what: once per life, the parameter table in a file."""
    config, mesh = run.setup.config, run.setup.mesh
    arrays = jax.tree.leaves(state.params)
    run.progress.note(
        f"{told}: {sum(x.size for x in arrays):,} parameters in {len(arrays)} arrays, "
        f"{len(source):,} examples, {run.plan.total:,} steps of {config.input.batch_size} on "
        f"{mesh.size} {mesh.devices.flat[0].platform} devices ({dict(mesh.shape)}), "
        f"loss {config.loss.name}, jax {jax.__version__}, workdir {run.workdir}"
    )
    if jax.process_index() == 0 and first == 0:
        table = parameter_overview.get_parameter_overview(state.params, include_stats=False)
        (run.workdir / "parameters.txt").write_text(table + "\n")
        run.writer.write_texts(0, {"parameters": f"```\n{table}\n```"})
        run.writer.write_hparams(config.to_dict())


def _report(final: Results, workdir: pathlib.Path) -> None:
    if jax.process_index() == 0:
        results.write_json(workdir / "results.json", final)
        print(f"\n{results.table(final)}\n\nrun: {workdir}", flush=True)
        sys.stdout.flush()
