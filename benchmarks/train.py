"""A training step against open_clip's: images/s, FLOP/s, memory, and where the time goes.

  python -m benchmarks.train --model small --batch 32
  python -m benchmarks.train --model B/16 --batch 8 --peer none
  python -m benchmarks.train --config configs/quickstart.py --config.input.batch_size=64

Batches are synthetic. Of a config it takes the model, input.res, token_len and batch_size; the
step is AdamW on the sigmoid loss. open_clip is optional (requirements-peers.txt) and may live in
another environment, whose interpreter --peer_python or SIGLIP_PEER_PYTHON names.
"""

import argparse
import dataclasses
import datetime
import os
import pathlib
import shlex
import sys
import time
from typing import Any

from base import command_line
from base.errors import UserError
from benchmarks.train_case import MODELS, TOKEN_LEN, VOCAB_SIZE, TrainCase, step_flops
from benchmarks.train_others import Others

ROOT = pathlib.Path(__file__).resolve().parents[1]
HIDDEN = ("--peer_python", "--peer_import", "--out")  # flags whose values only this machine has


def make_parser() -> command_line.Parser:
    parser = command_line.Parser(
        description=__doc__,
        usage="python -m benchmarks.train [flags] [--config.key=value ...]",
    )
    add = parser.add_argument
    add("--model", choices=MODELS, help="towers of that name (small)")
    add("--config", metavar="file.py[:args]", help="the towers of a config of this project")
    add("--batch", type=int, metavar="n", help="pairs of a step, over all devices")
    add("--precision", choices=("float32", "bfloat16"), help="of matmuls (CPU: float32)")
    add("--peer", choices=("open_clip", "none"), default="open_clip")
    add("--peer_python", metavar="path", help="interpreter that has PyTorch and open_clip")
    add("--peer_import", metavar="module", default="", help="imported there before the others")
    add("--rounds", type=int, default=7, metavar="k", help="of each system, in turn (7)")
    add("--repeat", type=int, default=3, metavar="k", help="steps of a round (3)")
    add("--out", metavar="file.json", help="default benchmarks/results/train_<platform>.json")
    return parser


def main(argv: list[str]) -> int:
    """Runs the benchmark; returns the exit code."""
    overrides, rest = command_line.split_overrides(argv)
    return command_line.run(
        lambda: run(make_parser().parse_args(rest), overrides, argv),
        interrupted="interrupted",
    )


def run(flags: argparse.Namespace, overrides: list[tuple[str, str]], argv: list[str]) -> int:
    from benchmarks import machine, train_report

    # The workers need the accelerator's memory; this process only asks for its name.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if flags.rounds < 1 or flags.repeat < 1:
        raise UserError("--rounds and --repeat are at least 1")
    if flags.config and flags.model:
        raise UserError("give --model or --config, not both")
    if overrides and not flags.config:
        raise UserError(f"--config.{overrides[0][0]} changes a config: pass --config too")
    host = machine.describe()
    platform = host["platform"]
    if flags.config:
        case = from_config(flags.config, overrides, flags.batch, flags.precision)
    else:
        precision = flags.precision or ("float32" if platform == "cpu" else "bfloat16")
        case = built_in(flags.model or "small", flags.batch, precision)
    print(f"{machine.one_line(host)}\n{case.title}: {step_flops(case) / 1e9:,.1f} GFLOP a step")
    bench, others = TrainBench(case), Others()
    try:
        bench.prepare(flags, platform)
        bench.measure(flags.rounds, flags.repeat)
    finally:
        bench.close()
    record = train_report.with_statistics(
        {
            "title": case.title,
            "command": shown(argv),
            "machine": host,
            **{k: v for k, v in dataclasses.asdict(case).items() if k != "name"},
            "rounds": flags.rounds,
            "repeat": flags.repeat,
            "step_flops": step_flops(case),
            "device_kind": bench.records[0].get("device_kind"),
            "devices": bench.records[0].get("devices", 1),
            "others_share_of_cpu": others.share(),
            "systems": bench.records,
        }
    )
    out = pathlib.Path(flags.out or ROOT / "benchmarks" / "results" / f"train_{platform}.json")
    print(f"\n{train_report.on_screen(record)}", flush=True)
    if not any(system.get("seconds") for system in bench.records):
        return 1
    written = train_report.write(record, out)
    print(f"written: {', '.join(os.path.relpath(path) for path in written)}", flush=True)
    return 0


def built_in(name: str, batch: int | None, precision: str) -> TrainCase:
    blocks, res, default_batch = MODELS[name]
    txt = {**blocks["txt"], "vocab_size": VOCAB_SIZE}
    model = {"img": blocks["img"], "txt": txt, "dtype": precision}
    batch = default_batch if batch is None else batch
    return make_case(name, model, batch, res, TOKEN_LEN, precision)


def from_config(
    flag: str, overrides: list[tuple[str, str]], batch: int | None, precision: str | None
) -> TrainCase:
    """The towers, resolution, text length and (by default) batch and precision of a config."""
    from input_pipeline.transforms.tokenizer import TOKENIZERS
    from trainers.config import complete
    from trainers.data import chosen, without

    config: Any = complete.load(flag, overrides)
    model = without(config.model)
    if not model["txt"].get("vocab_size"):
        model["txt"]["vocab_size"] = chosen(TOKENIZERS, config.input.tokenizer).vocab_size
    precision = str(precision or model["dtype"])
    return make_case(
        pathlib.Path(flag.partition(":")[0]).stem,
        {**model, "dtype": precision},
        config.input.batch_size if batch is None else batch,
        config.input.res,
        config.input.token_len,
        precision,
    )


def make_case(
    name: str, model: dict[str, Any], batch: int, res: int, token_len: int, precision: str
) -> TrainCase:
    """Raises UserError for sizes that fit no tower or no device."""
    import jax

    from siglip.towers.two_towers import make_model

    try:
        towers = make_model(**model)
    except ValueError as error:
        raise UserError(f"the model of {name}: {error}") from None
    if batch < 1 or batch % jax.device_count():
        raise UserError(f"a batch of {batch} does not divide over {jax.device_count()} devices")
    shared = ("width", "depth", "mlp_dim", "num_heads", "pool", "out_dim")
    img, txt = (
        {key: getattr(tower, key) for key in (*shared, *own)}
        for tower, own in (
            (towers.img, ("patch_size", "drop_patches")),
            (towers.txt, ("vocab_size", "bottleneck")),
        )
    )
    if res % img["patch_size"]:
        raise UserError(f"{res} px do not divide into patches of {img['patch_size']}")
    return TrainCase(name, model, img, txt, batch, res, token_len, precision)


def shown(argv: list[str]) -> str:
    """The command as results quote it, without paths that only this machine has."""
    words, argv = ["python", "-m", "benchmarks.train"], list(argv)
    while argv:
        flag, equals, _ = (word := argv.pop(0)).partition("=")
        if flag not in HIDDEN:
            words.append(word)
        elif not equals and argv:
            argv.pop(0)
    return shlex.join(words)


class TrainBench:
    """A worker for each system, and their answers; records[0] is ours."""

    def __init__(self, case: TrainCase):
        self.case = case
        self.records: list[dict[str, Any]] = []
        self.workers: dict[str, Any] = {}

    def prepare(self, flags: argparse.Namespace, platform: str) -> None:
        from benchmarks import train_open_clip
        from benchmarks.loss_worker import Worker

        quiet = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # systems share an accelerator
        job: Any = self.case
        self._prepare("ours", lambda: Worker(sys.executable, "benchmarks.train_ours", job, quiet))
        if flags.peer == "none":
            return
        python = flags.peer_python or os.environ.get("SIGLIP_PEER_PYTHON") or sys.executable
        reason = train_open_clip.why_not(self.case)
        if platform == "tpu":
            reason = "open_clip does not train on TPUs"
        elif self.records[0].get("devices", 1) > 1:
            reason = "its worker uses one device, and there are several"
        for compiled in (False, True):
            job = train_open_clip.TrainJob(
                dataclasses.asdict(self.case), compiled, flags.peer_import
            )
            self._prepare(
                f"open_clip {'compiled' if compiled else 'eager'}",
                lambda job=job: Worker(python, "benchmarks.train_open_clip", job, {}),
                reason,
            )

    def _prepare(self, name: str, start, reason: str = "") -> None:
        record: dict[str, Any] = {"name": name}
        self.records.append(record)
        if reason:
            record["left_out"] = reason
            return self.say(f"{name} left out: {reason}")
        self.say(f"{name}: compiling and warming up")
        try:
            self.workers[name] = start()
        except OSError as error:
            record["left_out"] = f"its interpreter does not start: {error.strerror}"
            return self.say(f"{name} left out: {record['left_out']}")
        if (answer := self._ask(record, self.workers[name].prepare)) is None:
            return None
        self.say(f"{name} ready after {answer['prepare_s']:.1f} s of first steps")
        ours = self.records[0].get("parameters", answer["parameters"])
        if answer["parameters"] != ours:
            raise UserError(
                f"{name} has {answer['parameters']:,} parameters and ours {ours:,}: "
                "the towers are not the same"
            )
        record |= {"seconds": [], **answer}
        return None

    def measure(self, rounds: int, repeat: int) -> None:
        ready = [record for record in self.records if "seconds" in record]
        begin, done, total = time.monotonic(), 0, rounds * len(ready)
        for i in range(rounds):
            for record in ready[i % len(ready) :] + ready[: i % len(ready)] if ready else []:
                done += 1
                if record["name"] not in self.workers:
                    continue  # failed in an earlier round
                worker = self.workers[record["name"]]
                seconds = self._ask(record, lambda worker=worker: worker.measure(repeat))
                if seconds is None:
                    continue
                record["seconds"] += seconds
                rest = (time.monotonic() - begin) / done * (total - done)
                self.say(
                    f"round {i + 1}/{rounds}, {record['name']}: {1000 * seconds[0]:,.0f} ms a "
                    f"step; {datetime.timedelta(seconds=round(rest))} left"
                )

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close()
        self.workers.clear()

    def say(self, text: str) -> None:
        print(f"[{self.case}] {text}", flush=True)

    def _ask(self, record: dict[str, Any], question) -> Any:
        """The worker's answer; None if it failed, and then the system is left out from here on."""
        from benchmarks.loss_worker import Failed

        try:
            return question()
        except Failed as failure:
            record["left_out"] = str(failure)
            record.pop("seconds", None)
            self.say(f"{record['name']} left out: {failure}")
            self.workers.pop(record["name"]).close()
            return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
