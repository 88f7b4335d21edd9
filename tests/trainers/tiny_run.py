"""A run of seconds: its config, as a program and inside a test, and what it leaves behind."""

import contextlib
import io
import json
import os
import pathlib
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import processes

import main as program
from siglip.leaf_names import leaves
from trainers import loop
from trainers.config import complete

MAIN = pathlib.Path(program.__file__)
TEMPLATE = """\
from ml_collections import ConfigDict


def get_config(evals="val+retrieval+zeroshot"):
    tower = {"width": 16, "depth": 1, "mlp_dim": 32, "num_heads": 2}
    held_out = {"name": "scenes", "split": "val", "size": 12, "res": 16}
    held_out = {"batch_size": 8, "source": held_out}
    known = {
        "val": {"type": "loss", "every": "5 steps", **held_out},
        "retrieval": {"type": "retrieval", "every": "6 steps", **held_out},
        "zeroshot": {"type": "zeroshot", "templates": ("a {}",), **held_out},
    }
    return ConfigDict({
        "total": "12 steps",
        "log_every": 1,
        "model": {
            "img": {"variant": "mu/4", "drop_patches": 0.5, **tower},
            "txt": {"variant": "mu", **tower},
        },
        "input": {
            "batch_size": 16,
            "res": 16,
            "token_len": 24,
            "image": "decode | random_resized_crop(area=(0.6, 1.0)) | flip",
            "source": {"name": "scenes", "size": 72, "res": 16},
            "num_threads": 2,
        },
        "optimizer": {"name": "adafactor", "min_dim": 8},
        "checkpoint": {"every": "4 steps", "keep_last": 9},
        "evals": {name: known[name] for name in evals.split("+") if name},
    })
"""
EXAMPLES, BATCH, STEPS = 72, 16, 12  # an epoch ends in the middle of a batch
SET_BY_MAIN = ("--xla_force_host_platform_device_count", "--xla_cpu_collective_call")
# Of one life or one machine, not of the run.
TIMES = ("examples_per_s", "examples_per_s_per_device", "data_wait", "eta_s", "process_memory_gb")


class Tiny:
    """Runs the config, inside the test and as a program."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.config = folder / "tiny.py"
        self.config.write_text(TEMPLATE)

    def load(self, evals: str = "val+retrieval+zeroshot", **overrides):
        flags = [(key.replace("__", "."), str(value)) for key, value in overrides.items()]
        return complete.load(f"{self.config}:evals={evals}", flags)

    def train(self, workdir: pathlib.Path, **overrides) -> str:
        """What it prints."""
        with contextlib.redirect_stdout(io.StringIO()) as out:
            loop.train(self.load(**overrides), workdir)
        return out.getvalue()

    def main(self, workdir: pathlib.Path, *flags: str, evals: str = "") -> int:
        """main.py in this process: the exit code."""
        config = f"--config={self.config}:evals={evals}"
        return program.main([config, f"--workdir={workdir}", *flags])

    def command(self, workdir: pathlib.Path, *flags: str, evals: str = "val") -> list[str]:
        config = f"--config={self.config}:evals={evals}"
        return [sys.executable, str(MAIN), config, f"--workdir={workdir}", *flags]

    def started(self, command: list[str]):
        """The command as a program, on as many devices as config.mesh.cpu_devices says."""
        flags = (f for f in os.environ["XLA_FLAGS"].split() if not f.startswith(SET_BY_MAIN))
        environment = os.environ | {"XLA_FLAGS": " ".join(flags)}
        return processes.started(command, cwd=self.folder, env=environment)

    def ended(self, command: list[str]) -> str:
        """What the command as a program prints until it is done."""
        with self.started(command) as process:
            return processes.end(process, program.DONE).stdout


def events(workdir: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def deterministic(workdir: pathlib.Path) -> list[dict]:
    """The events without what depends on the machine."""
    return [{k: v for k, v in e.items() if k not in TIMES} for e in events(workdir)]


def steps_with(workdir: pathlib.Path, key: str) -> list[int]:
    return [event["step"] for event in events(workdir) if key in event]


def losses(workdir: pathlib.Path) -> list[float]:
    return [event["loss"] for event in events(workdir) if "loss" in event]


def results(workdir: pathlib.Path) -> dict:
    return json.loads((workdir / "results.json").read_text())


def on_disk(workdir: pathlib.Path) -> list[int]:
    """Steps of complete checkpoints."""
    names = (path.name for path in (workdir / "checkpoints").iterdir())
    return sorted(int(name) for name in names if name.isdecimal())


def saved(workdir: pathlib.Path, step: int = STEPS) -> dict:
    """The whole state of a checkpoint as NumPy arrays by name."""
    path = (workdir / "checkpoints" / str(step) / "state").absolute()
    handler = ocp.PyTreeCheckpointHandler()
    as_numpy = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray), handler.metadata(path).tree
    )
    tree = handler.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    return leaves(tree)


def assert_same_state(one: dict, other: dict) -> None:
    """Bit for bit."""
    assert set(one) == set(other) and len(one) > 100
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        assert one[name].tobytes() == other[name].tobytes(), name
