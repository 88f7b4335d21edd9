"""The loss against its peers, on the same inputs: time, memory, error of every gradient.

  python -m benchmarks.loss                            the default cases of this machine
  python -m benchmarks.loss --cases 4x1024x512 --systems ours,open_clip
  python -m benchmarks.loss --curve                    memory against devices: docs/ring_memory.png

Peers are optional (requirements-peers.txt) and may live in another environment, whose interpreter
--peer_python names. What is missing is named and left out.
"""

import argparse
import contextlib
import datetime
import os
import pathlib
import shlex
import sys
import tempfile
import time
from typing import Any

from base import command_line
from base.errors import UserError
from benchmarks.loss_case import LossCase, parse, write_inputs, write_reference

ROOT = pathlib.Path(__file__).resolve().parents[1]
REFERENCE_LIMIT_S = 120.0
DEFAULT_CASES = {"cpu": "4x1024x512,8x1024x512", "gpu": "1x65536x768"}
MILLION = "1x1048576x768"


def make_parser() -> command_line.Parser:
    parser = command_line.Parser(
        description=__doc__,
        usage="python -m benchmarks.loss [flags]",
    )
    add = parser.add_argument
    add("--cases", metavar="DxNxW,...", help="devices x pairs on each x width, such as 4x1024x512")
    add("--dtype", choices=("float32", "bfloat16"), help="of the embeddings (CPU: float32)")
    add("--systems", metavar="A,B", default="", help="only these, or those that begin like it")
    add("--repeat", metavar="k", type=int, default=20, help="repetitions of each system (20)")
    add("--rounds", metavar="k", type=int, default=5, help="in so many rounds (5)")
    add("--peer_python", metavar="path", help="interpreter that has PyTorch and the peers")
    add("--out", metavar="file.json", help="default benchmarks/results/loss_<platform>.json")
    add("--million", action="store_true", help=f"{MILLION}, this project alone, on a GPU")
    add("--curve", action="store_true", help="memory against devices; nothing is timed")
    return parser


def main(argv: list[str]) -> int:
    """Runs the benchmark; returns the exit code."""
    return command_line.run(
        lambda: run(make_parser().parse_args(argv), argv),
        interrupted="interrupted; finished cases are written",
    )


def run(flags: argparse.Namespace, argv: list[str]) -> int:
    if flags.repeat < 1 or flags.rounds < 1:
        raise UserError("--repeat and --rounds are at least 1")
    # The workers need the accelerator's memory; this process only asks for its name.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from benchmarks import loss_systems

    peer_python = flags.peer_python or loss_systems.default_peer_python()
    command = shown(argv)
    if flags.curve:
        from benchmarks import loss_curve

        return loss_curve.run(peer_python, command)

    from benchmarks import loss_report, machine

    host = machine.describe()
    platform = host["platform"]
    cases, chosen = plan(flags, platform)
    peers = loss_systems.probe_peers(peer_python)
    result = {"command": command, "machine": host, "peers": peers, "cases": []}
    out = pathlib.Path(flags.out or ROOT / "benchmarks" / "results" / f"loss_{platform}.json")
    print(f"{machine.one_line(host)}\n{loss_systems.names(chosen)}", flush=True)
    for number, case in enumerate(cases, 1):
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="loss_benchmark_"))
            bench = LossBench(
                case, platform, pathlib.Path(folder), f"case {number}/{len(cases)} {case}"
            )
            stack.callback(bench.close)
            bench.prepare(chosen, peers, peer_python)
            bench.measure(flags.repeat, flags.rounds)
            record = bench.record(flags.rounds)
        result["cases"].append(record)
        written = loss_report.write(result, out)  # after each case: an interruption keeps them
        print(f"\n{loss_report.title(record)}", flush=True)
        print(loss_report.aligned(loss_report.table(record["systems"])), flush=True)
        if record["no_reference"]:
            print(f"no errors: {record['no_reference']}")
        for line in loss_report.left_out(record["systems"]):
            print(f"left out, {line}")
        print(f"written: {', '.join(os.path.relpath(path) for path in written)}\n", flush=True)
    return 0


def shown(argv: list[str]) -> str:
    """The command as results quote it, without paths that only this machine has."""
    words = ["python", "-m", "benchmarks.loss"]
    for word in argv:
        flag, _, value = word.partition("=")
        hidden = words[-1] in ("--peer_python", "--out")
        if flag in ("--peer_python", "--out") and value:
            word, hidden = f"{flag}=...", False
        words.append("..." if hidden else word)
    return shlex.join(words)


def plan(flags: argparse.Namespace, platform: str) -> tuple[list[LossCase], list[Any]]:
    """The cases and the systems of this run."""
    from benchmarks import loss_systems

    if flags.million:
        if platform == "cpu":
            raise UserError("--million needs an accelerator: on a CPU it takes hours")
        if flags.cases:
            raise UserError("--million is a case of its own; leave --cases away")
    texts = MILLION if flags.million else flags.cases or DEFAULT_CASES.get(platform, MILLION)
    names = flags.systems or (loss_systems.BASE if flags.million else "")
    dtype = flags.dtype or ("float32" if platform == "cpu" else "bfloat16")
    cases = [parse(text, dtype) for text in texts.split(",")]
    if platform != "cpu":
        import jax

        for case in cases:
            if case.devices > jax.device_count():
                raise UserError(f"{case}: {jax.device_count()} devices are here")
    return cases, loss_systems.choose(names, platform)


class LossBench:
    """One case: its inputs, a worker for each system, and their answers."""

    def __init__(self, case: LossCase, platform: str, folder: pathlib.Path, label: str):
        self.case, self.platform, self.folder, self.label = case, platform, folder, label
        self.records: list[dict[str, Any]] = []
        self.workers: dict[str, Any] = {}
        self.no_reference = ""

    def prepare(self, systems: list[Any], peers: dict[str, Any], peer_python: str) -> None:
        """Inputs, the float64 reference, and all systems compiled, with memory and errors."""
        from benchmarks.loss_systems import why_not

        self.say("inputs and their float64 gradients")
        write_inputs(self.case, self.folder)
        self.no_reference = write_reference(self.case, self.folder, REFERENCE_LIMIT_S)
        for number, system in enumerate(systems, 1):
            record: dict[str, Any] = {"name": system.name, "what": system.what}
            self.records.append(record)
            if reason := why_not(system, self.case, self.platform, peers):
                record["left_out"] = reason
                self.say(f"{system.name} left out: {reason}")
                continue
            self.workers[system.name] = worker = system.start(
                self.case, self.platform, str(self.folder), peer_python
            )
            begin = time.monotonic()
            if (answer := self._ask(record, worker.prepare)) is not None:
                record |= {"seconds": [], **answer}
                took = time.monotonic() - begin
                self.say(f"{system.name} ready in {took:.1f} s, {number} of {len(systems)}")

    def measure(self, repeats: int, rounds: int) -> None:
        """`repeats` of each system in all; each round starts with another system."""
        rounds = min(rounds, repeats)
        counts = [repeats // rounds + (i < repeats % rounds) for i in range(rounds)]
        ready = [record for record in self.records if "seconds" in record]
        begin, done, total = time.monotonic(), 0, len(ready) * rounds
        for i, count in enumerate(counts):
            for record in ready[i % len(ready) :] + ready[: i % len(ready)] if ready else []:
                done += 1
                if record["name"] not in self.workers:
                    continue  # failed in an earlier round
                measure = self.workers[record["name"]].measure
                seconds = self._ask(record, lambda k=count, measure=measure: measure(k))
                if seconds is None:
                    continue
                record["seconds"] += seconds
                rest = (time.monotonic() - begin) / done * (total - done)
                self.say(
                    f"round {i + 1}/{rounds}, {record['name']}: "
                    + " ".join(f"{1000 * s:.0f}" for s in seconds)
                    + f" ms; {datetime.timedelta(seconds=round(rest))} left"
                )

    def record(self, rounds: int) -> dict[str, Any]:
        from benchmarks.loss_case import B, T
        from benchmarks.loss_report import with_statistics

        case = self.case
        return {
            "devices": case.devices,
            "n": case.n,
            "d": case.d,
            "dtype": case.dtype,
            "platform": self.platform,
            "t": T,
            "b": B,
            "rounds": rounds,
            "no_reference": self.no_reference,
            "systems": with_statistics(self.records),
        }

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close()
        self.workers.clear()

    def say(self, text: str) -> None:
        print(f"[{self.label}] {text}", flush=True)

    def _ask(self, record: dict[str, Any], question):
        """The worker's answer; None if it failed, and then the system is left out from here on."""
        from benchmarks.loss_worker import Failed

        try:
            return question()
        except Failed as failure:
            record["left_out"] = f"failed: {failure}"
            record.pop("seconds", None)
            self.say(f"{record['name']} failed: {failure}")
            self.workers.pop(record["name"]).close()
            return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
