"""The command that compiles for machines that are not here."""

import json

import pods
import pytest

import main as training
from programs import compile_only as program
from trainers.machine import topology

TINY = """\
from ml_collections import ConfigDict

def get_config(missing: bool = False):
    config = ConfigDict()
    if missing:
        config.missing = "pass your data"
    config.total = "10 steps"
    config.model = ConfigDict({"img": {"variant": "mu/16"}, "txt": {"variant": "mu"}})
    config.input = ConfigDict({
        "batch_size": 32, "res": 32, "token_len": 8,
        "source": {"name": "files", "path": "nowhere.jsonl"},
        "tokenizer": {"name": "sentencepiece", "path": "nowhere.model"},
    })
    config.evals = ConfigDict({"loss": {"type": "loss", "source": {"name": "scenes"}}})
    return config
"""


@pytest.fixture
def tiny(tmp_path):
    (tmp_path / "tiny.py").write_text(TINY)
    return tmp_path / "tiny.py"


@pytest.fixture
def compile_only(monkeypatch):
    """The command in this process; what it sets in the environment is forgotten."""
    for name in (*topology.LIBTPU_ALONE, "TPU_STDERR_LOG_LEVEL", "TPU_MIN_LOG_LEVEL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    return lambda *argv: program.main([*map(str, argv)])


def test_a_step_on_emulated_devices_without_data_or_tokenizer(tiny, tmp_path, compile_only, capfd):
    file = tmp_path / "fit.json"
    flags = [f"--config={tiny}:missing", "--topology=cpu:8", "--config.mesh.fsdp=2"]
    flags += ["--config.objectives.contrastive.exchange=ring"]
    assert compile_only(*flags, f"--json={file}") == 0
    out, err = capfd.readouterr()
    assert "fits: yes" in out and "8 x cpu, mesh data=4, fsdp=2; 4 pairs" in out
    assert "attention xla, remat none, layers unrolled" in out
    assert "32,000 ids" in err
    record = json.loads(file.read_text())
    assert record["memory"]["peak"] > 0 and record["model_flops"] > 0
    assert record["run_flops"] == record["model_flops"]
    assert {c["kind"] for c in record["collectives"]} >= {"all-reduce", "collective-permute"}
    assert record["settings"] == {
        "mesh.fsdp": "2",
        "objectives.contrastive.exchange": "ring",
    }


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--topology=v4:4x4x2"], "needs libtpu, the TPU's compiler: pip install -r"),
        (["--topology=h200:1x1x8"], "needs JAX's CUDA plugin: pip install -r"),
        (["--topology=v5:4x4"], "'v5' is unknown; the nearest: v5"),
        (["--topology=v4-32"], "is not KIND:LAYOUT, such as v4:4x4x2"),
        (["--topology=v5e:4x4x4"], "v5e has another number of axes, such as v5e:16x16"),
        (["--topology=cpu:8", "--config.mesh.fsdp=3"], "does not fit 8 devices"),
        (["--topology=cpu:8", "--config.input.batch_size=31"], "does not divide over 8 devices"),
        ([], "pass --topology, such as"),
        (
            ["--topology=cpu:8", "--json=/no/where.json"],
            "--json=/no/where.json: /no is not a folder",
        ),
        (["--topology=cpu:8", "--config.model.img.group=3"], "group=3 must divide the 4 examples"),
        (["--topology=cpu:8", "--config.model.txt.group=-1"], "must be 0 (all) or more, not -1"),
        (["--topology=cpu:8", "--spam"], "unexpected argument '--spam'"),
        (["--topology=cpu:8", "--config.model.img.spam=1"], "unknown key"),
    ],
)
def test_mistakes_are_one_line(tiny, compile_only, capfd, flags, message):
    assert compile_only(f"--config={tiny}", *flags) == 2
    err = capfd.readouterr().err
    *notes, error = err.strip().split("\n")
    assert error.startswith("error: ") and message in error, err
    assert not any("error" in note for note in notes)


def test_an_interrupted_compilation_says_that_nothing_is_kept(compile_only, monkeypatch, capfd):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "_main", interrupted)
    assert compile_only("--config=any.py") == 85
    assert capfd.readouterr().err == "interrupted; nothing of it is kept\n"


def test_a_config_that_lacks_its_data_does_not_train(tiny, tmp_path, capsys):
    assert training.main([f"--config={tiny}:missing", f"--workdir={tmp_path / 'w'}"]) == 2
    assert "tiny.py: pass your data" in capsys.readouterr().err
    assert not (tmp_path / "w").exists()


def test_a_program_that_does_not_fit_a_tpu_says_what_takes_the_memory(tiny, tmp_path):
    big = ["--config.input.res=256", "--config.input.batch_size=65536", "--config.model.scan=True"]
    ran = pods.run(
        *["-m", "programs.compile_only", "--config", str(tiny), "--topology=v5e:2x2", "--quick"],
        *[*big, "--config.model.img.depth=4", f"--json={tmp_path / 'fit.json'}"],
        code=1,
    )
    assert "fits: NO" in ran.stdout and "GiB too much" in ran.stdout
    assert "what takes the memory:" in ran.stdout and "with --fit tries settings" in ran.stdout
    record = json.loads((tmp_path / "fit.json").read_text())
    assert record["memory"]["limit"] == int(15.75 * 2**30) < record["memory"]["peak"]
    assert record["memory"]["largest"]


def test_settings_that_fit_are_found(tiny):
    big = ["--config.input.res=256", "--config.input.batch_size=65536", "--config.model.scan=True"]
    ran = pods.run(
        *["-m", "programs.compile_only", "--config", str(tiny), "--topology=v5e:2x2", "--fit"],
        *[*big, "--config.model.img.depth=4"],
    )
    assert "fits: yes" in ran.stdout
    assert "as it is: " in ran.stderr and "--config.model.remat=" in ran.stdout


def test_the_estimate_of_a_full_compilation_and_the_places_of_our_code(tiny, tmp_path):
    ran = pods.run(
        *["-m", "programs.compile_only", "--config", str(tiny), "--topology=v4:2x2x1"],
        *["--config.input.batch_size=1024", f"--json={tmp_path / 'fit.json'}"],
    )
    assert "(estimate, no wire time, no Pallas time)" in ran.stdout
    record = json.loads((tmp_path / "fit.json").read_text())
    assert record["estimate"] > record["seconds_by_flops"] > 0
    assert record["unknown_loops"] == 0
    assert any(o["place"].startswith("siglip/towers/") for o in record["by_cycles"])


def test_the_fused_kernel_of_attention_is_counted_by_hand(tiny, tmp_path):
    sizes = ["width=128", "num_heads=2", "mlp_dim=256"]
    ran = pods.run(
        *["-m", "programs.compile_only", "--config", str(tiny), "--topology=v4:2x2x1", "--quick"],
        *[f"--config.model.{tower}.{size}" for tower in ("img", "txt") for size in sizes],
        *["--config.input.res=256", "--config.model.dtype=bfloat16"],
        *["--config.model.attention=fused", f"--json={tmp_path / 'fit.json'}"],
    )
    assert "attention fused" in ran.stdout and "counted by hand" in ran.stdout
    record = json.loads((tmp_path / "fit.json").read_text())
    assert record["pallas"] > 0 and record["kernel_seconds"] > 0
