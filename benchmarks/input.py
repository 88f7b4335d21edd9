"""Images per second and core from JPEG to batch: formats, presets, and other projects' ways.

  python -m benchmarks.input
  python -m benchmarks.input --photos FOLDER_OR_ZIP --data FOLDER --threads 2
  python -m benchmarks.input --model small --batch 32

It writes JPEGs of ImageNet's size first: of seeded textures, or of photographs with --photos. With
--model it compares the step of benchmarks.train fed from them with the step fed from memory, which
shows what waiting costs. Peers are optional (requirements-peers.txt) and may live in other
environments, whose interpreters --peer_python (which may be repeated) or SIGLIP_PEER_PYTHON name.
"""

import argparse
import contextlib
import dataclasses
import datetime
import os
import pathlib
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from base import command_line
from base.errors import UserError
from benchmarks.input_case import InputJob, InputSystem, systems
from benchmarks.train import HIDDEN, built_in
from benchmarks.train_case import MODELS
from benchmarks.train_others import Others

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGES = (
    "jax", "grain", "numpy", "simplejpeg", "opencv-python-headless", "pillow", "pyarrow",
    "array-record",
)  # fmt: skip
BATCH = 256
MINIMA = {"count": 16, "threads": 1, "batch": 1, "rounds": 1, "repeat": 1}


def make_parser() -> command_line.Parser:
    parser = command_line.Parser(
        description=__doc__,
        usage="python -m benchmarks.input [flags]",
    )
    add = parser.add_argument
    add("--photos", metavar="path", help="folder or zip of photographs (seeded textures)")
    add("--count", type=int, default=1000, metavar="n", help="JPEGs (1000)")
    add("--data", metavar="folder", help="where they are kept (a temporary folder)")
    add("--threads", type=int, metavar="n", help="of the loader and of each peer (the loader's)")
    add("--batch", type=int, metavar="n", help="images of a batch (256; the model's)")
    add("--model", choices=MODELS, help="feed the step of that model instead")
    add("--peer", choices=("all", "none"), default="all")
    add("--peer_python", action="append", metavar="path", help="interpreter that has peers")
    add("--peer_import", metavar="module", default="", help="imported there before open_clip")
    add("--rounds", type=int, default=5, metavar="k", help="of each system, in turn (5)")
    add("--repeat", type=int, metavar="k", help="batches of a round (2), or steps (5)")
    add(
        "--out",
        metavar="file.json",
        help="default benchmarks/results/input_<platform>.json, input_step_...",
    )
    return parser


def main(argv: list[str]) -> int:
    """Runs the benchmark; returns the exit code."""
    return command_line.run(
        lambda: run(make_parser().parse_args(argv), argv),
        interrupted="interrupted",
    )


def run(flags: argparse.Namespace, argv: list[str]) -> int:
    for name, least in MINIMA.items():
        value = getattr(flags, name)
        if value is not None and value < least:
            raise UserError(f"--{name} {value} must be at least {least}")
    from benchmarks import input_formats, input_report, machine
    from input_pipeline.loader import NUM_THREADS

    # The worker needs the accelerator's memory; this process only asks for its name.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    flags.threads = flags.threads or NUM_THREADS
    host = machine.describe(PACKAGES)
    print(machine.one_line(host), flush=True)
    with _folder(flags.data) as folder:
        say(f"{flags.count:,} JPEGs in every format")
        images = input_formats.prepare(folder, flags.count, flags.photos or "")
        say(f"{images['mean_bytes'] / 1000:.1f} KB on average: {images['how']}")
        others = Others()
        record = (_step if flags.model else _pipelines)(flags, folder, host["platform"])
    record = {
        "command": shown(argv),
        "machine": host,
        "others_share_of_cpu": others.share(),
        "rounds": flags.rounds,
        "threads": flags.threads,
        **images,
        **record,
    }
    record["title"] = f"{record['title']}; {flags.count:,} JPEGs, {flags.threads} threads"
    with_statistics = input_report.with_statistics
    if flags.model:
        with_statistics = input_report.with_step_statistics
    record = with_statistics(record)
    print(f"\n{input_report.on_screen(record)}", flush=True)
    if not record.get("seconds") and not any(s.get("cpu_s") for s in record["systems"]):
        return 1
    platform = host["platform"]
    name = f"input{'_step' * bool(flags.model)}_{platform}.json"
    out = pathlib.Path(flags.out or ROOT / "benchmarks" / "results" / name)
    written = input_report.write(record, out)
    print(f"written: {', '.join(os.path.relpath(path) for path in written)}", flush=True)
    return 0


def _pipelines(flags: argparse.Namespace, folder: pathlib.Path, platform: str) -> dict[str, Any]:
    del platform  # the accelerator has no part in it
    batch, repeat = flags.batch or BATCH, flags.repeat or 2
    bench = InputBench(folder, batch, flags.threads)
    try:
        for system in systems(flags.peer == "all"):
            bench.prepare(system, _interpreters(flags, system), flags.peer_import)
        bench.measure(flags.rounds, repeat)
    finally:
        bench.close()
    return {
        "title": f"JPEG to 224 px, batch {batch}",
        "batch": batch,
        "repeat": repeat,
        "unit": "batches",
        "systems": bench.records,
    }


def _step(flags: argparse.Namespace, folder: pathlib.Path, platform: str) -> dict[str, Any]:
    from benchmarks.input_step import StepJob
    from benchmarks.loss_worker import Failed, Worker

    precision, repeat = "float32" if platform == "cpu" else "bfloat16", flags.repeat or 5
    case = built_in(flags.model, flags.batch, precision)
    job: Any = StepJob(dataclasses.asdict(case), str(folder), flags.threads)
    say(f"{case}: compiling and warming up")
    worker, seconds = Worker(sys.executable, "benchmarks.input_step", job, {}), []
    try:
        answer = worker.prepare()
        for i in range(flags.rounds):
            seconds.append(worker.measure(repeat))
            memory, files, wait = seconds[-1]
            say(
                f"round {i + 1}/{flags.rounds}: {memory:.3f} s a step from memory, {files:.3f} s "
                f"from files, of which {wait:.3f} s waiting"
            )
    except Failed as failure:
        raise UserError(f"{case}: {failure}") from None
    finally:
        worker.close()
    return {
        "title": f"A step of {case.title}",
        "batch": case.batch,
        "repeat": repeat,
        "unit": "steps",
        "seconds": seconds,
        "systems": [],
        **answer,
    }


@contextlib.contextmanager
def _folder(data: str | None) -> Iterator[pathlib.Path]:
    if data:
        yield pathlib.Path(data).expanduser().absolute()  # workers have another directory
    else:
        with tempfile.TemporaryDirectory() as folder:
            yield pathlib.Path(folder)


def _interpreters(flags: argparse.Namespace, system: InputSystem) -> list[str]:
    """The interpreters that may have the system, in the order in which they are tried."""
    if not system.foreign:
        return [sys.executable]
    named = os.environ.get("SIGLIP_PEER_PYTHON", "").split(os.pathsep)
    return flags.peer_python or [name for name in named if name] or [sys.executable]


def shown(argv: list[str]) -> str:
    """The command as results quote it, without paths that only this machine has."""
    words, argv = ["python", "-m", "benchmarks.input"], list(argv)
    while argv:
        flag, equals, _ = (word := argv.pop(0)).partition("=")
        local = flag in (*HIDDEN, "--data", "--photos")
        if local and not equals and argv:
            argv.pop(0)
        if flag == "--photos":
            words += [flag, "FOLDER_OR_ZIP"]
        elif not local:
            words.append(word)
    return shlex.join(words)


def say(text: str) -> None:
    print(f"[input] {text}", flush=True)


class InputBench:
    """A worker for each system, and their answers."""

    def __init__(self, folder: pathlib.Path, batch: int, threads: int):
        self.folder, self.batch, self.threads = folder, batch, threads
        self.records: list[dict[str, Any]] = []
        self.workers: dict[str, Any] = {}

    def prepare(self, system: InputSystem, pythons: list[str], import_first: str) -> None:
        """Starts the system in the first interpreter that has it."""
        from benchmarks.loss_worker import Failed, Worker

        job: Any = InputJob(
            system.options, str(self.folder), self.batch, self.threads, import_first
        )
        record: dict[str, Any] = {"name": system.name, "group": system.group}
        self.records.append(record)
        reasons = []
        for python in pythons:
            if not shutil.which(python):
                reasons.append("there is no such interpreter")
                continue
            worker = Worker(python, system.module, job, {})
            try:
                record |= {"cpu_s": [], "wall_s": [], **worker.prepare()}
            except Failed as failure:
                worker.close()
                reasons.append(str(failure))
                continue
            self.workers[record["name"]] = worker
            return say(f"{record['name']}: ready")
        record["left_out"] = "; ".join(dict.fromkeys(reasons))
        return say(f"{record['name']} left out: {record['left_out']}")

    def measure(self, rounds: int, repeat: int) -> None:
        from benchmarks.loss_worker import Failed

        ready = [record for record in self.records if "cpu_s" in record]
        begin = time.monotonic()
        for i in range(rounds):
            first = i * len(ready) // rounds  # so that no system is always measured after the same
            for record in ready[first:] + ready[:first]:
                name = record["name"]
                if name not in self.workers:
                    continue  # failed in an earlier round
                try:
                    cpu, wall = self.workers[name].measure(repeat)
                except Failed as failure:
                    record["left_out"] = str(failure)
                    del record["cpu_s"], record["wall_s"]
                    say(f"{name} left out: {failure}")
                    self.workers.pop(name).close()
                    continue
                record["cpu_s"].append(cpu)
                record["wall_s"].append(wall)
                say(f"round {i + 1}/{rounds}, {name}: {1 / cpu:,.0f} images/s per core")
            rest = (time.monotonic() - begin) / (i + 1) * (rounds - i - 1)
            say(f"{datetime.timedelta(seconds=round(rest))} left")

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close()
        self.workers.clear()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
