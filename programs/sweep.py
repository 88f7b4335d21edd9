"""A grid of runs of one config, one after another, to one table and one plot: see --help.

Each run is a process of main.py in a folder of its own, so it is resumed as any run is; a sweep
is resumed by its own command: what is finished is skipped.
"""

import argparse
import dataclasses
import itertools
import json
import pathlib
import re
import signal
import subprocess
import sys
import time
from typing import NoReturn

from ml_collections import ConfigDict

from base.errors import UserError
from base.words import nearest
from programs import sweep_report
from programs.sweep_report import Row
from trainers.config import complete, stored
from trainers.config.file import split_list

MAIN = pathlib.Path(__file__).resolve().parents[1] / "main.py"
LOG = "sweep.log"  # in the folder of a run: what main.py printed
DONE, FAILED, MISTAKE, INTERRUPTED = 0, 1, 2, 85  # the last two as in main.py

HELP = """\
Runs a config with every combination of some settings, one run after another, and compares them.

  python -m programs.sweep --config configs/quickstart.py --workdir runs/sweep \\
      --grid input.batch_size=64,128,256 --grid loss.name=sigmoid,softmax \\
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
class Run:
    """One point of the grid. `swept` and `overrides` (swept and fixed): (key, text) pairs."""

    swept: tuple[tuple[str, str], ...]
    overrides: tuple[tuple[str, str], ...]
    config: ConfigDict
    workdir: pathlib.Path

    @property
    def title(self) -> str:
        return " ".join(f"{key}={text}" for key, text in self.swept)

    def results(self) -> dict[str, dict[str, float | None]]:
        """{'evaluator/metric': {'value', 'chance'}}."""
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
) -> list[Run]:
    """The grid in order, the last key fastest.

    Raises:
      UserError: one of the configs is not valid, the folder of a run holds another one, no
        evaluator gives the metric.
    """
    runs = []
    for texts in itertools.product(*grid.values()):
        swept = tuple(zip(grid, texts))
        overrides = (*fixed, *swept)
        name = re.sub(r"[^\w.,=+-]", "_", ",".join(f"{key}={text}" for key, text in swept))
        run = Run(swept, overrides, complete.load(config_flag, overrides), workdir / name)
        stored.check_workdir(run.config, run.workdir)
        evals = list(run.config.to_dict()["evals"])
        if metric and metric.partition("/")[0] not in evals:
            raise UserError(
                f"--metric={metric}: the config has no such evaluator (evaluator/metric); "
                + nearest(metric.partition("/")[0], evals)
            )
        runs.append(run)
    return runs


def sweep(runs: list[Run], command: list[str], workdir: pathlib.Path, metric: str | None) -> int:
    """Runs what is not finished, then writes the tables and the plot; the exit code.

    Args:
      command: what trains; '--workdir=...' and '--config.key=value' are appended.
      metric: 'evaluator/metric' to plot; None for the first of the results.
    """
    todo = [run for run in runs if not run.is_finished()]
    print(f"{len(runs)} runs in {workdir}, {len(runs) - len(todo)} of them finished", flush=True)
    rows, seconds = [], []
    for i, run in enumerate(runs, 1):
        head = f"[{i}/{len(runs)}] {run.title}"
        error, took = "", ""
        if run in todo:
            print(f"{head}: running, log in {run.workdir / LOG}", flush=True)
            began = time.monotonic()
            error = execute(run, command)
            seconds.append(time.monotonic() - began)
            left = sum(later in todo for later in runs[i:])
            took = f", {_time(seconds[-1])}"
            took += f", about {_time(left * sum(seconds) / len(seconds))} left" if left else ""
        row = Row(dict(run.swept), {} if error else run.results(), error)
        if row.results:
            metric = metric or sweep_report.first_metric(row.results)
            if metric not in row.results:
                raise UserError(
                    f"--metric={metric}: no such metric; {nearest(metric, row.results)}"
                )
        print(f"{head}: {row.told(metric)}{took}", flush=True)
        rows.append(row)
    for path in sweep_report.write(rows, metric, workdir):
        print(path)
    if failed := [run for run, row in zip(runs, rows) if row.error]:
        print(f"error: {len(failed)} of {len(runs)} runs failed", file=sys.stderr)
    return FAILED if failed else DONE


class Interrupted(Exception):
    """The run was asked to stop; it has saved its state."""


def execute(run: Run, command: list[str]) -> str:
    """Trains one run; '' or what went wrong. Ctrl-C and SIGTERM are passed on, then Interrupted."""
    run.workdir.mkdir(parents=True, exist_ok=True)
    settings = [f"--config.{key}={text}" for key, text in run.overrides]
    with (run.workdir / LOG).open("ab") as log:
        # In a group of its own, so that Ctrl-C reaches it once, through us, and never halfway.
        process = subprocess.Popen(
            [*command, f"--workdir={run.workdir}", *settings],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
        asked = []

        def pass_on(signum, frame):
            asked.append(signum)
            process.send_signal(signal.SIGINT if signum == signal.SIGINT else signal.SIGTERM)

        caught = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # which nohup sets
            caught.append(signal.SIGHUP)
        previous = {signum: signal.signal(signum, pass_on) for signum in caught}
        try:
            code = process.wait()
        finally:
            for signum, handler in previous.items():
                signal.signal(signum, handler)
    if asked or code == INTERRUPTED:
        raise Interrupted
    if code:
        lines = (run.workdir / LOG).read_text(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"exit code {code}: {last}"
    return "" if (run.workdir / "results.json").exists() else "it left no results.json"


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(MISTAKE, f"error: {message}\n")


def make_parser() -> Parser:
    parser = Parser(
        description=HELP,
        epilog=EPILOG,
        usage="python -m programs.sweep --config path.py --workdir path --grid key=value,value ...",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
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
    """Does what the command line says; the exit code. A mistake of the user is one line."""
    fixed, rest = complete.split_overrides(argv)
    flags = make_parser().parse_args(rest)
    try:
        grid = parse_grid(flags.grid)
        runs = make_runs(flags.config, flags.workdir, grid, fixed, flags.metric)
        command = [sys.executable, str(main_py), f"--config={flags.config}"]
        return sweep(runs, command, flags.workdir, flags.metric)
    except UserError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return MISTAKE
    except (Interrupted, KeyboardInterrupt):
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return INTERRUPTED


def parse_grid(texts: list[str]) -> dict[str, list[str]]:
    """['lr=1e-3,1e-4'] -> {'lr': ['1e-3', '1e-4']}."""
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
