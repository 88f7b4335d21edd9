"""metrics.jsonl and event files: what is written, what a resume forgets, who writes."""

import json
import struct

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from trainers.report.metrics import MetricsWriter


@pytest.fixture
def write(tmp_path):
    """Writes scalars of these steps in one life of the run."""

    def one(*steps, rewind=None, value=1.0):
        writer = MetricsWriter(tmp_path)
        if rewind is not None:
            writer.rewind(rewind)
        for step in steps:
            writer.write_scalars(step, {"loss": value})
        writer.close()

    return one


def lines(tmp_path):
    return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]


def steps(tmp_path):
    return [line["step"] for line in lines(tmp_path)]


def events(tmp_path):
    """All events of all files, oldest file first (format: length, crc, data, crc)."""
    found = []
    for path in sorted(tmp_path.glob("events*"), key=lambda path: path.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def tags(tmp_path):
    return [(event.step, value.tag) for event in events(tmp_path) for value in event.summary.value]


def test_one_json_object_per_event_with_its_step(tmp_path):
    writer = MetricsWriter(tmp_path / "new")
    writer.write_scalars(3, {"loss": jnp.float32(1.5), "lr": np.array([1e-3])[0], "n": 2})
    # It is there at once, not at the end.
    assert lines(tmp_path / "new") == [{"step": 3, "loss": 1.5, "lr": 1e-3, "n": 2.0}]
    writer.write_scalars(4, {"loss": 1})
    writer.close()
    writer.close()
    assert lines(tmp_path / "new")[1] == {"step": 4, "loss": 1.0}


def test_what_is_not_finite_is_still_json(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write_scalars(1, {"a": float("nan"), "b": jnp.inf, "c": -np.inf})
    writer.close()

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line == {"step": 1, "a": "nan", "b": "inf", "c": "-inf"}


def test_tensorboard_gets_scalars_texts_images_and_hparams(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write_hparams(
        {"model": {"img": {"variant": "B/16"}}, "lr": 1e-3, "frozen": ((".*", 1),)}
    )
    writer.write_scalars(5, {"loss": 2.5})
    writer.write_texts(5, {"table": "|a|"})
    writer.write_images(5, {"batch": np.zeros((2, 4, 4, 3), np.uint8)})
    writer.flush()
    assert (5, "loss") in tags(tmp_path)
    assert {tag for step, tag in tags(tmp_path) if step == 5 and tag != "loss"} >= {
        "table/text_summary"
    }
    assert any(tag.startswith("batch") for _, tag in tags(tmp_path))
    assert [tag for _, tag in tags(tmp_path)][:2] == [
        "_hparams_/experiment",
        "_hparams_/session_start_info",
    ]
    everything = b"".join(event.SerializeToString() for event in events(tmp_path))
    assert b"model.img.variant" in everything and b"B/16" in everything
    writer.close()
    assert lines(tmp_path) == [{"step": 5, "loss": 2.5}]


def test_resume_forgets_the_lines_after_its_step(tmp_path, write):
    write(0, 10, 20, 30)
    write(20, 30, 40, rewind=10, value=2.0)
    assert steps(tmp_path) == [0, 10, 20, 30, 40]
    assert [line["loss"] for line in lines(tmp_path)] == [1, 1, 2, 2, 2]
    write(0, 10, rewind=-1, value=3.0)
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(0, 3), (10, 3)]
    assert not list(tmp_path.glob("*.tmp"))


def test_without_rewind_lines_are_added(tmp_path, write):
    write(10, 20)
    write(20)
    assert steps(tmp_path) == [10, 20, 20]


def test_tensorboard_is_told_to_skip_the_forgotten_steps(tmp_path, write):
    write(10, 20, 30)
    write(20, rewind=10)
    starts = [event.step for event in events(tmp_path) if event.session_log.status]
    assert starts == [11]
    assert tags(tmp_path) == [(10, "loss"), (20, "loss"), (30, "loss"), (20, "loss")]


@pytest.mark.parametrize("torn", ['{"step": 20, "lo', '{"step": 20, "loss": 1.0}', "\x00\x00\x00"])
@pytest.mark.parametrize("rewind", [None, 10])
def test_a_line_torn_by_a_kill_is_cut(tmp_path, write, torn, rewind):
    write(10)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    write(20, rewind=rewind)
    assert steps(tmp_path) == [10, 20]


def test_a_crash_while_forgetting_leaves_the_old_file(tmp_path, write, monkeypatch):
    write(10, 20, 30)
    old = (tmp_path / "metrics.jsonl").read_bytes()

    def crash(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("trainers.report.metrics.os.replace", crash)
        with pytest.raises(KeyboardInterrupt):
            write(rewind=10)
    assert (tmp_path / "metrics.jsonl").read_bytes() == old
    write(20, rewind=10)
    assert steps(tmp_path) == [10, 20]


def test_other_processes_write_nothing(tmp_path):
    writer = MetricsWriter(tmp_path / "run", is_main=False)
    writer.rewind(0)
    writer.write_hparams({"a": 1})
    writer.write_scalars(1, {"loss": 1.0})
    writer.write_texts(1, {"a": "b"})
    writer.write_images(1, {"a": np.zeros((1, 2, 2, 3))})
    writer.flush()
    writer.close()
    assert not list(tmp_path.iterdir())
