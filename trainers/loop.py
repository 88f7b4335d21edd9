"""The life of a run: start or go on, update, log, save, evaluate, stop."""

import collections
import contextlib
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax

from input_pipeline import loader
from input_pipeline.bad_examples import BadExamples
from input_pipeline.sources import storage
from siglip.sharding import to_device
from trainers import announce, health
from trainers.assemble import BATCH_FIELDS, make_step
from trainers.config import stored
from trainers.data import make_source
from trainers.evaluation import logged_evaluators, run_between_updates, run_evaluators
from trainers.machine.preemption import StopRequest
from trainers.plan import check_batch, make_plan, order_hash
from trainers.report.clock import Clock
from trainers.report.metrics import MetricsWriter
from trainers.report.progress import TrainingProgress
from trainers.report.results import Results
from trainers.run import INDEX, TrainingRun
from trainers.setup import make_evaluators, make_setup
from trainers.state import initial, start
from trainers.state.checkpointing import Checkpoints
from trainers.step.train_state import TrainState, new_tally

IN_FLIGHT = 2  # updates; the host prepares one while the device does another


def train(config: Any, workdir: str | pathlib.Path) -> Results:
    """Trains to the end of config.total, from wherever the workdir stands, and evaluates.

    Returns what it writes to <workdir>/results.json.

    Raises:
      UserError: config, data and checkpoint do not fit each other.
      Interrupted: Ctrl-C or SIGTERM; the state is saved.
      Diverged: a loss was not finite; the state before it is saved.
    """
    workdir, is_main = pathlib.Path(workdir), jax.process_index() == 0
    setup = make_setup(config)
    check_batch(config, setup.mesh)
    storage.keep_indexes_in(str(workdir / INDEX))
    source = make_source(config)
    plan = make_plan(config, len(source), order_hash(config, source))
    evaluators = make_evaluators(setup)
    step = make_step(setup, total_steps=plan.total, examples_per_epoch=len(source))
    with contextlib.ExitStack() as closing:
        checkpoints = Checkpoints(
            workdir,
            every=plan.save_every,
            keep_last=config.checkpoint.keep_last,
            keep_every=plan.keep_every,
        )
        closing.callback(checkpoints.close)
        begin = start.begin(setup, plan, workdir, checkpoints, step.state, step.init)
        announce.notes(begin.notes)
        goes_on = begin.start.kind == "workdir"
        if is_main:  # only now: a start that failed must not bind the workdir to its config
            stored.save(config, workdir)
            initial.save_spec(setup, workdir)
        writer = MetricsWriter(workdir, is_main=is_main)
        closing.callback(writer.close)
        writer.rewind(begin.step if goes_on else -1)
        clock = Clock(
            total_steps=plan.total,
            batch_size=config.input.batch_size,
            num_devices=setup.mesh.size,
            start_step=begin.step,
            evals=plan.evals,
        )
        progress = TrainingProgress(clock, is_main=is_main)
        closing.callback(progress.close)
        run = TrainingRun(
            setup,
            workdir,
            plan,
            begin.step,
            logged_evaluators(workdir, begin.step, evaluators),
            evaluators,
            checkpoints,
            writer,
            clock,
            progress,
            BadExamples(),
            begin.bad_counts,
            (begin.step, int(begin.bad_counts.sum())),
        )
        announce.introduce(run, len(source), begin.state, begin.start)
        batches = loader.train_batches(
            source,
            setup.preprocess,
            batch_size=config.input.batch_size,
            seed=config.seed,
            start_step=begin.step,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            num_threads=config.input.num_threads,
            prefetch=config.input.prefetch,
            corrupt=config.input.corrupt,
            bad=run.bad,
        )
        closing.callback(batches.close)
        due = plan.evaluators_due(begin.step) if goes_on else []
        missed = [name for name in due if name not in run.logged]
        state = make_updates(run, step.update, begin.state, batches, missed)
        run.save(plan.total, state)
        final = run_evaluators(run, state, plan.total, list(evaluators))
        checkpoints.wait()
    announce.report(final, evaluators, workdir)
    return final


def make_updates(
    run: TrainingRun,
    update: Callable,
    state: TrainState,
    batches: Iterator[dict],
    missed: list[str],
) -> TrainState:
    """Makes all updates to the end, and does between them what falls due.

    Args:
      missed: evaluators that were due after run.first_step, when an earlier life was stopped.
    """
    config, plan, mesh = run.setup.config, run.plan, run.setup.mesh
    tally, in_flight = new_tally(mesh, run.bad_counts), collections.deque()
    with StopRequest() as stop:
        run_between_updates(run, stop, run.first_step, state, missed)
        for step in range(run.first_step + 1, plan.total + 1):
            with run.clock.waiting():
                batch = next(batches)
            batch = {k: v for k, v in batch.items() if k in BATCH_FIELDS}
            batch = to_device(batch, mesh)
            if step == run.first_step + 1:
                update = announce.compiled(run, update, state, tally, batch)
            state, tally, metrics = update(state, tally, batch)
            in_flight.append(metrics["loss"])
            if len(in_flight) > IN_FLIGHT or step == run.first_step + 1:
                jax.block_until_ready(in_flight.popleft())
            if step == run.first_step + 1:
                run.clock.tick(step)  # rates count from here on, without compilation

            stopping = stop.reached(step)
            logging = step % config.log_every == 0 or step == plan.total
            saving = run.checkpoints.due(step) or stopping
            due = plan.evaluators_due(step)
            if logging or saving or due:
                health.check(run, step, tally)
                run.clock.tick(step)
            if logging:
                run.log(step, metrics)
            if stopping:
                run.interrupt(step, state)
            if saving and step < plan.total:  # train saves the last one
                run.save(step, state)
            run_between_updates(run, stop, step, state, due)
    return state
