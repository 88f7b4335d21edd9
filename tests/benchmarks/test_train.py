"""The benchmark of training: it counts right, compares equals, and says what it left out."""

import dataclasses
import json
import os
import sys

import jax
import numpy as np
import pytest

from base.errors import UserError
from benchmarks import train, train_open_clip, train_report
from benchmarks.loss_worker import Worker
from benchmarks.train_case import MODELS, forward_flops, peak_flops, step_flops
from benchmarks.train_others import Others
from siglip.towers.two_towers import make_model

ONE_DEVICE = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}


def towers(variant: str, res: int, token_len: int = 64, batch: int = 8, **txt):
    text = variant.partition("/")[0]
    model = {"img": {"variant": variant}, "txt": {"variant": text, "vocab_size": 32_000, **txt}}
    return train.make_case(variant, model, batch, res, token_len, "float32")


def tiny(batch: int = 8):
    return dataclasses.replace(towers("mu/16", 32, token_len=8), batch=batch)


@pytest.mark.parametrize(
    "variant, res, token_len, image, text",
    [  # GFLOPs of open_clip's model_profile.csv
        ("B/16", 224, 64, 35.42, 11.02),
        ("B/16", 256, 64, 46.82, 11.02),
        ("B/16", 384, 64, 112.13, 11.02),
        ("B/16", 512, 64, 216.24, 11.02),
        ("L/16", 256, 64, 162.56, 39.06),
        ("L/16", 384, 64, 383.85, 39.06),
        ("So400m/14", 224, 16, 220.35, 13.19),
    ],
)
def test_forward_flops_are_the_published_ones(variant, res, token_len, image, text):
    found = [flops / 1e9 for flops in forward_flops(towers(variant, res, token_len))]
    np.testing.assert_allclose(found, [image, text], rtol=2e-3)


def test_forward_flops_are_those_of_the_program():
    case = tiny()
    model = make_model(**case.model)
    image = np.zeros((1, 32, 32, 3), np.float32)
    text = np.zeros((1, 8), np.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), image, text)
    jaxpr = jax.make_jaxpr(model.apply)(params, image, text)
    assert matmul_flops(jaxpr.jaxpr) == sum(forward_flops(case))


def matmul_flops(jaxpr) -> int:
    """2 per multiply-add of all dots and convolutions of a program without loops."""
    flops = 0
    for eqn in jaxpr.eqns:
        out = np.prod(eqn.outvars[0].aval.shape) if eqn.outvars else 0
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            flops += 2 * out * np.prod([eqn.invars[0].aval.shape[i] for i in contracted])
        elif eqn.primitive.name == "conv_general_dilated":
            flops += 2 * out * np.prod(eqn.invars[1].aval.shape[:-1])
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(inner, "jaxpr", inner)
            flops += matmul_flops(inner) if hasattr(inner, "eqns") else 0
    return int(flops)


def test_a_step_costs_three_forward_passes():
    case = towers("B/16", 224)
    assert step_flops(case) == 3 * 8 * sum(forward_flops(case))


def test_peaks_are_found_by_the_names_that_jax_gives():
    kinds = {
        "NVIDIA H200": 989e12,
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA H100 NVL": 835e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "TPU v4": 275e12,
        "TPU v5 lite": 197e12,
        "TPU v5e": 197e12,
        "TPU v5": 459e12,
        "TPU v5p": 459e12,
        "TPU7x": 1153e12,
        "TPU v6 lite": 918e12,
        "cpu": None,
        "NVIDIA GeForce RTX 3060": None,
    }
    assert {kind: peak_flops(kind) for kind in kinds} == kinds


@pytest.mark.parametrize("name", MODELS)
def test_built_in_models_are_cases(name):
    case = train.built_in(name, None, "bfloat16")
    assert case.model["dtype"] == "bfloat16" and case.token_len == 64
    assert train_open_clip.why_not(case) == ""
    assert json.loads(json.dumps(dataclasses.asdict(case))) == dataclasses.asdict(case)


def test_a_config_gives_towers_resolution_text_length_and_batch():
    overrides = [("input.batch_size", "16"), ("model.txt.depth", "3")]
    case = train.from_config("configs/quickstart.py", overrides, None, None)
    assert (case.name, case.batch, case.res, case.token_len) == ("quickstart", 16, 32, 48)
    assert (case.img["depth"], case.txt["depth"], case.img["patch_size"]) == (2, 3, 4)
    assert train.from_config("configs/quickstart.py", [], 8, "bfloat16").precision == "bfloat16"


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--model", "B/15"], "invalid choice"),
        (["--rounds", "0"], "at least 1"),
        (["--config.model.dtype=float32"], "pass --config too"),
        (["--config", "configs/quickstart.py", "--model", "small"], "not both"),
        (["--config", "configs/none.py"], "none.py"),
        (["--model", "small", "--batch", "3"], "does not divide"),
    ],
)
def test_mistakes_are_one_line(argv, said, capsys):
    try:
        code = train.main(argv)
    except SystemExit as end:
        code = end.code
    err = capsys.readouterr().err
    assert code == 2 and said in err and len(err.splitlines()) == 1


def test_towers_that_open_clip_lacks_are_named():
    assert "text pool 'gap'" in train_open_clip.why_not(towers("mu/16", 32, pool="gap"))
    with pytest.raises(UserError, match="divide into patches"):
        towers("mu/16", 40)


def test_commands_are_quoted_without_paths_of_this_machine():
    argv = ["--model", "small", "--peer_python", "/x/y", "--out=/z.json", "--batch=8"]
    assert train.shown(argv) == "python -m benchmarks.train --model small --batch=8"


def test_others_share_of_the_cpu_is_a_share():
    others = Others()
    sum(range(10**6))
    share = others.share()
    assert share is None or 0 <= share <= 1


def record(tmp_path, **more):
    parts = dict.fromkeys(train_report.PARTS, 0.1)
    measured = {"parameters": 10, "peak_bytes": 2**30, "parts": parts}
    return train_report.with_statistics(
        {
            "title": "case",
            "command": "python -m benchmarks.train",
            "machine": {
                "platform": "gpu", "cores": 2, "cpu": "c", "memory_gib": 1, "accelerator": None,
                "python": "3", "versions": {}, "date": "2026-01-01T00:00",
            },
            "batch": 8,
            "step_flops": 989e12 / 2,
            "device_kind": "NVIDIA H200",
            "devices": 1,
            "rounds": 3,
            "repeat": 1,
            "others_share_of_cpu": 0.0,
            "systems": [
                {"name": "ours", "seconds": [1.0, 1.0, 2.0], **measured},
                {"name": "open_clip eager", "seconds": [2.0, 1.5, 2.0], **measured},
                {"name": "open_clip compiled", "left_out": "no compiler"},
            ],
            **more,
        }
    )  # fmt: skip


def test_table_has_rates_ratios_and_what_is_left_out(tmp_path):
    done = record(tmp_path)
    ours, peer, _ = done["systems"]
    assert ours["images_per_s"] == 8 and ours["mfu"] == pytest.approx(0.5)
    assert peer["ratio"] == 1.5 and done["best_peer"] == "open_clip eager"
    screen = train_report.on_screen(done)
    assert "50.0 %" in screen and "1.50" in screen
    assert "left out, open_clip compiled: no compiler" in screen


def test_results_of_other_cases_stay_in_the_file(tmp_path):
    file = tmp_path / "train_gpu.json"
    train_report.write(record(tmp_path), file)
    train_report.write(record(tmp_path, title="another"), file)
    train_report.write(record(tmp_path, title="another", rounds=5), file)
    cases = json.loads(file.read_text())["cases"]
    assert [(case["title"], case["rounds"]) for case in cases] == [("case", 3), ("another", 5)]
    assert "## another" in file.with_suffix(".md").read_text()


def test_a_busy_machine_is_told(tmp_path):
    machine = {**record(tmp_path)["machine"], "platform": "cpu"}
    done = record(tmp_path, machine=machine, others_share_of_cpu=0.3)
    assert "30 % of the CPU went to others" in train_report.on_screen(done)


def test_our_worker_trains_and_tells_time_memory_and_parts():
    worker = Worker(sys.executable, "benchmarks.train_ours", tiny(), ONE_DEVICE)
    try:
        answer = worker.prepare()
        (seconds,) = worker.measure(2)
    finally:
        worker.close()
    assert seconds > 0 and np.isfinite(answer["loss"])
    assert set(answer["parts"]) == set(train_report.PARTS)
    assert answer["devices"] == 1 and answer["parameters"] > 32_000 * 32
    assert answer["peak_bytes"] is None or answer["peak_bytes"] > 2**20


@pytest.mark.slow
def test_open_clip_has_the_same_parameters():
    python = os.environ.get("SIGLIP_PEER_PYTHON")
    if not python:
        pytest.skip("SIGLIP_PEER_PYTHON names no interpreter that has open_clip")
    first = os.environ.get("SIGLIP_PEER_IMPORT", "")
    job = train_open_clip.TrainJob(dataclasses.asdict(tiny()), False, first)
    peer = Worker(python, "benchmarks.train_open_clip", job, {})
    ours = Worker(sys.executable, "benchmarks.train_ours", tiny(), ONE_DEVICE)
    try:
        assert peer.prepare()["parameters"] == ours.prepare()["parameters"]
    finally:
        peer.close()
        ours.close()
