"""The line, on streams that are a terminal and on others."""

import io

import jax
import pytest
from fake_time import Time, evaluate, make_clock, train

from trainers.report import progress
from trainers.report.progress import TrainingProgress, progress_line


@pytest.fixture
def time():
    return Time()


def test_the_line(time):
    clock = make_clock(time, total_steps=5000, evals={"a": 1000})
    train(clock, time, 1)
    memory = {"device_memory_gb": 61.23, "device_memory_limit_gb": 80.0}
    assert progress_line(clock, loss=10.0213, lr=0.0, memory=memory) == (
        "step    1/5000   0% | loss 10.0213 | lr 0.00e+00 | - ex/s (-/device) | data-wait - | "
        "device memory 61.2/80.0 GB | ETA -"
    )
    train(clock, time, 1199, wait=0.015)
    assert progress_line(clock, loss=9.87654, lr=1e-3, memory={"process_memory_gb": 1.25}) == (
        "step 1200/5000  24% | loss 9.8765 | lr 1.00e-03 | 64.0 ex/s (16.0/device) | "
        "data-wait 3% | process memory 1.2 GB | ETA >31m40s"
    )
    evaluate(clock, time, "a", 60)
    line = progress_line(clock, loss=float("nan"), lr=1e-3, memory={"process_memory_gb": 1.25})
    assert "loss nan" in line and line.endswith("ETA 35m40s")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def show(stream, time, is_main=True):
    clock = make_clock(time)
    shown = TrainingProgress(clock, is_main=is_main, stream=stream)
    for _ in range(2):
        train(clock, time, 10)
        shown.update(loss=1.0, lr=1e-3)
    shown.note("retrieval: 0.5")
    train(clock, time, 10)
    shown.update(loss=1.0, lr=1e-3)
    shown.close()
    return stream.getvalue()


def test_a_terminal_has_one_row_and_the_notes_above(time, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    text = show(Terminal(), time)
    rows = text.split("\n")
    assert len(rows) == 3 and rows[-1] == ""
    assert rows[0].split("\r")[-1] == "retrieval: 0.5"
    assert rows[1].split("\r")[-1].startswith("step  30/100")
    # A row that wraps could not be overwritten.
    assert all(len(row) < 60 for line in rows for row in line.split("\r"))


def test_elsewhere_plain_lines(time):
    lines = show(io.StringIO(), time).splitlines()
    assert [line[:12] for line in lines] == [
        "step  10/100",
        "step  20/100",
        "retrieval: 0",
        "step  30/100",
    ]
    assert not any(character in "".join(lines) for character in "\r\x1b")


def test_other_processes_print_nothing(time):
    assert show(io.StringIO(), time, is_main=False) == ""
    assert show(Terminal(), time, is_main=False) == ""


@pytest.mark.parametrize("terminals", [(True, True), (True, False), (False, True), (False, False)])
def test_the_row_goes_to_stderr_where_it_is_a_terminal(time, terminals, monkeypatch):
    err, out = (Terminal() if is_one else io.StringIO() for is_one in terminals)
    monkeypatch.setattr("sys.stderr", err)
    monkeypatch.setattr("sys.stdout", out)
    TrainingProgress(make_clock(time)).update(loss=1.0, lr=1.0)
    used, other = (err, out) if terminals[0] else (out, err)
    assert used.getvalue() and not other.getvalue()
    assert ("\r" in used.getvalue()) == any(terminals)


def test_memory_of_the_fullest_device_where_it_is_known(monkeypatch):
    class Device:
        def __init__(self, peak):
            self.peak = peak

        def memory_stats(self):
            return {"peak_bytes_in_use": self.peak, "bytes_limit": 80e9}

    monkeypatch.setattr(jax, "local_devices", lambda: [Device(2e9), Device(3e9)])
    assert progress.memory() == {"device_memory_gb": 3.0, "device_memory_limit_gb": 80.0}


def test_memory_of_the_process_elsewhere():
    (name, gb), *rest = progress.memory().items()
    assert name == "process_memory_gb" and not rest and 0.05 < gb < 100
