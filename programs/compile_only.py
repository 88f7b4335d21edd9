"""Compiles the step of a config for machines that are not here, and says what it needs: see --help.

The pieces are in trainers/fit; this is the command.
"""

import json
import os
import pathlib
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from base import whole_file
from base.command_line import DONE, FAILED, Parser, run, split_overrides
from base.errors import UserError
from base.progress import StatusLine
from base.words import duration
from trainers.machine import topology

HELP = """\
Compiles the training step of a config for devices that need not be here, and prints whether it
fits, its memory, traffic, collectives and largest operations, and XLA's estimate of its time.

  python -m programs.compile_only --config configs/siglip_b16.py --topology v4:4x4x2 --quick
  python -m programs.compile_only --config configs/siglip_b16.py --topology v5e:16x16 --fit
  python -m programs.compile_only --config configs/pairs.py --topology h200:1x1x8

No accelerator, no data and no tokenizer file is needed. A compiler is:
  TPUs          pip install -r requirements-tpu.txt
  NVIDIA GPUs   pip install -r requirements-cuda.txt
"""

EPILOG = """\
topologies:
  v4:4x4x2, v5p:4x4x4, tpu7x:2x2x2   chips along three axes (a TPU7x chip is two devices)
  v5e:16x16, v6e:8x8                 chips along two axes
  h200:1x1x8, h100:1x4x8, a100:...   slices x hosts x cards
  cpu:8                              emulated devices

exit codes: 0 it fits, 1 it does not, 2 a mistake in command or config, 85 interrupted.
"""


def main(argv: list[str]) -> int:
    """Compiles as the command line says; returns the exit code."""
    return run(lambda: _main(argv), interrupted="interrupted; nothing of it is kept")


def make_parser() -> Parser:
    parser = Parser(
        prog="python -m programs.compile_only",
        description=HELP,
        epilog=EPILOG,
        usage="python -m programs.compile_only --config path.py[:arguments] --topology KIND:LAYOUT "
        "[--config.x.y=value ...]",
    )
    add = parser.add_argument
    add("--config", metavar="path.py", help="config file")
    add("--topology", metavar="KIND:LAYOUT", help="the machine; default the config's slice=...")
    add("--quick", action="store_true", help="minutes less, but no estimate of time (TPUs)")
    add("--fit", action="store_true", help="try settings until one fits, each the quick way")
    add("--json", metavar="file", help="write all numbers there too")
    add("--hlo", metavar="file", help="write the compiled program there, as text")
    return parser


def _main(argv: list[str]) -> int:
    flags, rest = make_parser().parse_known_args(argv)
    overrides, rest = split_overrides(rest)
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}; settings are --config.key=value")
    if not flags.config:
        raise UserError("pass --config, such as --config configs/siglip_b16.py; see --help")
    name = flags.topology or slice_of(flags.config)
    if not name:
        raise UserError(f"pass --topology, such as {', '.join(topology.EXAMPLES)}; see --help")
    for flag, file in (("json", flags.json), ("hlo", flags.hlo)):
        folder = pathlib.Path(file or ".").absolute().parent
        if not os.access(folder, os.W_OK):
            raise UserError(f"--{flag}={file}: {folder} is not a folder to write to")
    # Before jax is imported.
    topology.prepare(os.environ)
    from trainers.fit import compiled, trial

    with compiled.buffers_reported(os.environ) as log, progress() as line:
        if flags.fit:
            report, text = trial.fit(flags.config, overrides, name, log=log, tell=line)
        else:
            report, text = trial.try_settings(
                flags.config, overrides, name, quick=flags.quick, log=log, tell=line
            )
    from trainers.fit.report import page

    print(page(report), flush=True)
    if flags.json:
        record = json.dumps(report.as_json(), indent=1)
        whole_file.write_text(pathlib.Path(flags.json), record + "\n")
    if flags.hlo and text:
        whole_file.write_text(pathlib.Path(flags.hlo), text)
    return DONE if report.memory.fits else FAILED


def slice_of(config_flag: str) -> str:
    """The topology that the arguments of a config name: 'v4:4x4x2' of 'x.py:slice=v4:4x4x2'."""
    from trainers.config.file import split_list

    _, _, arguments = config_flag.partition(".py:")
    pairs = (argument.partition("=") for argument in split_list(arguments))
    return next((value.strip("'\"") for name, _, value in pairs if name.strip() == "slice"), "")


@contextmanager
def progress() -> Iterator[Any]:
    """tell(text): shows what is being done and for how long, on stderr, until the next text."""
    line, done, state = StatusLine(sys.stderr, keep=False), threading.Event(), ["", 0.0]

    def show() -> None:
        if state[0]:
            line.show(f"{state[0]} ({duration(time.monotonic() - state[1])})")

    def tick() -> None:
        while not done.wait(0.5 if line.live else 30):
            show()

    def tell(text: str, *, stays: bool = False) -> None:
        if stays:
            line.note(text)
        else:
            state[:] = text, time.monotonic()
            show()

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield tell
    finally:
        done.set()
        thread.join()
        line.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
