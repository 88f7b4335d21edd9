"""Command lines of all programs: the parser, the exit codes, and errors as one line on stderr."""

import argparse
import os
import re
import select
import sys
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from base.errors import UserError
from base.words import one_line

DONE, FAILED, MISTAKE, INTERRUPTED, DIVERGED = 0, 1, 2, 85, 87
AGAIN = "run the same command again to go on"


class Parser(argparse.ArgumentParser):
    """argparse with UserError for what it cannot parse, and help texts as they are written."""

    def __init__(self, **options: Any):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(formatter_class=formatter, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def run(
    main: Callable[[], int | None],
    *,
    mistakes: tuple[type[Exception], ...] = (),
    failures: tuple[type[Exception], ...] = (),
    interrupted: str = f"interrupted; {AGAIN}",
) -> int:
    """The exit code of a program; what main() returns, or DONE for None.

    Args:
      mistakes: exceptions that are the user's mistake in this program, beside UserError.
      failures: exceptions after which the same command can go on, such as OSError of a full disk.
      interrupted: the line after Ctrl-C.
    """
    try:
        code = main() or DONE
        sys.stdout.flush()  # here, so that a reader that has gone is noticed before the end
        return code
    except KeyboardInterrupt:
        return report(INTERRUPTED, interrupted)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_has_gone():
            return report(FAILED, "error: the reader of the output has gone, as after `| head`")
        if isinstance(error, (UserError, *mistakes)):
            return report(MISTAKE, f"error: {error}")
        if isinstance(error, failures):
            return report(FAILED, f"error: {one_line(error)}; {AGAIN}")
        raise


def report(code: int, line: str) -> int:
    """Prints the line to stderr and returns the code."""
    print(line, file=sys.stderr, flush=True)
    return code


def _reader_has_gone() -> bool:
    """Whether stdout is a pipe that nobody reads. If so it becomes /dev/null: Python flushes it at
    exit, and would end with a traceback there."""
    try:
        stdout = sys.stdout.fileno()
    except (OSError, ValueError):  # replaced by something that is no file
        return False
    poll = select.poll()
    poll.register(stdout, 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), stdout)
    return True


def split_overrides(argv: Iterable[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Splits a command line into config overrides, (key, text) in order, and all other arguments.

    Understands --config.a.b=v, --config.a.b v, --config.flag and --noconfig.flag.
    """
    overrides, rest, argv = [], [], list(argv)
    while argv:
        arg = argv.pop(0)
        match = re.match(r"--?(no)?config\.([^=]*)(=.*)?$", arg, re.DOTALL)
        if not match:
            rest.append(arg)
            continue
        no, key, value = match.groups()
        if value is not None:
            value = value[1:]
        elif no:
            value = "false"
        elif argv and re.match(r"[^-]|-[\d.]|$", argv[0]):  # -10 is a value, --workdir is not
            value = argv.pop(0)
        else:
            value = "true"
        overrides.append((key, value))
    return overrides, rest
