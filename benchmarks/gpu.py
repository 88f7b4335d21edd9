"""All that is to be measured on a GPU, as one command of at most ten minutes.

  python -m benchmarks.gpu --out results          # writes results/gpu_*.json and results/gpu.log
  python -m benchmarks.gpu --list                 # the commands and their time limits

The loss beside siglip-kernel, Inf-CL and open_clip, 2^20 pairs on one card, and training steps of
B/16 and L/16 beside open_clip. Peers come from requirements-peers.txt; what is missing is left
out. A command that takes longer than its limit is ended, and what it had finished stays.
"""

import datetime
import pathlib
import shlex
import subprocess
import sys
import time

from base.command_line import DONE, FAILED, Parser, run

# Name -> (seconds, arguments of python -m). Together less than ten minutes.
JOBS = {
    "loss": (150, "benchmarks.loss --repeat 10 --rounds 3"),
    "million": (110, "benchmarks.loss --million --repeat 3 --rounds 1"),
    "train_b16": (
        150,
        "benchmarks.train --model B/16 --batch 512 --precision bfloat16 --rounds 3",
    ),
    "train_l16": (
        160,
        "benchmarks.train --model L/16 --batch 128 --precision bfloat16 --rounds 3",
    ),
}


def main(argv: list[str]) -> int:
    return run(lambda: _main(argv))


def _main(argv: list[str]) -> int:
    parser = Parser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", metavar="folder", default="benchmarks/results")
    parser.add_argument("--list", action="store_true", help="print the commands, run nothing")
    flags = parser.parse_args(argv)
    out = pathlib.Path(flags.out)
    failed = []
    for name, (limit, words) in JOBS.items():
        command = [*shlex.split(words), "--out", str(out / f"gpu_{name}.json")]
        print(f"[at most {limit} s] python -m {shlex.join(command)}", flush=True)
        if not flags.list and not measure(command, limit, out):
            failed.append(name)
    if failed:
        print(f"not finished: {', '.join(failed)}; {out / 'gpu.log'} says why", file=sys.stderr)
    return FAILED if failed else DONE


def measure(command: list[str], limit: float, out: pathlib.Path) -> bool:
    """Runs a benchmark, whose output goes to gpu.log; whether it came to its end."""
    out.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    with open(out / "gpu.log", "a") as log:
        print(f"{datetime.date.today()} python -m {shlex.join(command)}", file=log, flush=True)
        try:
            code = subprocess.run(
                [sys.executable, "-m", *command],
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=limit,
            ).returncode
        except subprocess.TimeoutExpired:
            code = None
    ending = "did not end in time" if code is None else f"exit code {code}"
    print(f"  {ending}, {time.monotonic() - begin:.0f} s", flush=True)
    return code == 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
