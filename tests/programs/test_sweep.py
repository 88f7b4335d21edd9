"""Sweeps, with a program in main.py's place that only writes results."""

import csv
import json
import pathlib
import signal
import sys

import processes
import pytest

from base import command_line
from base.command_line import split_overrides
from programs import sweep, sweep_report
from programs.sweep_report import SweepRow

CONFIG = """\
from ml_collections import ConfigDict


def get_config():
    source = {"name": "scenes"}
    return ConfigDict({
        "input": {"batch_size": 64, "source": source},
        "evals": {"retrieval": {"type": "retrieval", "source": source}},
    })
"""

# Acts on a file `act` beside it: 'fail' or 'stop' and a part of the run's folder, or 'wait'.
FAKE_MAIN = """\
import json, pathlib, signal, sys, time

here = pathlib.Path(__file__).parent
args = dict(arg.removeprefix("--").split("=", 1) for arg in sys.argv[1:])
workdir = pathlib.Path(args["workdir"])
with (here / "calls").open("a") as calls:
    print(workdir.name, file=calls)
known = json.loads((here / "configs").read_text())
(workdir / "config.json").write_text(json.dumps(known[workdir.name]))
act, _, part = (here / "act").read_text().partition(" ")
if act == "wait":
    signal.signal(signal.SIGINT, lambda *_: sys.exit(85))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(85))
    print("waiting", flush=True)
    time.sleep(600)
if act and part in workdir.name:
    print("first line\\nloss is nan at step 3", file=sys.stderr)
    sys.exit({"fail": 87, "stop": 85}[act])
softmax = args["config.objectives.contrastive.name"] == "softmax"
n = int(args["config.input.batch_size"]) / (2 if softmax else 1)
r1, r5 = {"value": n / 1000, "chance": 0.01}, {"value": 0.5, "chance": 0.05}
loss = {"loss": {"value": 2.5, "chance": None}}
results = {"retrieval": {"i2t_R@1": r1, "i2t_R@5": r5}, "loss": loss}
(workdir / "results.json").write_text(json.dumps(results))
"""

LOSS = "objectives.contrastive.name"
GRID = ["--grid=input.batch_size=64,128,256", f"--grid={LOSS}=sigmoid,softmax"]


class Fake:
    """A folder with a config and a fake main.py."""

    def __init__(self, folder: pathlib.Path):
        self.folder, self.workdir, self.config = folder, folder / "sweep", folder / "c.py"
        self.config.write_text(CONFIG)
        self.main = folder / "fake_main.py"
        self.main.write_text(FAKE_MAIN)
        self.act("")

    def act(self, what: str) -> None:
        (self.folder / "act").write_text(what)

    def argv(self, *more: str) -> list[str]:
        return [f"--config={self.config}", f"--workdir={self.workdir}", *(more or GRID)]

    def run(self, *more: str) -> int:
        self.expect(*more)
        return sweep.main(self.argv(*more), self.main)

    def expect(self, *more: str) -> None:
        """Tells the fake main.py which config each folder has."""
        fixed, rest = split_overrides(self.argv(*more))
        grid = sweep.parse_grid(
            [arg.removeprefix("--grid=") for arg in rest if arg.startswith("--grid")]
        )
        runs = sweep.make_runs(str(self.config), self.workdir, grid, fixed)
        known = {run.workdir.name: run.config.to_dict() for run in runs}
        (self.folder / "configs").write_text(json.dumps(known))

    def table(self) -> list[dict[str, str]]:
        return list(csv.DictReader((self.workdir / "sweep.csv").read_text().splitlines()))

    def calls(self) -> list[str]:
        path = self.folder / "calls"
        calls = path.read_text().split() if path.exists() else []
        path.unlink(missing_ok=True)
        return calls


@pytest.fixture
def fake(tmp_path) -> Fake:
    return Fake(tmp_path)


def names(*runs: tuple[int, str]) -> list[str]:
    return [f"input.batch_size={n},{LOSS}={loss}" for n, loss in runs]


ALL = [(n, loss) for n in (64, 128, 256) for loss in ("sigmoid", "softmax")]


def test_the_whole_grid_runs_in_order_to_tables_and_a_plot(fake, capsys):
    assert fake.run() == sweep.DONE
    assert fake.calls() == names(*ALL)
    rows = fake.table()
    assert [(r["input.batch_size"], r[LOSS]) for r in rows] == [(str(n), s) for n, s in ALL]
    assert [float(r["retrieval/i2t_R@1"]) for r in rows] == [
        n / 1000 / (2 if s == "softmax" else 1) for n, s in ALL
    ]
    assert {r["retrieval/i2t_R@1 chance"] for r in rows} == {"0.01"}
    assert {r["loss/loss chance"] for r in rows} == {""}
    lines = (fake.workdir / "sweep.md").read_text().splitlines()
    assert lines[0] == (
        f"| input.batch_size | {LOSS} | retrieval/i2t_R@1 | retrieval/i2t_R@5 | loss/loss |"
    )
    assert lines[2] == "| 64 | sigmoid | 0.064 | 0.5 | 2.5 |"
    assert lines[8:] == ["| chance |  | 0.01 | 0.05 |  |"]
    assert (fake.workdir / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    out = capsys.readouterr().out
    assert f"[2/6] input.batch_size=64 {LOSS}=softmax: retrieval/i2t_R@1 = 0.032" in out
    assert out.count(" left") == 5  # all but the last run say how long the others will take


def test_finished_runs_are_skipped_and_changed_ones_are_not(fake):
    fake.run()
    fake.calls()
    assert fake.run() == sweep.DONE
    assert fake.calls() == []
    folder = fake.workdir / names(ALL[3])[0]
    (folder / "results.json").unlink()
    assert fake.run(*GRID) == sweep.DONE
    assert fake.calls() == names(ALL[3])
    # Other evaluations of the same training: to be done again, all of them.
    assert fake.run(*GRID, "--config.evals.retrieval.batch_size=8") == sweep.DONE
    assert fake.calls() == names(*ALL)


def test_a_failed_run_is_told_and_the_others_go_on(fake, capsys):
    fake.act(f"fail 128,{LOSS}=softmax")
    assert fake.run() == sweep.FAILED
    assert fake.calls() == names(*ALL)
    shown = capsys.readouterr()
    assert f"{LOSS}=softmax: failed, exit code 87: loss is nan at step 3" in shown.out
    assert shown.err == "error: 1 of 6 runs failed\n"
    rows = fake.table()
    assert [bool(r["error"]) for r in rows] == [False, False, False, True, False, False]
    assert "| 128 | softmax | failed | failed | failed |" in (fake.workdir / "sweep.md").read_text()
    fake.act("")
    assert fake.run() == sweep.DONE
    assert fake.calls() == names(ALL[3])


def test_a_sweep_without_one_good_run_leaves_its_tables(fake):
    fake.act("fail ")
    assert fake.run() == sweep.FAILED
    assert (fake.workdir / "sweep.csv").exists() and not (fake.workdir / "sweep.png").exists()


def test_an_interrupted_run_stops_the_sweep_which_goes_on_there(fake, capsys):
    fake.act(f"stop 128,{LOSS}=sigmoid")
    assert fake.run() == sweep.INTERRUPTED
    assert fake.calls() == names(*ALL[:3])
    assert capsys.readouterr().err == "interrupted; run the same command again to go on\n"
    fake.act("")
    assert fake.run() == sweep.DONE
    assert fake.calls() == names(*ALL[2:])


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_passed_on_to_the_run(fake, signum):
    fake.act("wait")
    fake.expect()
    program = (
        "import pathlib, sys; from programs import sweep; "
        f"sys.exit(sweep.main(sys.argv[1:], pathlib.Path({str(fake.main)!r})))"
    )
    log = fake.workdir / names(ALL[0])[0] / sweep.LOG
    with processes.started([sys.executable, "-c", program, *fake.argv()]) as process:
        processes.wait_until(lambda: log.exists() and "waiting" in log.read_text(), process)
        process.send_signal(signum)
        err = processes.end(process, sweep.INTERRUPTED).stderr
    assert "run the same command again" in err
    assert fake.calls() == names(ALL[0])


def test_fixed_overrides_reach_every_run(fake):
    assert fake.run(*GRID, "--config.seed=7") == sweep.DONE
    for name in fake.calls():
        assert json.loads((fake.workdir / name / "config.json").read_text())["seed"] == 7


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--grid=input.bach_size=1,2"], "unknown key --config.input.bach_size; the nearest"),
        ([f"--grid={LOSS}=sigmoid,softmx"], "'softmx' is unknown; the nearest: softmax"),
        (["--grid=lr=1,1"], "--grid lr=1,1: given twice"),
        (["--grid=lr"], "--grid lr: write key=value,value"),
        (
            [*GRID, "--metric=retreival/x"],
            "no such evaluator (evaluator/metric); the nearest: retrieval",
        ),
        ([*GRID, "--config.sed=1"], "unknown key --config.sed; the nearest: --config.seed"),
    ],
)
def test_mistakes_are_one_line_before_any_run(fake, capsys, argv, told):
    assert sweep.main(fake.argv(*argv), fake.main) == command_line.MISTAKE
    err = capsys.readouterr().err
    assert told in err and err.count("\n") == 1
    assert fake.calls() == []


def test_a_metric_that_no_result_has_stops_after_the_first_run(fake, capsys):
    assert fake.run(*GRID, "--metric=retrieval/i2t_R1") == command_line.MISTAKE
    assert "the nearest: retrieval/i2t_R@1" in capsys.readouterr().err
    assert len(fake.calls()) == 1


def test_a_folder_with_another_run_is_refused_before_any_run(fake, capsys):
    fake.run()
    fake.calls()
    assert sweep.main(fake.argv(*GRID, "--config.seed=1"), fake.main) == command_line.MISTAKE
    assert "config.seed: there 0, here 1" in capsys.readouterr().err
    assert fake.calls() == []


def test_grid_values_keep_their_brackets_and_folders_are_plain_names(fake):
    grid = sweep.parse_grid(["config.lr=1e-3,1e-4", "wd_mults=((.*,1.0),),((.*,0.0),)"])
    assert grid == {"lr": ["1e-3", "1e-4"], "wd_mults": ["((.*,1.0),)", "((.*,0.0),)"]}
    (run,) = sweep.make_runs(str(fake.config), fake.workdir, {"init": ["a/b c"]}, [])
    assert run.workdir == fake.workdir / "init=a_b_c"


def row(swept: dict[str, str], value: float, chance: float | None = 0.1) -> SweepRow:
    return SweepRow(swept, {"r/a": {"value": value, "chance": chance}})


def plotted(rows: list[SweepRow], tmp_path, monkeypatch):
    """The axes of the plot."""
    import matplotlib.pyplot as plt

    monkeypatch.setattr(plt, "close", lambda fig: None)
    sweep_report.write(rows, "r/a", tmp_path)
    axes = plt.gcf().axes[0]
    monkeypatch.undo()
    plt.close("all")
    return axes


def test_the_plot_has_a_line_per_other_value_chance_dashed_and_powers_of_two(tmp_path, monkeypatch):
    rows = [row({LOSS: loss, "n": str(n)}, n / 1000) for loss in ("a", "b") for n in (256, 64, 128)]
    axes = plotted(rows, tmp_path, monkeypatch)
    assert axes.get_xlabel() == "n" and axes.get_ylabel() == "r/a" and axes.get_xscale() == "log"
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert sorted(lines) == ["chance", f"{LOSS} = a", f"{LOSS} = b"]
    assert list(lines[f"{LOSS} = a"].get_xdata()) == [64, 128, 256]
    assert lines["chance"].get_linestyle() == "--" and set(lines["chance"].get_ydata()) == {0.1}
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["64", "128", "256"]


def test_a_chance_level_that_depends_on_the_run_stands_beside_each_value(tmp_path):
    sweep_report.write([row({"n": n}, 0.5, float(n) / 10) for n in "12"], "r/a", tmp_path)
    lines = (tmp_path / "sweep.md").read_text().splitlines()
    assert lines[2:] == ["| 1 | 0.5 (chance 0.1) |", "| 2 | 0.5 (chance 0.2) |"]


def test_the_plot_of_close_or_named_values_has_a_plain_axis(tmp_path, monkeypatch):
    axes = plotted([row({"n": n}, 1.0, None) for n in ("1", "2")], tmp_path, monkeypatch)
    assert axes.get_xscale() == "linear" and len(axes.get_lines()) == 1
    axes = plotted([row({"s": s}, 1.0) for s in ("x", "a")], tmp_path, monkeypatch)
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["x", "a"]
