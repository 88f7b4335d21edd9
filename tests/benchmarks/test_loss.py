"""The loss benchmark: that it compares equals with equals, and counts right."""

import importlib.util
import json
import math
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest

from base.errors import UserError
from benchmarks import loss as command
from benchmarks import loss_case, loss_curve, loss_jax, loss_report, loss_systems
from benchmarks.loss_case import LossCase
from benchmarks.loss_worker import Failed
from siglip.losses import definitions

NO_PEERS = {"versions": {}, "gpus": 0, "open_clip_chunks": False}


@pytest.fixture
def peer_python() -> str:
    python = os.environ.get("SIGLIP_PEER_PYTHON")
    if not python and importlib.util.find_spec("torch") is None:
        pytest.skip("no PyTorch here, and SIGLIP_PEER_PYTHON names no interpreter that has it")
    return python or sys.executable


def started(name: str, case: LossCase, folder, python: str = sys.executable):
    """A worker of that system, on inputs with a reference."""
    loss_case.write_inputs(case, folder)
    assert loss_case.write_reference(case, folder, limit_s=60) == ""
    return loss_systems.choose(name, "cpu")[0].start(case, "cpu", str(folder), python)


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("form", loss_jax.FORMS)
def test_every_jax_form_equals_the_definition_with_all_gradients(form, devices):
    shapes = loss_jax.Shapes(16, 32, "float32")
    x, y = (jax.random.normal(jax.random.key(k), (16, 32)) for k in range(2))
    args = (jax.nn.standardize(x) / 6, y / 6, jnp.float32(9), jnp.float32(-5))
    want, want_grads = jax.value_and_grad(definitions.sigmoid_loss, argnums=(0, 1, 2, 3))(*args)
    program = loss_jax.compile_loss(loss_jax.make_mesh(devices), shapes, form)
    got, grads = program(*jax.device_put(args, tuple(loss_jax.shardings(program))))
    np.testing.assert_allclose(got, want, rtol=1e-6)
    for g, w in zip(grads, want_grads):
        np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-6)


def test_matmuls_are_the_three_of_the_loss():
    x, y = (jax.random.normal(jax.random.key(k), (8, 4)) for k in range(2))
    program = loss_jax.compile_matmuls(loss_jax.make_mesh(2), loss_jax.Shapes(8, 4, "float32"))
    dx, dy = program(*jax.device_put((x, y), tuple(loss_jax.shardings(program))))
    np.testing.assert_allclose(dx, x @ y.T @ y, rtol=1e-5)
    np.testing.assert_allclose(dy[:8], (x[:4] @ y.T).T @ x[:4], rtol=1e-5)  # the first device's
    assert program.as_text().count(" dot(") == 3


def test_inputs_are_a_trained_state_and_the_reference_is_the_definition_in_float64(tmp_path):
    case = LossCase(2, 300, 64)  # more than two blocks of rows
    loss_case.write_inputs(case, tmp_path)
    zimg, ztxt = (loss_case.read_rows(tmp_path, name) for name in ("zimg", "ztxt"))
    np.testing.assert_allclose(np.linalg.norm(zimg, axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(np.sum(zimg * ztxt, axis=1), 0.13, rtol=1e-4)
    assert loss_case.write_reference(case, tmp_path, limit_s=60) == ""
    with jax.enable_x64(True):
        args = [jnp.asarray(z, jnp.float64) for z in (zimg, ztxt, loss_case.T, loss_case.B)]
        loss, grads = jax.value_and_grad(definitions.sigmoid_loss, argnums=(0, 1, 2, 3))(*args)
        for name, want in zip((*loss_case.GRADIENTS, "loss"), (*grads, loss)):
            part = loss_case.squares(tmp_path, name, np.asarray(want))
            assert loss_case.relative_error([part]) < 1e-12, name


def test_too_large_a_reference_is_left_out_with_a_reason(tmp_path):
    loss_case.write_inputs(LossCase(1, 2, 4), tmp_path)
    assert "would take about" in loss_case.write_reference(LossCase(1, 2, 4), tmp_path, limit_s=0)
    assert "out of reach" in loss_case.write_reference(LossCase(1, 2**20, 4), tmp_path, limit_s=60)
    assert not loss_case.has_reference(tmp_path)


def test_rounding_to_bfloat16_is_that_of_jax():
    x = np.random.default_rng(0).normal(size=10_000).astype(np.float32)
    want = np.asarray(jnp.asarray(x).astype(jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_array_equal(loss_case.round_to(x, "bfloat16"), want)


def test_relative_error_puts_the_rows_of_all_devices_together(tmp_path):
    np.save(tmp_path / "reference_zimg.npy", np.array([[3.0, 0.0], [0.0, 4.0]]))
    parts = [
        loss_case.squares(tmp_path, "zimg", row[None], start)
        for start, row in enumerate(np.array([[3.0, 0.3], [0.0, 4.4]]))
    ]
    assert loss_case.relative_error(parts) == pytest.approx(0.5 / 5)


def test_a_worker_measures_this_projects_ring(tmp_path):
    worker = started("ours-ring", LossCase(2, 16, 8), tmp_path)
    try:
        ready = worker.prepare()
        assert all(error < 1e-5 for error in ready["errors"].values())
        assert set(ready["errors"]) == {"zimg", "ztxt", "t", "b", "loss"}
        assert ready["memory_bytes"] > 0
        assert len(worker.measure(3)) == 3
        with pytest.raises(Failed, match="ValueError: invalid literal"):
            worker.measure("many")
    finally:
        worker.close()


def test_a_worker_that_cannot_start_says_why_in_one_line(tmp_path):
    system = loss_systems.LossSystem("none", "", "jax", {"form": "nonsense"})
    worker = system.start(LossCase(1, 4, 4), "cpu", str(tmp_path), sys.executable)
    try:
        with pytest.raises(Failed, match="KeyError: 'nonsense'"):
            worker.prepare()
    finally:
        worker.close()


def test_open_clips_loss_equals_ours(tmp_path, peer_python):
    peers = loss_systems.probe_peers(peer_python)
    system, case = loss_systems.choose("open_clip-bidir", "cpu")[0], LossCase(3, 16, 8)
    if reason := loss_systems.why_not(system, case, "cpu", peers):
        pytest.skip(reason)
    worker = started(system.name, case, tmp_path, peer_python)
    try:
        ready = worker.prepare()
        assert all(error < 1e-5 for error in ready["errors"].values()), ready["errors"]
        assert ready["memory_bytes"] > 3 * 4 * 16 * 16  # the logits of three blocks at least
        assert len(worker.measure(2)) == 2
    finally:
        worker.close()


def test_the_byte_count_of_pytorch_is_the_most_that_lived_at_once(peer_python):
    code = """if True:
        import torch
        from benchmarks.loss_torch_memory import PeakBytes
        known = torch.zeros(50)
        with PeakBytes(known) as count:
            a = torch.zeros(100)
            view = a[:50]
            b = view + known.mul_(1)
            del a
            c = b.double()
            del view, c
        print(count.peak, count.live)
    """
    out = processes.run([peer_python, "-c", code], cwd=command.ROOT)
    assert out.stdout.split() == ["1000", "200"], out.stderr  # a, b and c, in float32 and float64


class FakeWorker:
    def __init__(self, name, log, seconds):
        self.name, self.log, self.seconds = name, log, seconds

    def measure(self, repeats):
        self.log.append((self.name, repeats))
        if self.seconds is None:
            raise Failed("out of memory")
        return [self.seconds] * repeats

    def close(self):
        self.log.append((self.name, "closed"))


def test_rounds_alternate_and_a_system_that_fails_is_out(capsys, tmp_path):
    bench, log = command.LossBench(LossCase(1, 2, 4), "cpu", tmp_path, "case"), []
    for name, seconds in (("ours-ring", 1.0), ("a", 2.0), ("b", None)):
        bench.records.append({"name": name, "what": "", "seconds": [], "memory_bytes": 8})
        bench.workers[name] = FakeWorker(name, log, seconds)
    bench.measure(repeats=5, rounds=2)
    assert log == [
        ("ours-ring", 3), ("a", 3), ("b", 3), ("b", "closed"), ("a", 2), ("ours-ring", 2),
    ]  # fmt: skip
    ours, a, b = bench.record(rounds=2)["systems"]
    assert len(ours["seconds"]) == 5
    assert a["time_ratio"] == 2 and a["memory_ratio"] == 1
    assert b["left_out"] == "failed: out of memory" and "seconds" not in b
    assert "round 2/2, a: 2000 2000 ms; 0:00:0" in capsys.readouterr().out


def systems() -> list[dict]:
    errors = dict.fromkeys(("zimg", "ztxt", "t", "b", "loss"), 1e-7)
    return loss_report.with_statistics(
        [
            {"name": "naive", "what": "w", "seconds": [0.4, 0.2, 0.3], "memory_bytes": 3 * 2**20,
             "errors": errors},
            {"name": "ours-ring", "what": "v", "seconds": [0.1], "memory_bytes": 2**20,
             "errors": None},
            {"name": "peer", "what": "u", "left_out": "it is not installed"},
        ]
    )  # fmt: skip


def test_statistics_and_table():
    assert loss_report.quartiles([4.0, 1.0, 3.0, 2.0, 5.0]) == (2.0, 3.0, 4.0)
    head, naive, ours = loss_report.table(systems())
    assert head[:6] == ["system", "median ms", "quartiles", "x ours", "memory MiB", "x ours"]
    assert naive == ["naive", "300", "250 - 350", "3.00", "3", "3.00", *["1.0e-07"] * 4]
    assert ours == ["ours-ring", "100", "100 - 100", "1.00", "1", "1.00", *["-"] * 4]
    assert loss_report.left_out(systems()) == ["peer: it is not installed"]
    lines = loss_report.aligned([["a", "b"], ["long", "1"]]).splitlines()
    assert lines == ["a     b", "-------", "long  1"]


def test_the_page_and_the_json_hold_the_same_table(tmp_path):
    case = {
        "devices": 2, "n": 4, "d": 8, "dtype": "float32", "platform": "cpu", "rounds": 1,
        "no_reference": "it takes hours", "systems": systems(),
    }  # fmt: skip
    here = {"cores": 2, "cpu": "x", "memory_gib": 1, "accelerator": None, "python": "3"}
    result = {
        "command": "python -m benchmarks.loss",
        "machine": here | {"versions": {"jax": "0"}, "date": "2026-11-21T00:00"},
        "peers": NO_PEERS,
        "cases": [case],
    }
    file, page = loss_report.write(result, tmp_path / "new" / "loss.json")
    assert json.loads(file.read_text()) == result
    text = page.read_text()
    assert loss_report.as_markdown(loss_report.table(case["systems"])) in text
    assert "2 CPU devices, 4 pairs each (N = 8), d = 8, float32" in text
    assert "No errors: it takes hours." in text and "peer: it is not installed" in text


def test_a_missing_peer_is_named_with_a_reason():
    reasons = {
        (system.name, platform): loss_systems.why_not(system, LossCase(2, 4, 4), platform, NO_PEERS)
        for system in loss_systems.every()
        for platform in ("cpu", "gpu")
    }
    assert "open_clip_torch" not in reasons["open_clip-bidir", "cpu"]  # torch comes first
    assert reasons["open_clip-bidir", "cpu"].startswith("torch is not installed")
    assert reasons["siglip-kernel", "cpu"] == "siglip-kernel needs an NVIDIA GPU, none is here"
    assert reasons["inf-cl", "gpu"].startswith("torch is not installed")
    assert reasons["ours-ring", "cpu"] == reasons["naive-gather", "gpu"] == ""
    here = {"versions": {"torch": "2", "open_clip": "3.3.0"}, "gpus": 1, "open_clip_chunks": False}
    chunked, kernel, gather = (
        loss_systems.choose(name, "gpu")[0]
        for name in ("open_clip-chunked", "siglip-kernel", "naive-gather")
    )
    assert "has no chunk_size" in loss_systems.why_not(chunked, LossCase(1, 4, 4), "gpu", here)
    assert "1 GPUs, 2 are needed" in loss_systems.why_not(chunked, LossCase(2, 4, 4), "gpu", here)
    assert "siglip-kernel is not" in loss_systems.why_not(kernel, LossCase(1, 4, 4), "gpu", here)
    assert "same as another" in loss_systems.why_not(gather, LossCase(1, 4, 4), "gpu", here)


def test_systems_are_chosen_by_name_or_by_its_beginning():
    chosen = loss_systems.choose("open_clip,ours-ring", "cpu")
    assert chosen[0].name == "ours-ring" and len(chosen) > 4
    assert {s.name.partition("-")[0] for s in chosen[1:]} == {"open_clip"}
    with pytest.raises(UserError, match="no system 'openclip'; there are ours-ring, "):
        loss_systems.choose("openclip", "cpu")


def test_cases_are_read():
    assert loss_case.parse("4x1024x512", "bfloat16") == LossCase(4, 1024, 512, "bfloat16")
    assert str(LossCase(4, 1024, 512)) == "4x1024x512" and LossCase(4, 1024, 512).pairs == 4096


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--cases", "4x10"], "error: --cases: '4x10' is not DEVICESxPAIRSxWIDTH"),
        (["--systems", "x"], "error: --systems: no system 'x'"),
        (["--repeat", "0"], "error: --repeat and --rounds are at least 1"),
        (["--million"], "error: --million needs an accelerator"),
        (["--peer_python", "/nowhere/python"], "error: --peer_python /nowhere/python does not run"),
    ],
)
def test_a_mistake_is_one_line(argv, said, capsys):
    assert command.main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith(said) and err.count("\n") == 1


def test_results_quote_the_command_without_this_machines_paths():
    argv = ["--peer_python", "/a b/python", "--out=/x/y.json", "--cases", "1x2x3"]
    want = "python -m benchmarks.loss --peer_python ... --out=... --cases 1x2x3"
    assert command.shown(argv) == want


def test_the_curve_says_what_its_numbers_show(tmp_path):
    lines = loss_curve.jax_lines((4, 8), n=256, d=32)
    text = loss_curve.title(lines)
    assert text.startswith("On 4 devices or on 8 the ring needs ")
    name = next(iter(lines))
    grown = lines | {name: {count: size * count for count, size in lines[name].items()}}
    assert loss_curve.title(grown) == "Memory of the loss on each device"
    loss_curve.draw(lines | {loss_curve.PEER_LINE: {4: 2**20}}, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 10_000
    assert all(math.isfinite(size) for line in lines.values() for size in line.values())
