"""Whole runs: the same whatever stopped them, and what a person and a program find afterwards."""

import hashlib
import json
import os
import re
import shutil
import signal

import jax
import numpy as np
import processes
import pytest
import tiny_run
from PIL import Image
from tiny_run import BATCH, EXAMPLES, STEPS, Tiny, assert_same_state, events, saved, steps_with

import main as program
from base.errors import UserError
from evaluators import retrieval
from input_pipeline import loader
from input_pipeline.sources.files import Files
from siglip import sharding
from siglip.leaf_names import leaves
from trainers import loop
from trainers.config import stored
from trainers.machine.preemption import Interrupted

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return Tiny(tmp_path_factory.mktemp("tiny"))


class Recorded:
    """Batches that remember what was taken from them; before step `at` something happens."""

    def __init__(self, batches, start_step: int, taken: list, at: int | None, happens):
        self._batches, self.close = batches, batches.close
        self._step, self._taken, self._at, self._happens = start_step, taken, at, happens

    def __next__(self):
        batch = next(self._batches)
        self._step += 1
        digest = hashlib.sha256(b"".join(batch[k].tobytes() for k in sorted(batch))).hexdigest()
        self._taken.append((self._step, batch["position"].tolist(), digest))
        if self._step == self._at:
            self._happens()
        return batch


@pytest.fixture(scope="module")
def recording():
    """recording(at, happens) -> a context in which batches are recorded into the list it gives."""
    train_batches = loader.train_batches

    class Recording:
        def __init__(self, at=None, happens=None):
            self.at, self.happens, self.taken = at, happens, []

        def __enter__(self):
            def recorded(*args, start_step, **options):
                batches = train_batches(*args, start_step=start_step, **options)
                return Recorded(batches, start_step, self.taken, self.at, self.happens)

            loader.train_batches = recorded
            return self.taken

        def __exit__(self, *unused):
            loader.train_batches = train_batches

    return Recording


@pytest.fixture(scope="module")
def whole(tiny, recording):
    """A run that nothing has stopped."""
    workdir = tiny.folder / "whole"
    with recording() as taken:
        out = tiny.train(workdir)
    return type("Whole", (), {"workdir": workdir, "out": out, "taken": taken})


def stop(signum):
    return lambda: os.kill(os.getpid(), signum)


# Going on


def test_a_run_that_was_stopped_four_times_is_the_one_that_was_not(
    tiny, whole, recording, tmp_path, monkeypatch
):
    workdir, taken = tmp_path / "w", []

    def life(at=None, happens=None):
        with recording(at, happens) as batches:
            try:
                return tiny.train(workdir)
            except Interrupted as interrupted:
                return str(interrupted)
            finally:
                taken.extend(batches)

    # 1. In the middle of an epoch, where an evaluation is due, which is not waited for.
    told = life(6, stop(signal.SIGTERM))
    assert told == f"stopped at step 6 of 12, saved in {workdir.absolute()}/checkpoints/6"
    assert (
        steps_with(workdir, "retrieval/t2i_R@1") == [] and not (workdir / "results.json").exists()
    )
    # 2. While the next life makes up for that evaluation.
    with monkeypatch.context() as patch:
        patch.setattr(retrieval.Evaluator, "run", lambda self, params: stop(signal.SIGINT)())
        assert life().startswith("stopped at step 6 of 12, ")
    # 3. Where an epoch ends with a batch. 4. At the last step, before the evaluations.
    assert 9 * BATCH % EXAMPLES == 0
    assert life(9, stop(signal.SIGINT)).startswith("stopped at step 9 of 12, ")
    assert life(12, stop(signal.SIGTERM)).startswith("stopped at step 12 of 12, ")
    assert "is trained already" in life()

    assert taken == whole.taken
    assert [positions[0] for _, positions, _ in taken] == list(range(0, STEPS * BATCH, BATCH))
    assert len({digest for _, _, digest in taken}) == STEPS
    assert_same_state(saved(workdir), saved(whole.workdir))
    assert tiny_run.deterministic(workdir) == tiny_run.deterministic(whole.workdir)
    assert tiny_run.results(workdir) == tiny_run.results(whole.workdir)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # as it was


# main.py, which gets a signal in the middle of a step.
SIGNALLED = """
import os, runpy, sys

at, signum, main = int(sys.argv.pop(1)), int(sys.argv.pop(1)), sys.argv.pop(1)
sys.path[0] = os.path.dirname(main)
from input_pipeline import loader

train_batches = loader.train_batches

def signalled(*args, start_step, **options):
    batches = train_batches(*args, start_step=start_step, **options)
    for step, batch in enumerate(batches, start_step + 1):
        if step == at:
            os.kill(os.getpid(), signum)
        yield batch

loader.train_batches = signalled
runpy.run_path(main, run_name="__main__")
"""


def test_as_a_program_signals_and_a_kill_lose_nothing(tiny, tmp_path):
    flags = (
        "--config.total=120 steps",
        "--config.checkpoint.every=30 steps",
        "--config.evals.val.every=50 steps",
        "--config.optimizer.name=adamw",
        "--config.mesh.cpu_devices=2",
    )
    tiny.ended(tiny.command(tmp_path / "whole", *flags))

    workdir = tmp_path / "w"
    command = tiny.command(workdir, *flags)
    for at, signum, code in (
        (7, signal.SIGTERM, program.INTERRUPTED),
        (36, signal.SIGINT, program.INTERRUPTED),
        (75, signal.SIGKILL, -signal.SIGKILL),
    ):
        python, *words = command
        signalled = [python, "-c", SIGNALLED, str(at), str(int(signum)), *words]
        with tiny.started(signalled) as process:
            err = processes.end(process, code).stderr
        if code == program.INTERRUPTED:
            told = re.search(r"stopped at step (\d+) of 120, saved in (\S+/checkpoints/\1); ", err)
            assert at <= int(told[1]) <= at + 1 and os.path.isdir(told[2])
            assert err.endswith("; run the same command again to go on\n")
            assert max(tiny_run.on_disk(workdir)) == int(told[1])
    # The kill has cost what no checkpoint held; that of step 60 may have been half written.
    last = max(tiny_run.on_disk(workdir))
    assert max(steps_with(workdir, "loss")) >= 70 > last
    assert f"going on from step {last} " in tiny.ended(command)

    assert steps_with(workdir, "loss") == list(range(1, 121))
    assert tiny_run.deterministic(workdir) == tiny_run.deterministic(tmp_path / "whole")
    assert_same_state(saved(workdir, 120), saved(tmp_path / "whole", 120))
    assert tiny_run.results(workdir) == tiny_run.results(tmp_path / "whole")


def test_resume_goes_on_in_another_workdir(tiny, whole, recording, tmp_path):
    workdir = tmp_path / "w"
    with recording() as taken:
        out = tiny.train(workdir, resume=whole.workdir / "checkpoints" / "8")
    assert "going on from" in out and "checkpoints/8" in out
    assert taken == whole.taken[8:]
    assert_same_state(saved(workdir), saved(whole.workdir))
    assert steps_with(workdir, "loss") == [9, 10, 11, 12]
    assert tiny_run.results(workdir) == tiny_run.results(whole.workdir)


@pytest.fixture
def begin(tiny, monkeypatch):
    """begin(workdir, **overrides) -> (step, state) that training would begin with."""

    class Enough(Exception):
        pass

    def updates(run, update, state, batches, missed):
        raise Enough(run.first_step, jax.device_get(state))

    def begin(workdir, **overrides):
        monkeypatch.setattr(loop, "make_updates", updates)
        with pytest.raises(Enough) as enough:
            tiny.train(workdir, evals="", **overrides)
        return enough.value.args

    return begin


def test_which_checkpoint_wins(begin, whole, tmp_path):
    older, last = (whole.workdir / "checkpoints" / step for step in ("8", "12"))

    def check(state, step):
        there = saved(whole.workdir, step)
        for name, x in leaves(state.params).items():
            assert x.tobytes() == there[f"params/{name}"].tobytes()

    first, state = begin(tmp_path / "init", init=last)  # weights only
    assert (first, state.step) == (0, 0)
    check(state, 12)
    assert all(np.all(x == 0) for x in jax.tree.leaves(state.opt_state))

    first, state = begin(tmp_path / "resume", init=last, resume=older)
    assert (first, state.step) == (8, 8)
    check(state, 8)

    workdir = tmp_path / "w"
    shutil.copytree(whole.workdir / "checkpoints" / "4", workdir / "checkpoints" / "4")
    first, state = begin(workdir, init=last, resume=older)
    assert (first, state.step) == (4, 4)
    check(state, 4)


def test_a_checkpoint_that_does_not_fit_is_refused_and_binds_nothing(tiny, whole, tmp_path):
    def told(pattern, **overrides):
        with pytest.raises(UserError, match=pattern) as error:
            tiny.train(tmp_path / "w", evals="", **overrides)
        assert "\n" not in str(error.value)
        assert not (tmp_path / "w" / "config.json").exists()

    told(
        r"config.init: \S+/8 \(img=.*\) does not fit the model: arrays 36 of another shape: "
        r"img/MAPHead_0/LayerNorm_0/bias is \[16\] there, \[8\] in the model, ",
        init=whole.workdir / "checkpoints" / "8",
        model__img__width=8,
    )
    told("examples is 192 there, 96 here", resume=whole.workdir, input__batch_size=8)
    told("is at step 12, beyond the 8 steps", resume=whole.workdir, total="8 steps")
    told("no such directory; give a workdir", resume=tmp_path / "nothing")


def test_a_finished_run_does_not_train_again(tiny, whole, recording, tmp_path):
    workdir = tmp_path / "w"
    shutil.copytree(whole.workdir, workdir)
    (workdir / "results.json").unlink()
    with recording() as taken:
        out = tiny.train(workdir)
    assert taken == [] and "is trained already" in out
    assert tiny_run.results(workdir) == tiny_run.results(whole.workdir)
    assert (workdir / "metrics.jsonl").read_bytes() == (
        whole.workdir / "metrics.jsonl"
    ).read_bytes()


def test_an_evaluation_of_nothing_is_refused_and_keeps_the_results(tiny, whole, tmp_path, capsys):
    workdir = tmp_path / "w"
    shutil.copytree(whole.workdir, workdir)
    before = (workdir / "results.json").read_text()
    drop = [f"--config.evals.{name}=None" for name in json.loads(before)]
    assert program.main(["--eval_only", f"--workdir={workdir}", *drop]) == program.MISTAKE
    assert "config.evals names no evaluator" in capsys.readouterr().err
    assert (workdir / "results.json").read_text() == before


def test_eval_only_gives_the_results_of_the_end(tiny, whole, tmp_path, capsys):
    workdir = tmp_path / "w"
    shutil.copytree(whole.workdir, workdir)
    (workdir / "results.json").unlink()
    assert program.main(["--eval_only", f"--workdir={workdir}"]) == program.DONE
    assert (workdir / "results.json").read_bytes() == (whole.workdir / "results.json").read_bytes()
    assert capsys.readouterr().out.endswith(
        table(whole.out).replace(str(whole.workdir), str(workdir))
    )


def table(out: str) -> str:
    return out[out.index("evaluator  metric") :]


# What can go wrong


def test_a_run_that_diverges_names_its_last_good_checkpoint(tiny, tmp_path, capsys):
    flags = ("--config.lr=1e30", "--config.checkpoint.every=1 steps", "--config.log_every=3")
    assert tiny.main(tmp_path / "w", *flags) == program.DIVERGED
    err = capsys.readouterr().err
    good = max(tiny_run.on_disk(tmp_path / "w"))
    bad = int(re.match(r"diverged: loss or gradient was not finite at step (\d+), ", err)[1])
    assert good == bad - 1 >= 1
    assert f"the last good checkpoint is {tmp_path}/w/checkpoints/{good}; " in err
    assert err.count("\n") == 1
    assert all(
        np.isfinite(x.astype(np.float32)).all() for x in saved(tmp_path / "w", good).values()
    )


def test_a_run_that_diverges_before_any_checkpoint_says_so(tiny, tmp_path, capsys):
    flags = ("--config.lr=1e30", "--config.checkpoint.every=", "--config.log_every=3")
    assert tiny.main(tmp_path / "w", *flags) == program.DIVERGED
    assert "there is no checkpoint yet; try a lower lr" in capsys.readouterr().err


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """pairs(bad) -> flags for 32 pictures, `bad` of which are none."""

    def pairs(bad):
        folder = tmp_path_factory.mktemp("pairs")
        rows = []
        for i in range(32):
            if i < bad:
                (folder / f"{i}.png").write_bytes(b"no picture")
            else:
                Image.new("RGB", (16, 16), (8 * i, 0, 0)).save(folder / f"{i}.png")
            rows.append(json.dumps({"image": f"{i}.png", "caption": f"number {i}"}))
        (folder / "pairs.jsonl").write_text("\n".join(rows))
        source = f"--config.input.source.path={folder}/pairs.jsonl"
        return "--config.input.source.name=files", source, "--config.input.source.split="

    return pairs


def test_bad_images_are_counted_and_the_run_goes_on(tiny, pairs, recording, tmp_path):
    workdir = tmp_path / "w"
    flags = ("--config.input.max_bad_fraction=0.1", "--config.total=6 epochs")
    assert tiny.main(workdir, *pairs(1), *flags) == program.DONE
    counts = [event["bad_examples"] for event in events(workdir) if "loss" in event]
    assert len(counts) == STEPS and counts[1::2] == [1, 2, 3, 4, 5, 6]  # two batches an epoch
    kinds = [event.get("bad/unknown image format", 0) for event in events(workdir)]
    assert max(kinds) == 6
    # What an earlier life counted stays counted.
    other = tmp_path / "stopped"
    with recording(7, stop(signal.SIGTERM)):
        assert tiny.main(other, *pairs(1), *flags) == program.INTERRUPTED
    assert tiny.main(other, *pairs(1), *flags) == program.DONE
    assert [e["bad_examples"] for e in events(other) if "loss" in e] == counts


@pytest.mark.parametrize(
    ("bad", "log_every", "allowed", "told"),
    [
        (8, 2, 0.1, "error: 8 of 32 examples could not be used by step 2"),
        (1, 2, 0, "error: 1 of 32 examples could not be used by step 2"),
        (20, 50, 0.5, "error: 120 of 192 examples could not be used by step 12"),
        (32, 50, 0.5, "error: none of 32 examples from all over the source can be used"),
    ],
)
def test_too_many_bad_images_stop_the_run(
    tiny, pairs, tmp_path, capsys, bad, log_every, allowed, told
):
    flags = (f"--config.input.max_bad_fraction={allowed}", f"--config.log_every={log_every}")
    every = "--config.checkpoint.every="
    assert tiny.main(tmp_path / "w", *pairs(bad), *flags, every) == program.MISTAKE
    err = capsys.readouterr().err
    assert err.startswith(told) and err.count("\n") == 1
    named = re.findall(r"(\d+)\.png", err)
    assert named and all(int(i) < bad for i in named)


def test_a_disk_that_goes_late_stops_the_run_soon(tiny, pairs, tmp_path, capsys, monkeypatch):
    """The share of all examples would be above 60 % after 30 batches only."""
    read, reads = Files.__getitem__, []

    def gone(self, i):
        reads.append(i)
        example = read(self, i)
        return example if len(reads) < 20 * BATCH else {**example, "image": b""}

    monkeypatch.setattr(Files, "__getitem__", gone)
    flags = ("--config.total=100 steps", "--config.input.max_bad_fraction=0.6")
    every = "--config.checkpoint.every="
    assert tiny.main(tmp_path / "w", *pairs(0), *flags, every) == program.MISTAKE
    told = re.match(
        r"error: (\d+) of the last 256 examples .* by step (\d+)", capsys.readouterr().err
    )
    assert told and int(told[1]) > 153 and int(told[2]) == 32


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (
            ["--config.input.batch_size=12"],
            "batch_size=12 does not divide over 8 devices; .* is 16",
        ),
        (["--config.mesh.data=3"], "config.mesh: mesh data=3 x fsdp=1 does not fit 8 devices"),
        (["--config.model.img.variant=XS/16"], "config.model: .*XS"),
        (["--config.input.res=3"], r"config.model: images of \(3, 3, 3\) hold no patch of 4 x 4"),
        (["--config.model.txt.vocab_size=7"], "vocab_size is 7, but the tokenizer has"),
        (["--config.frozen=(('.*', True),)"], "every parameter is frozen"),
        (["--config.log_every=0"], "config.log_every=0 must be at least 1"),
        (["--config.total=0 steps"], "config.total='0 steps' is no step"),
        (["--config.evals.val.batch_size=9"], "9 does not divide over 8 devices"),
        (
            ["--config.evals.val.source.name=files", "--config.evals.val.source.path=none.jsonl"],
            "none.jsonl",
        ),
    ],
)
def test_what_does_not_fit_is_one_line_before_any_training(tiny, tmp_path, capsys, flags, told):
    assert tiny.main(tmp_path / "w", *flags, evals="val") == program.MISTAKE
    err = capsys.readouterr().err
    assert re.match(f"error: .*{told}", err) and err.count("\n") == 1
    assert not (tmp_path / "w").exists()


def test_a_workdir_of_another_configuration_is_left_alone(tiny, whole, capsys):
    before = (whole.workdir / "config.json").read_bytes()
    assert tiny.main(whole.workdir, "--config.lr=0.5", evals="val+retrieval+zeroshot") == 2
    assert "holds a run of another configuration: config.lr: there 0.001, here 0.5 (" in (
        capsys.readouterr().err
    )
    assert (whole.workdir / "config.json").read_bytes() == before


# What it leaves behind


def test_metrics_of_every_step(whole):
    trained = [event for event in events(whole.workdir) if "loss" in event]
    assert [event["step"] for event in trained] == list(range(1, STEPS + 1))
    for event in trained:
        assert event["t"] > 1 and event["b"] < 0
        for kind in ("pos", "neg"):
            assert event[f"{kind}_logit_mean"] <= event[f"{kind}_logit_max"]
        for norm in ("grad_norm", "update_norm", "param_norm"):
            assert event[norm] > 0
        assert event["bad_examples"] == 0 and event["process_memory_gb"] > 0
        assert event["epoch"] == event["step"] * BATCH / EXAMPLES
        assert 0 < event["lr"] < 1.001e-3
    for event in trained[1:]:  # the first step compiles: it says nothing of speed
        assert event["examples_per_s"] == pytest.approx(8 * event["examples_per_s_per_device"])
        assert 0 <= event["data_wait"] <= 1 and event["eta_s"] >= 0
    assert trained[-1]["loss"] < trained[0]["loss"]


def test_evaluators_run_at_their_intervals_and_at_the_end(whole):
    assert steps_with(whole.workdir, "val/loss") == [5, 10, 12]
    assert steps_with(whole.workdir, "retrieval/t2i_R@1") == [6, 12]
    assert steps_with(whole.workdir, "zeroshot/top1") == [12]


def test_results_and_the_table_say_the_same(whole):
    results = tiny_run.results(whole.workdir)
    assert list(results) == ["retrieval", "val", "zeroshot"]
    assert results["retrieval"]["t2i_R@5"]["chance"] == 5 / 12
    assert results["zeroshot"]["top1"]["chance"] == 1 / 48
    last = {k: v for e in events(whole.workdir) if e["step"] == STEPS for k, v in e.items()}
    lines = whole.out.splitlines()
    for evaluator, metrics in results.items():
        for metric, got in metrics.items():
            assert set(got) == {"value", "chance"}
            assert got["value"] == last[f"{evaluator}/{metric}"]
            (line,) = [line for line in lines if line.split()[:2] == [evaluator, metric]]
            value = f"{got['value']:.4f}" if metric == "loss" else f"{100 * got['value']:.2f} %"
            assert value in line
    for told in ("retrieval: 12 images, ", "val: 12 pairs", "zeroshot: 12 images, 48 classes"):
        assert sum(line.startswith(told) for line in lines) == 1
    assert lines[-1] == f"run: {whole.workdir}"


def test_files_of_a_run(tiny, whole):
    params = [x for name, x in saved(whole.workdir).items() if name.startswith("params/")]
    size = sum(x.size for x in params)
    text = (whole.workdir / "parameters.txt").read_text()
    assert "| img/MAPHead_0/probe " in text and f"Total: {size:,}" in text
    assert f"model: {size:,} parameters in {len(params)} arrays" in whole.out
    assert stored.read(whole.workdir).to_json() == tiny.load().to_json()
    (board,) = whole.workdir.glob("events.out.tfevents.*")
    for tag in (b"neg_logit_max", b"retrieval/i2t_R_10", b"img/MAPHead_0/probe"):
        assert tag in board.read_bytes()
    assert tiny_run.on_disk(whole.workdir) == [4, 8, 12]
    data = json.loads((whole.workdir / "checkpoints/8/data/metadata").read_text())
    assert isinstance(data.pop("order"), int) and data.pop("bad") == {}
    assert data == {"step": 8, "seed": 0, "examples": 128, "examples_per_epoch": 72}


def test_split_parameters_train_to_the_same_loss(tiny, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(sharding, "SMALL", 1)  # split all that can be
    out = tiny.train(tmp_path / "w", evals="", mesh__fsdp=2)
    assert "mesh data=4, fsdp=2" in out
    np.testing.assert_allclose(
        tiny_run.losses(tmp_path / "w"), tiny_run.losses(whole.workdir), rtol=1e-3
    )


def test_data_of_another_length_are_refused(tiny, whole, tmp_path, capsys):
    shutil.copytree(whole.workdir, tmp_path / "w")
    for position in (tmp_path / "w" / "checkpoints").glob("*/data/metadata"):
        position.write_text(position.read_text().replace('_per_epoch": 72', '_per_epoch": 71'))
    assert tiny.main(tmp_path / "w") == program.MISTAKE
    assert "examples_per_epoch is 71 there, 72 here" in capsys.readouterr().err
