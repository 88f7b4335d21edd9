"""Trains one config with every combination of some settings, and compares the runs: see --help.

Each run is a process of main.py with a workdir of its own, so it is resumed as any run is. The
sweep is resumed by its own command, which skips finished runs.
"""

import dataclasses
import itertools
import json
import pathlib
import re
import signal
import subprocess
import sys
import time

from ml_collections import ConfigDict

from base.command_line import DONE, FAILED, INTERRUPTED, Parser, report, split_overrides
from base.command_line import run as run_program
from base.errors import UserError
from base.words import duration, nearest
from programs import sweep_report
from programs.sweep_report import SweepRow
from trainers.config import complete, stored
from trainers.config.file import split_list

MAIN = pathlib.Path(__file__).resolve().parents[1] / "main.py"
LOG = "sweep.log"  # in the workdir of a run: what main.py printed

HELP = """\
Runs a config with every combination of some settings, one run after another, and compares them.

  python -m programs.sweep --config configs/quickstart.py --workdir runs/sweep \\
      --grid input.batch_size=64,128,256 --grid objectives.contrastive.name=sigmoid,softmax \\
      --metric retrieval/i2t_R@1

Each run has its folder in the workdir. Stopped? Run the same command again: finished runs are
skipped, the one under way goes on. At the end the workdir holds sweep.csv, sweep.md and sweep.png,
the metric against the first setting with a line for each value of the others.
"""

EPILOG = """\
  --config.key=value    a setting of all runs, as for main.py

For a fair sweep over the batch size give durations (total, schedule.warmup) in examples or epochs,
not in steps: then every run sees the same data equally often. And the learning rate that suits one
batch size may not suit another: sweep it too, --grid lr=3e-4,1e-3.

exit codes: 0 done, 1 a run failed (the others went on), 2 a mistake in the command or config,
85 interrupted (run the same command again).
"""


@dataclasses.dataclass(frozen=True)
class SweepRun:
    """One point of the grid.

    Attributes:
      swept: (key, text) pairs of the grid.
      overrides: those and the settings that all runs share.
    """

    swept: tuple[tuple[str, str], ...]
    overrides: tuple[tuple[str, str], ...]
    config: ConfigDict
    workdir: pathlib.Path

    @property
    def title(self) -> str:
        return " ".join(f"{key}={text}" for key, text in self.swept)

    def results(self) -> dict[str, dict[str, float | None]]:
        """The results of a finished run: {'evaluator/metric': {'value', 'chance'}}."""
        nested = json.loads((self.workdir / "results.json").read_text())
        return {f"{e}/{m}": numbers for e, ms in nested.items() for m, numbers in ms.items()}

    def is_finished(self) -> bool:
        files = ("results.json", stored.CONFIG_FILE)
        exist = all((self.workdir / file).exists() for file in files)
        return exist and not stored.differences(self.config, self.workdir)


def make_runs(
    config_flag: str,
    workdir: pathlib.Path,
    grid: dict[str, list[str]],
    fixed: list[tuple[str, str]],
    metric: str | None = None,
) -> list[SweepRun]:
    """The runs of a grid in order, the last key fastest.

    Raises:
      UserError: one of the configs is invalid, its workdir holds another run, or no evaluator
        gives the metric.
    """
    runs = []
    for texts in itertools.product(*grid.values()):
        swept = tuple(zip(grid, texts))
        overrides = (*fixed, *swept)
        name = re.sub(r"[^\w.,=+-]", "_", ",".join(f"{key}={text}" for key, text in swept))
        run = SweepRun(swept, overrides, complete.load(config_flag, overrides), workdir / name)
        stored.check_workdir(run.config, run.workdir)
        evals = list(run.config.to_dict()["evals"])
        if metric and metric.partition("/")[0] not in evals:
            raise UserError(
                f"--metric={metric}: the config has no such evaluator (evaluator/metric); "
                + nearest(metric.partition("/")[0], evals)
            )
        runs.append(run)
    return runs


def sweep(
    runs: list[SweepRun], command: list[str], workdir: pathlib.Path, metric: str | None
) -> int:
    """Trains the runs that are not finished, then writes the tables and the plot.

    Args:
      command: what trains; '--workdir=...' and '--config.key=value' are appended.
      metric: 'evaluator/metric' to plot; None for the first of the results.

    Returns:
      the exit code.
    """
    todo = [run for run in runs if not run.is_finished()]
    print(f"{len(runs)} runs in {workdir}, {len(runs) - len(todo)} of them finished", flush=True)
    rows, seconds = [], []
    for i, run in enumerate(runs, 1):
        head, error, took = f"[{i}/{len(runs)}] {run.title}", "", ""
        if run in todo:
            print(f"{head}: running, log in {run.workdir / LOG}", flush=True)
            started = time.monotonic()
            error = execute(run, command)
            seconds.append(time.monotonic() - started)
            took = _took(seconds, sum(later in todo for later in runs[i:]))
        row = SweepRow(dict(run.swept), {} if error else run.results(), error)
        if row.results:
            metric = metric or sweep_report.first_metric(row.results)
            if metric not in row.results:
                raise UserError(
                    f"--metric={metric}: no such metric; {nearest(metric, row.results)}"
                )
        print(f"{head}: {row.summary(metric)}{took}", flush=True)
        rows.append(row)
    for path in sweep_report.write(rows, metric, workdir):
        print(path)
    if failed := sum(bool(row.error) for row in rows):
        return report(FAILED, f"error: {failed} of {len(runs)} runs failed")
    return DONE


def _took(seconds: list[float], left: int) -> str:
    """', 12s, about 1m00s left': the last run's time, and the mean for each run to come."""
    mean = sum(seconds) / len(seconds)
    return f", {duration(seconds[-1])}" + (f", about {duration(left * mean)} left" if left else "")


def execute(run: SweepRun, command: list[str]) -> str:
    """Trains one run; returns '' or what went wrong.

    Raises:
      KeyboardInterrupt: Ctrl-C or SIGTERM came; the run has saved its state.
    """
    run.workdir.mkdir(parents=True, exist_ok=True)
    settings = [f"--config.{key}={text}" for key, text in run.overrides]
    with (run.workdir / LOG).open("ab") as log:
        # In a process group of its own, so that Ctrl-C reaches it once, passed on by this process.
        process = subprocess.Popen(
            [*command, f"--workdir={run.workdir}", *settings],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
        code, interrupted = _wait(process)
    if interrupted or code == INTERRUPTED:
        raise KeyboardInterrupt
    if code:
        lines = (run.workdir / LOG).read_text(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"exit code {code}: {last}"
    return "" if (run.workdir / "results.json").exists() else "it left no results.json"


def _wait(process: subprocess.Popen) -> tuple[int, bool]:
    """The exit code, and whether a signal to stop came meanwhile, which is passed on."""
    received = []

    def pass_on(signum, frame):
        received.append(signum)
        process.send_signal(signal.SIGINT if signum == signal.SIGINT else signal.SIGTERM)

    caught = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # which nohup sets
        caught.append(signal.SIGHUP)
    previous = {signum: signal.signal(signum, pass_on) for signum in caught}
    try:
        return process.wait(), bool(received)
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def make_parser() -> Parser:
    parser = Parser(
        description=HELP,
        epilog=EPILOG,
        usage="python -m programs.sweep --config path.py --workdir path --grid key=value,value ...",
    )
    add = parser.add_argument
    add("--config", metavar="path.py", required=True, help="config file, as for main.py")
    add("--workdir", metavar="path", required=True, type=pathlib.Path, help="folder of the sweep")
    add(
        "--grid",
        metavar="key=value,value",
        action="append",
        required=True,
        help="a setting to sweep; repeat it for combinations",
    )
    add("--metric", metavar="evaluator/metric", help="what to plot (the first one)")
    return parser


def main(argv: list[str], main_py: pathlib.Path = MAIN) -> int:
    """Sweeps as the command line says; returns the exit code."""
    return run_program(lambda: _main(argv, main_py))


def _main(argv: list[str], main_py: pathlib.Path) -> int:
    fixed, rest = split_overrides(argv)
    flags = make_parser().parse_args(rest)
    grid = parse_grid(flags.grid)
    runs = make_runs(flags.config, flags.workdir, grid, fixed, flags.metric)
    command = [sys.executable, str(main_py), f"--config={flags.config}"]
    return sweep(runs, command, flags.workdir, flags.metric)


def parse_grid(texts: list[str]) -> dict[str, list[str]]:
    """Splits the texts of --grid: ['lr=1e-3,1e-4'] -> {'lr': ['1e-3', '1e-4']}."""
    grid: dict[str, list[str]] = {}
    for text in texts:
        key, _, listed = text.partition("=")
        key, values = key.removeprefix("config."), split_list(listed)
        if not key or not values:
            raise UserError(f"--grid {text}: write key=value,value")
        if key in grid or len(set(values)) < len(values):
            raise UserError(f"--grid {text}: given twice")
        grid[key] = values
    return grid


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
