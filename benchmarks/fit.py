"""Compiles the reference runs for the machines that they name, and writes the table of docs/fit.md.

  python -m benchmarks.fit                       # all, minutes each, with both compilers
  python -m benchmarks.fit --only so400m,v4      # those whose name holds both words
  python -m benchmarks.fit --table               # no compilation: the table of what is recorded

Nothing is run on a device: memory and bytes are the compilers', times are XLA's estimates. Every
case is a process of `python -m programs.compile_only`; its record goes into
benchmarks/results/fit.json as soon as it is there, so that the command can be stopped and repeated.
"""

import importlib
import json
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

from base import whole_file
from base.command_line import DONE, FAILED, Parser, run
from base.errors import UserError
from base.progress import Progress
from siglip.chips import GiB

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "fit.json"
TABLE = ROOT / "benchmarks" / "results" / "fit.md"
CONFIGS = ("siglip_b16", "siglip_l16", "siglip_so400m")
DROPPED = ("by_bytes", "by_cycles")  # lines of code move; compile_only prints them
COLUMNS = (
    "run",
    "pairs a device",
    "settings",
    "peak, of GiB",
    "spare",
    "by FLOPs / traffic, ms",
    "estimate, ms",
    "MFU",
    "collectives: kind, MB, blocking MB",
)


def cases() -> list[tuple[str, str]]:
    """(config, topology) of every slice that a reference config names."""
    return [
        (name, topology)
        for name in CONFIGS
        for topology in importlib.import_module(f"configs.{name}").SLICES
    ]


def main(argv: list[str]) -> int:
    return run(lambda: _main(argv))


def _main(argv: list[str]) -> int:
    parser = Parser(prog="python -m benchmarks.fit", description=__doc__)
    parser.add_argument("--only", default="", metavar="words", help="cases whose name has them all")
    parser.add_argument("--table", action="store_true", help="write the table of what is recorded")
    parser.add_argument("--python", default=sys.executable, help="the interpreter with libtpu")
    flags = parser.parse_args(argv)
    words = [word for word in flags.only.split(",") if word]
    chosen = [case for case in cases() if all(word in " ".join(case) for word in words)]
    if not chosen:
        names = ", ".join(" ".join(case) for case in cases())
        raise UserError(f"--only={flags.only} leaves nothing of: {names}")
    failed = 0
    if not flags.table:
        with Progress(len(chosen), "steps compiled", interval=5) as progress:
            for name, topology in chosen:
                record = compile_case(flags.python, name, topology)
                failed += record is None
                if record is not None:
                    keep(record)
                progress.update()
    text = as_table(read())
    whole_file.write_text(TABLE, text)
    print(text)
    return FAILED if failed else DONE


def compile_case(python: str, name: str, topology: str) -> dict[str, Any] | None:
    """The record of one case; None after a failure, whose message is printed."""
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "fit.json"
        config = f"configs/{name}.py:slice={topology}"
        command = [python, "-m", "programs.compile_only", f"--config={config}", f"--json={file}"]
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if not file.exists():
            last = (ran.stderr.strip().splitlines() or ["no message"])[-1]
            print(f"{config}: {last}", file=sys.stderr)
            return None
        record = json.loads(file.read_text())
    return {key: value for key, value in record.items() if key not in DROPPED}


def read() -> dict[str, dict[str, Any]]:
    """Config -> its record."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def keep(record: dict[str, Any]) -> None:
    """Puts a record in the place of that of the same config."""
    records = {**read(), record["config"]: record}
    order = [f"configs/{name}.py:slice={topology}" for name, topology in cases()]
    records = {config: records[config] for config in order if config in records}
    whole_file.write_text(RESULTS, json.dumps(records, indent=1) + "\n")


def as_table(records: dict[str, dict[str, Any]]) -> str:
    """The records as a Markdown table."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" + "|--:" * (len(COLUMNS) - 1) + "|"]
    for record in records.values():
        lines.append("| " + " | ".join(row(record)) + " |")
    return "\n".join(lines) + "\n"


def row(record: dict[str, Any]) -> list[str]:
    """The cells of a record."""
    name = record["config"].removeprefix("configs/").partition(".py")[0]
    memory = record["memory"]
    module = importlib.import_module(f"configs.{name}")
    settings = {**module.SLICES.get(record["topology"], {}), **record["settings"]}
    kinds: dict[str, list[int]] = {}
    for c in record["collectives"]:
        sums = kinds.setdefault(c["kind"], [0, 0])
        sums[0] += c["bytes"]
        sums[1] += 0 if c["asynchronous"] else c["bytes"]
    estimate, mfu = record["estimate"], record["mfu"]
    by_flops, by_traffic = record["seconds_by_flops"], record["seconds_by_traffic"]
    fits = "" if record["fits"] else "**no** "
    return [
        f"{name}, {record['topology']}",
        f"{record['pairs']:,}",
        ", ".join(f"{key.rpartition('.')[2]}={value}" for key, value in settings.items()) or "-",
        f"{fits}{memory['peak'] / GiB:.1f} of {memory['limit'] / GiB:.1f}",
        f"{record['spare']:.0%}",
        f"{by_flops * 1e3:,.0f} / " + (f"{by_traffic * 1e3:,.0f}" if by_traffic else "-"),
        f"{estimate * 1e3:,.0f}" if estimate else "-",
        f"{mfu:.0%}" if mfu else "-",
        ", ".join(f"{kind} {a / 1e6:,.0f} ({b / 1e6:,.0f})" for kind, (a, b) in kinds.items()),
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
