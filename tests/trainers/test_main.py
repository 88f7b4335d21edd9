"""The command line: what it passes on, its exit codes, and mistakes in one line."""

import json
import pathlib
import re
import signal
import sys

import jax
import processes
import pytest

import main as program
import trainers
from base.errors import UserError
from trainers.config import complete, stored
from trainers.health import Diverged
from trainers.machine.preemption import Interrupted

MAIN = pathlib.Path(program.__file__)
CONFIG = """\
from ml_collections import ConfigDict


def get_config(batch_size=32):
    return ConfigDict({"input": {"batch_size": batch_size, "source": {"name": "scenes"}}})
"""


@pytest.fixture
def called(tmp_path, monkeypatch) -> list:
    """What trainers.train and .evaluate are called with, in a folder with one config."""
    calls = []
    for name in ("train", "evaluate"):
        monkeypatch.setattr(trainers, name, lambda *args, name=name: calls.append((name, *args)))
    for variable in ("JAX_COORDINATOR_ADDRESS", "SLURM_JOB_ID"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(tmp_path)
    pathlib.Path("configs").mkdir()
    pathlib.Path("configs/tiny.py").write_text(CONFIG)
    return calls


def run(command: str) -> int:
    """The exit code of main.py."""
    try:
        return program.main(command.split())
    except SystemExit as stop:
        return stop.code


COMMAND = "--config=configs/tiny.py:batch_size=8 --workdir=w"


def test_training_gets_the_complete_config_and_the_workdir(called, capsys):
    assert (
        run(f"{COMMAND} --config.lr 0.5 --config.objectives.contrastive.name=softmax")
        == program.DONE
    )
    ((name, config, workdir),) = called
    assert (name, workdir) == ("train", "w")
    assert (config.input.batch_size, config.lr, config.objectives.contrastive.name) == (
        8,
        0.5,
        "softmax",
    )
    assert capsys.readouterr().out == "distributed: no, one process (nothing asks for more)\n"


def test_eval_only_reads_the_config_of_the_workdir(called):
    stored.save(complete.load("configs/tiny.py", [("seed", "7")]), "w")
    assert run("--eval_only --workdir w --config.log_every=3") == program.DONE
    ((name, config, workdir),) = called
    assert (name, workdir, config.seed, config.log_every) == ("evaluate", "w", 7, 3)
    assert run("--eval_only --workdir w --config configs/tiny.py --config.seed=7") == program.DONE


@pytest.mark.parametrize(
    ("raised", "code", "told"),
    [
        (UserError("no image 'a.png' in b.zip"), 2, "error: no image 'a.png' in b.zip"),
        (Interrupted("stopped at step 3"), 85, "stopped at step 3; run the same command "),
        (KeyboardInterrupt(), 85, "interrupted; run the same command again to go on"),
        (Diverged("loss is nan at step 3"), 87, "diverged: loss is nan at step 3"),
    ],
)
def test_how_a_run_ends_is_an_exit_code_and_a_line(called, capsys, monkeypatch, raised, code, told):
    def train(config, workdir):
        raise raised

    monkeypatch.setattr(trainers, "train", train)
    assert run(COMMAND) == code
    err = capsys.readouterr().err
    assert err.startswith(told) and err.count("\n") == 1


def test_a_bug_keeps_its_traceback(called, monkeypatch):
    def train(config, workdir):
        raise ValueError("not the user's fault")

    monkeypatch.setattr(trainers, "train", train)
    with pytest.raises(ValueError, match="not the user's fault"):
        run(COMMAND)


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("", "pass --config, one of configs/tiny.py; see --help"),
        ("--config configs/tiny.py", "pass --workdir, .* such as --workdir runs/tiny"),
        ("--eval_only", "pass --workdir"),
        ("--config configs/tiny.py:batch_size=3", "such as --workdir runs/tiny"),
        (f"{COMMAND} --word_dir=x", "unknown flag --word_dir; the nearest: --workdir"),
        (f"{COMMAND} --confg.lr=3", "unknown flag --confg.lr; the nearest: --config"),
        (f"{COMMAND} lr=3", "unexpected argument 'lr=3'; settings are --config.key=value"),
        (f"{COMMAND} --config.lrr=3", "unknown key --config.lrr; the nearest: --config.lr"),
        (f"{COMMAND} --config.lr=x", "--config.lr=x is not a float"),
        ("--config=configs/tyny.py --workdir=w", "there is no such file; the nearest: configs/ti"),
        ("--config=configs/tiny.py:batchsize=2 --workdir=w", "no argument 'batchsize'; .* batch_s"),
        (f"{COMMAND} --num_processes 2", "each needs --coordinator_address"),
        (f"{COMMAND} --num_processes two", "argument --num_processes: invalid int value: 'two'"),
        (f"{COMMAND} --distributed maybe", "invalid choice: 'maybe'"),
        ("--eval_only --workdir=none", "none holds no run: there is no config.json in it"),
    ],
)
def test_mistakes_are_one_line_with_exit_code_2_before_any_work(called, capsys, command, told):
    assert run(command) == program.MISTAKE
    shown = capsys.readouterr()
    assert re.match("error: .*" + told, shown.err) and shown.err.count("\n") == 1
    assert shown.out == "" and called == []
    assert not pathlib.Path("w").exists()


def test_a_workdir_with_another_run_is_refused_before_any_work(called, capsys):
    stored.save(complete.load("configs/tiny.py"), "w")
    for flag in ("", " --eval_only"):
        assert run(COMMAND + flag) == program.MISTAKE
        assert "config.input.batch_size: there 32, here 8" in capsys.readouterr().err
    assert called == []


def test_help_is_a_screen(capsys):
    assert run("--help") == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) < 45 and "--eval_only" in text and "exit codes" in text


def test_as_a_program_a_mistake_leaves_one_line_and_nothing_else(tmp_path):
    (tmp_path / "tiny.py").write_text(CONFIG)
    command = [sys.executable, str(MAIN), f"--config={tmp_path}/tiny.py", "--workdir=w"]
    command += ["--config.input.bach_size=3"]
    done = processes.run(command, cwd=tmp_path, code=program.MISTAKE)
    assert done.stdout == "" and done.stderr == (
        "error: unknown key --config.input.bach_size; the nearest: --config.input.batch_size\n"
    )
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] in ([], ["__pycache__"])


TINY = """\
from ml_collections import ConfigDict


def get_config():
    tower = {"width": 16, "depth": 1, "mlp_dim": 16, "num_heads": 1}
    return ConfigDict({
        "total": "2 steps",
        "mesh": {"cpu_devices": 2},
        "model": {"img": {"variant": "mu/16", **tower}, "txt": {"variant": "mu", **tower}},
        "input": {"batch_size": 4, "res": 32, "source": {"name": "scenes", "size": 8}},
        "evals": {"loss": {
            "type": "loss", "batch_size": 4, "source": {"name": "scenes", "split": "val", "size": 4}
        }},
    })
"""


@pytest.mark.slow
def test_as_a_program_it_trains_on_emulated_devices_and_evaluates_again(tmp_path):
    (tmp_path / "tiny.py").write_text(TINY)
    python = [sys.executable, str(MAIN), "--workdir=w"]
    for flag in (f"--config={tmp_path}/tiny.py", "--eval_only"):
        processes.run([*python, flag], cwd=tmp_path, code=program.DONE)
        results = json.loads((tmp_path / "w/results.json").read_text())
        assert results["loss"]["loss"]["value"] > 0
        (tmp_path / "w/results.json").unlink()
    assert stored.read(tmp_path / "w").mesh.cpu_devices == 2


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_the_first_step_is_exit_code_85(tmp_path, signum):
    (tmp_path / "tiny.py").write_text(TINY)
    command = [sys.executable, str(MAIN), f"--config={tmp_path}/tiny.py", "--workdir=w"]
    with processes.started(command, cwd=tmp_path) as process:
        processes.read_until(process, "distributed: no")
        process.send_signal(signum)
        err = processes.end(process, program.INTERRUPTED).stderr
    assert "run the same command again to go on" in err


def test_a_device_without_memory_is_one_line_that_says_what_to_do(tmp_path, capsys, monkeypatch):
    def train(config, workdir):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Out of memory allocating 43152120400 bytes."
        )

    monkeypatch.setattr(trainers, "train", train)
    flags = [f"--config={MAIN.parent / 'configs' / 'quickstart.py'}", f"--workdir={tmp_path / 'w'}"]
    assert program.main([*flags, "--config.mesh.cpu_devices=0"]) == program.FAILED
    err = capsys.readouterr().err
    assert "(a buffer of 40.2 GiB)" in err and "--config.input.microbatch=8 " in err
    assert "--config.model.remat=full or" in err
    assert err.startswith("error: ") and err.count("\n") == 1

    def broken(config, workdir):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(trainers, "train", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        program.main([*flags, "--config.mesh.cpu_devices=0"])
