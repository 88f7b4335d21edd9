"""What a run prints about itself at its start and at its end."""

import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import jax
from clu import parameter_overview

from trainers.fit.compiled import memory_of
from trainers.objectives import describe_objectives
from trainers.report import results
from trainers.report.results import Results
from trainers.run import TrainingRun
from trainers.state.start import Start

PARAMETERS = "parameters.txt"  # in the workdir: a table of all parameters


def introduce(run: TrainingRun, examples: int, state: Any, start: Start) -> None:
    """Prints what is about to be trained on what, and writes the table of parameters once."""
    config, mesh, total = run.setup.config, run.setup.mesh, run.plan.total
    arrays = jax.tree.leaves(state.params)
    begin = {
        "workdir": f"going on from step {run.first_step} of {run.workdir}",
        "resume": f"going on from {start.path} in {run.workdir}",
        "init": f"starting from the weights of {start.path} in {run.workdir}",
        "scratch": f"starting from scratch in {run.workdir}",
    }[start.kind]
    if run.first_step == total:
        begin = f"{run.workdir} is trained already, evaluating it again"
    epochs = total * config.input.batch_size / examples
    microbatch = config.input.microbatch
    parts = f" (embedded {microbatch} at a time)" if microbatch else ""
    run.progress.note(
        f"{begin}\n"
        f"  model: {sum(x.size for x in arrays):,} parameters in {len(arrays)} arrays\n"
        f"  data: {examples:,} examples; {total:,} steps of {config.input.batch_size}{parts}, "
        f"{epochs:.3g} epochs\n"
        f"  devices: {mesh.size} {mesh.devices.flat[0].platform}, "
        f"mesh {', '.join(f'{k}={v}' for k, v in mesh.shape.items())}; "
        f"attention {run.setup.model.txt.attention}; jax {jax.__version__}\n"
        f"  loss: {describe_objectives(config, run.setup.model, mesh)}"
    )
    if jax.process_index() == 0 and not (run.workdir / PARAMETERS).exists():
        table = parameter_overview.get_parameter_overview(state.params, include_stats=False)
        (run.workdir / PARAMETERS).write_text(table + "\n")
    if jax.process_index() == 0 and start.kind != "workdir":
        table = (run.workdir / PARAMETERS).read_text()
        run.writer.write_texts(run.first_step, {"parameters": f"```\n{table}```"})
        run.writer.write_hparams(config.to_dict())


def compiled(run: TrainingRun, update: Callable, *args: Any) -> Callable:
    """The update compiled for these arguments; prints the memory that it needs on a device."""
    program = cast(Any, update).lower(*args).compile()
    memory = memory_of(program, run.setup.mesh.local_devices[0])
    run.progress.note(f"  memory of a step: {memory}")
    return program


def notes(lines: Iterable[str]) -> None:
    """Prints lines that begin with 'note:', in one process."""
    for line in lines if jax.process_index() == 0 else ():
        print(f"note: {line}", flush=True)


def report(final: Results, evaluators: Mapping[str, Any], workdir: pathlib.Path) -> None:
    """Writes results.json and prints the same numbers as a table, with their protocols."""
    if jax.process_index() == 0:
        results.write_json(workdir / "results.json", final)
        table = results.table(final) if final else "no evaluator is declared (config.evals)"
        protocols = "\n".join(f"{name}: {evaluators[name].protocol}" for name in final)
        print(f"\n{table}\n\n{protocols}\n\nrun: {workdir}", flush=True)
