"""The life of a run: start or go on, update, log, save, evaluate, stop."""

import collections
import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NoReturn

import jax
import numpy as np
from clu import parameter_overview
from jax.experimental import multihost_utils

from base.errors import UserError
from input_pipeline import loader
from input_pipeline.bad_examples import BadExamples
from input_pipeline.errors import KINDS
from input_pipeline.sources import storage
from siglip.sharding import to_device
from siglip.towers.vit import IMAGE_FIELDS
from trainers import setup
from trainers.config import complete as configs
from trainers.machine.preemption import Interrupted, StopNow, StopRequest
from trainers.report import results
from trainers.report.clock import Clock
from trainers.report.metrics import Writer
from trainers.report.progress import Progress, memory
from trainers.report.results import Results
from trainers.state import checkpointing, initial
from trainers.state.checkpointing import SaveError
from trainers.step import update as contrastive
from trainers.step.optimizer import frozen_mask, make_tx

__all__ = ["Diverged", "Interrupted", "SaveError", "evaluate", "train"]

PARAMETERS, INDEX = "parameters.txt", "index"  # in the workdir
# Of a batch, what the update step takes.
FIELDS = (*IMAGE_FIELDS, "text", "mask", "bad", "index")
AHEAD = 2  # updates in flight: the host prepares one while the device does another


class Diverged(Exception):
    """The loss or a gradient was not finite. The message names the last good checkpoint."""


@dataclasses.dataclass
class Run:
    """What the parts of the loop share."""

    things: setup.Setup
    workdir: pathlib.Path
    plan: setup.Plan
    first: int  # the step after which this life of the run begins
    logged: frozenset[str]  # evaluators whose numbers of that step an earlier life has logged
    evaluators: dict[str, Any]
    checkpoints: checkpointing.Checkpoints
    writer: Writer
    clock: Clock
    progress: Progress
    bad: BadExamples  # the bad examples that this process met, by name
    bad_counts: np.ndarray  # of all processes, by kind, in all steps that are done
    checked: tuple[int, int]  # (step, bad examples) up to which none came in crowds

    def save(self, step: int, state: contrastive.TrainState) -> None:
        """The state and the position in the data: batches are a function of (seed, step)."""
        self.writer.flush()  # a power cut must not leave a checkpoint that is ahead of the log
        position = _position(self.things.config, self.plan, step)
        counts = {kind: int(count) for kind, count in zip(KINDS, self.bad_counts) if count}
        self.checkpoints.save(step, state, {**position, "bad": counts})

    def interrupt(self, step: int, state: contrastive.TrainState) -> NoReturn:
        self.save(step, state)
        self.checkpoints.wait()
        where = self.checkpoints.directory / str(step)
        raise Interrupted(f"stopped at step {step} of {self.plan.total}, saved in {where}")


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
    storage.keep_indexes_in(str(workdir / INDEX))
    source = setup.make_source(config)
    plan = setup.make_plan(config, len(source), setup.order_hash(config, source))
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
    with contextlib.ExitStack() as closing:
        checkpoints = checkpointing.Checkpoints(
            str(workdir),
            every=plan.save_every,
            keep_last=config.checkpoint.keep_last,
            keep_every=plan.keep_every,
        )
        closing.callback(checkpoints.close)
        state, first, start, bad_counts = _start(things, plan, workdir, checkpoints, abstract, init)
        if is_main:  # only now: a start that failed must not bind the workdir to its config
            configs.save(config, workdir)
            initial.save_spec(things, workdir)
        writer = Writer(workdir, is_main=is_main)
        closing.callback(writer.close)
        writer.rewind(first if start.kind == "workdir" else -1)
        clock = Clock(
            total_steps=plan.total,
            batch_size=config.input.batch_size,
            num_devices=things.mesh.size,
            start_step=first,
            evals=plan.evals,
        )
        progress = Progress(clock, is_main=is_main)
        closing.callback(progress.close)
        logged = _logged(workdir, first, evaluators)
        run = Run(
            things,
            workdir,
            plan,
            first,
            logged,
            evaluators,
            checkpoints,
            writer,
            clock,
            progress,
            BadExamples(),
            bad_counts,
            (first, int(bad_counts.sum())),
        )
        _introduce(run, len(source), state, start)
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
            microbatch=config.input.microbatch % config.input.batch_size,  # all at once: 0
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
            corrupt=config.input.corrupt,
            bad=run.bad,
        )
        closing.callback(batches.close)
        missed = _due(plan, first) if start.kind == "workdir" else []
        state = _updates(run, update, state, batches, [k for k in missed if k not in logged])
        run.save(plan.total, state)
        final = _evaluations(run, state.params, plan.total, list(evaluators))
        checkpoints.wait()
    _report(final, evaluators, workdir)
    return final


def evaluate(config: Any, workdir: str | pathlib.Path) -> Results:
    """All evaluators on the newest checkpoint of the workdir, or, where it holds none, on the
    weights of config.init; writes results.json.

    Raises:
      UserError: there is no checkpoint, or it does not fit.
    """
    workdir = pathlib.Path(workdir)
    start = checkpointing.find_start(str(workdir), init=config.init)
    if start.kind == "scratch":
        raise UserError(
            f"{workdir} holds no checkpoint to evaluate; train first, or pass --config and "
            "--config.init=WEIGHTS"
        )
    if start.kind == "init":
        other = [d for d in configs.differences(config, workdir) if d.key == "init"]
        if other:
            raise UserError(
                f"{workdir} holds results of other weights ({other[0]}); choose another"
            )
    storage.keep_indexes_in(str(workdir / INDEX))
    things = setup.make_setup(config)
    evaluators = setup.make_evaluators(things)
    params = _params_of(things, start)
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        if start.kind == "init":  # results without a run: of which weights stands beside them
            configs.save(config, workdir)
        initial.save_spec(things, workdir)
    final = {}
    for name, evaluator in evaluators.items():
        if jax.process_index() == 0:
            told = f"at step {start.step}" if start.kind == "workdir" else f"of {start.path}"
            print(f"evaluating {name} {told}", flush=True)
        final[name] = _evaluate_one(evaluator, params)
    _report(final, evaluators, workdir)
    return final


def _params_of(things: setup.Setup, start: checkpointing.Start):
    """The parameters to evaluate."""
    abstract = setup.sharded(things.abstract_params(), things.mesh)
    if start.kind == "workdir":
        return checkpointing.restore_params(str(start.path), abstract)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    key, inputs = jax.random.key(things.config.seed), things.inputs
    fresh = jax.jit(lambda: things.model.init(key, *inputs)["params"], out_shardings=shardings)()
    params, notes = initial.initial_params(things, fresh, start.path or "")
    _tell(notes)
    return params


def _tell(notes: Iterable[str]) -> None:
    for note in notes if jax.process_index() == 0 else ():
        print(f"note: {note}", flush=True)


def _start(things, plan, workdir, checkpoints, abstract, init):
    """(state, step, Start, counts of bad examples) of the checkpoint that find_start says wins."""
    config = things.config
    start = checkpointing.find_start(str(workdir), config.resume, config.init)
    state, step, saved = None, 0, {}
    match start.kind:
        case "workdir":
            state, saved, step = checkpoints.restore(abstract)
            start = dataclasses.replace(start, step=step)  # not the newest if that is damaged
        case "resume":
            state, saved, step = checkpointing.restore_state(str(start.path), abstract)
        case "init":
            state = init()
            params, notes = initial.initial_params(things, state.params, start.path or "")
            state = state.replace(params=params)
            _tell(notes)
        case _:
            state = init()
    here = _position(config, plan, step)
    if differing := [k for k in here if saved.get(k, here[k]) != here[k]]:
        raise UserError(
            f"the run goes on in the data where {start.path} stopped, but "
            + ", ".join(f"{k} is {saved[k]} there, {here[k]} here" for k in differing)
            + " (seed, input.batch_size and the data must be those of that run; config.init takes "
            "its weights alone)"
        )
    if step > plan.total:
        raise UserError(
            f"the checkpoint to go on from is at step {step}, beyond the {plan.total} steps of "
            f"config.total={config.total!r} with this data"
        )
    counts = saved.get("bad", {})
    return state, step, start, np.array([counts.get(kind, 0) for kind in KINDS], np.int32)


def _position(config, plan: setup.Plan, step: int) -> dict[str, int]:
    """Where a run stands in its data, and which order they have."""
    return {
        "step": step,
        "seed": config.seed,
        "examples": step * config.input.batch_size,
        "examples_per_epoch": plan.epoch,
        "order": plan.order,
    }


def _due(plan: setup.Plan, step: int) -> list[str]:
    """Evaluators that run after `step`; after the last one all do, which is not asked here."""
    if not 0 < step < plan.total:
        return []
    return [name for name, every in plan.evals.items() if every and step % every == 0]


def _logged(workdir: pathlib.Path, step: int, names: Iterable[str]) -> frozenset[str]:
    """Evaluators with numbers of `step` in metrics.jsonl, as process 0 sees it."""
    names, keys = sorted(names), set()
    if jax.process_index() == 0 and (file := workdir / "metrics.jsonl").exists():
        for event in map(json.loads, file.read_text().splitlines()):
            keys |= set(event) if event["step"] == step else set()
    found = np.array([any(key.startswith(f"{name}/") for key in keys) for name in names], bool)
    if names and jax.process_count() > 1:
        found = multihost_utils.broadcast_one_to_all(found)
    return frozenset(name for name, is_logged in zip(names, found) if is_logged)


def _updates(run: Run, update, state, batches: Iterator[dict], missed: list[str]):
    """All updates to the end, and what falls due between them.

    `missed`: evaluators that were due after the first step, when the run was stopped.
    """
    config, plan, mesh = run.things.config, run.plan, run.things.mesh
    tally, in_flight = contrastive.new_tally(mesh, run.bad_counts), collections.deque()
    with StopRequest() as stop:
        _evaluations_between(run, stop, run.first, state, missed)
        for step in range(run.first + 1, plan.total + 1):
            with run.clock.waiting():
                batch = next(batches)
            batch = {k: v for k, v in batch.items() if k in FIELDS}
            state, tally, metrics = update(state, tally, to_device(batch, mesh))
            in_flight.append(metrics["loss"])
            if len(in_flight) > AHEAD or step == run.first + 1:
                jax.block_until_ready(in_flight.popleft())
            if step == run.first + 1:
                run.clock.tick(step)  # from here on without compilation

            stopping = stop.reached(step)
            logging = step % config.log_every == 0 or step == plan.total
            saving = run.checkpoints.due(step) or stopping
            due = _due(plan, step)
            if logging or saving or due:
                _check(run, step, tally)
                run.clock.tick(step)
            if logging:
                _log(run, step, metrics)
            if stopping:
                run.interrupt(step, state)
            if saving and step < plan.total:  # the last one is saved by train
                run.save(step, state)
            _evaluations_between(run, stop, step, state, due)
    return state


def _evaluations_between(run: Run, stop: StopRequest, step: int, state, names: list[str]) -> None:
    """Evaluations before the end. They may take minutes, which a preempted machine does not have:
    a request to stop breaks them off, and the next life of the run makes up for them."""
    if names:
        try:
            with stop.at_once():
                _evaluations(run, state.params, step, names)
        except StopNow:
            run.interrupt(step, state)


def _log(run: Run, step: int, metrics: dict[str, jax.Array]) -> None:
    """One event of everything; logit statistics are NaN on a last step that is not due."""
    scalars = {k: float(v) for k, v in jax.device_get(metrics).items()}
    scalars = {k: v for k, v in scalars.items() if not np.isnan(v)}
    scalars |= {"epoch": step * run.things.config.input.batch_size / run.plan.epoch}
    scalars |= {"bad_examples": int(run.bad_counts.sum())}
    scalars |= {f"bad/{kind}": int(n) for kind, n in zip(KINDS, run.bad_counts) if n}
    scalars |= run.clock.rates() | memory()
    run.writer.write_scalars(step, scalars)
    run.progress.update(loss=scalars["loss"], lr=scalars["lr"])


def _check(run: Run, step: int, tally: contrastive.Tally) -> None:
    """Stops a run that has diverged, or whose data are bad. The same on every process."""
    tally = jax.device_get(tally)
    run.bad_counts, examples = np.asarray(tally.bad), step * run.things.config.input.batch_size
    bad = int(tally.bad.sum())
    allowed = run.things.config.input.max_bad_fraction
    # A disk that has gone: the whole run's share would show it late.
    recent, since = examples - run.checked[0] * run.things.config.input.batch_size, run.checked[1]
    if recent >= CROWD:
        if bad - since > max(0.5, allowed) * recent:
            raise UserError(
                f"{bad - since} of the last {recent} examples could not be used by step {step}; "
                f"the worst: {_everywhere(run.bad.worst())}"
            )
        run.checked = step, bad
    # Of few examples one is a large share already, so a single one stops no run that allows any.
    if bad > max(allowed * examples, 1 if allowed else 0):
        kinds = ", ".join(f"{n} {kind}" for kind, n in zip(KINDS, tally.bad) if n)
        raise UserError(
            f"{bad} of {examples} examples could not be used by step {step} ({kinds}), more than "
            f"config.input.max_bad_fraction={allowed}; the worst: {_everywhere(run.bad.worst())}"
        )
    if tally.first_nonfinite != contrastive.NONE:
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
            f"loss or gradient was not finite at step {tally.first_nonfinite}, which has changed "
            f"no parameter; {advice}"
        )


CROWD = 256  # examples, of which half are not bad by chance
MOST_BYTES = 2000  # of a message that another process tells


def _everywhere(message: str) -> str:
    """What each process has to say."""
    if jax.process_count() == 1:
        return message
    told = message.encode()[:MOST_BYTES]
    mine = np.zeros(MOST_BYTES, np.uint8)
    mine[: len(told)] = np.frombuffer(told, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(mine))
    said = [bytes(row).rstrip(b"\0").decode("utf-8", "replace") for row in rows]
    return "; ".join(f"process {i}: {text}" for i, text in enumerate(said) if text)


def _evaluations(run: Run, params, step: int, names: Iterable[str]) -> Results:
    """Runs some of the evaluators, and logs what is not logged yet."""
    found: Results = {}
    for name in names:
        run.progress.note(f"evaluating {name} at step {step}")
        with run.clock.evaluating(name, step):
            found[name] = _evaluate_one(run.evaluators[name], params)
        scalars = {f"{name}/{metric}": got["value"] for metric, got in found[name].items()}
        if step != run.first or name not in run.logged:
            run.writer.write_scalars(step, scalars)
        run.progress.note("  " + ", ".join(f"{k} {v:.4f}" for k, v in scalars.items()))
    return found


def _evaluate_one(evaluator, params) -> dict[str, dict[str, float | None]]:
    return {m: {"value": float(v), "chance": c} for m, v, c in evaluator.run(params)}


def _introduce(run: Run, examples: int, state, start: checkpointing.Start) -> None:
    """What is about to be trained, on what: once per life, the parameter table in a file."""
    config, mesh, total = run.things.config, run.things.mesh, run.plan.total
    arrays = jax.tree.leaves(state.params)
    told = {
        "workdir": f"going on from step {run.first} of {run.workdir}",
        "resume": f"going on from {start.path} in {run.workdir}",
        "init": f"starting from the weights of {start.path} in {run.workdir}",
        "scratch": f"starting from scratch in {run.workdir}",
    }[start.kind]
    if run.first == total:
        told = f"{run.workdir} is trained already, evaluating it again"
    epochs = total * config.input.batch_size / examples
    microbatch = config.input.microbatch
    parts = f" (embedded {microbatch} at a time)" if microbatch else ""
    run.progress.note(
        f"{told}\n"
        f"  model: {sum(x.size for x in arrays):,} parameters in {len(arrays)} arrays\n"
        f"  data: {examples:,} examples; {total:,} steps of {config.input.batch_size}{parts}, "
        f"{epochs:.3g} epochs\n"
        f"  devices: {mesh.size} {mesh.devices.flat[0].platform}, "
        f"mesh {', '.join(f'{k}={v}' for k, v in mesh.shape.items())}; "
        f"jax {jax.__version__}\n"
        f"  loss: {setup.describe_loss(run.things)}"
    )
    if jax.process_index() == 0 and not (run.workdir / PARAMETERS).exists():
        table = parameter_overview.get_parameter_overview(state.params, include_stats=False)
        (run.workdir / PARAMETERS).write_text(table + "\n")
    if jax.process_index() == 0 and start.kind != "workdir":
        table = (run.workdir / PARAMETERS).read_text()
        run.writer.write_texts(run.first, {"parameters": f"```\n{table}```"})
        run.writer.write_hparams(config.to_dict())


def _report(final: Results, evaluators: Mapping[str, Any], workdir: pathlib.Path) -> None:
    if jax.process_index() == 0:
        results.write_json(workdir / "results.json", final)
        table = results.table(final) if final else "no evaluator is declared (config.evals)"
        measured = "\n".join(f"{name}: {evaluators[name].protocol}" for name in final)
        print(f"\n{table}\n\n{measured}\n\nrun: {workdir}", flush=True)
