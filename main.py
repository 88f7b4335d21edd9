"""Trains a model, or evaluates it, as a config file says: see --help."""

import argparse
import os
import pathlib
import re
import signal
import sys
import traceback
from typing import Any, NoReturn

from base.command_line import (
    AGAIN,
    DIVERGED,
    DONE,
    FAILED,
    INTERRUPTED,
    MISTAKE,
    Parser,
    report,
    run,
    split_overrides,
)
from base.errors import UserError
from base.words import nearest

HELP = """\
Trains a SigLIP model and evaluates it, as a config file says.

  python main.py --config configs/quickstart.py --workdir runs/quickstart
  python main.py --workdir runs/quickstart --eval_only

Stopped by Ctrl-C, SIGTERM or a power cut? Run the same command again: it goes on where it was.
"""

EPILOG = """\
settings:
  --config.input.batch_size=512 --config.lr=3e-4              replace any setting of the config
  --config configs/siglip_b16.py:runlocal,res=64              arguments of the config file

exit codes: 0 done, 1 failed, 2 a mistake in command, config or data, 85 interrupted (run the same
command again), 87 diverged.
"""


def make_parser() -> Parser:
    parser = Parser(
        description=HELP,
        epilog=EPILOG,
        usage="python main.py --config path.py[:arguments] --workdir path [--config.x.y=value ...]",
    )
    add = parser.add_argument
    add("--config", metavar="path.py", help="config file; with --eval_only that of the workdir")
    add("--workdir", metavar="path", help="folder of the run: checkpoints, logs, results")
    add("--eval_only", action="store_true", help="evaluate the workdir's newest checkpoint")
    add("--show_config", action="store_true", help="print the complete config and do nothing else")
    group = parser.add_argument_group("several processes (detected in SLURM and in TPU pods)")
    add = group.add_argument
    add(
        "--coordinator_address",
        metavar="host:port",
        help="of process 0, or JAX_COORDINATOR_ADDRESS",
    )
    add("--num_processes", metavar="n", type=int, help="how many, or JAX_NUM_PROCESSES")
    add("--process_id", metavar="i", type=int, help="which one this is, or JAX_PROCESS_ID")
    add("--distributed", choices=("auto", "off"), default="auto", help="off: this process alone")
    add(
        "--heartbeat_timeout",
        metavar="s",
        type=int,
        default=100,
        help="seconds until a silent process counts as dead and the others stop (100)",
    )
    return parser


def main(argv: list[str]) -> int:
    """Trains or evaluates as the command line says; returns the exit code."""
    return run(lambda: _main(argv))


def _main(argv: list[str]) -> int:
    parser = make_parser()
    flags, rest = parser.parse_known_args(argv)
    check_flags(parser, flags, rest)
    if flags.show_config:
        return show_config(flags, rest)
    # Imports of jax and trainers take seconds, so they stand where they are first needed.
    from trainers.machine import distributed

    config, decision = prepare(flags, rest)
    distributed.start(decision, heartbeat_timeout=flags.heartbeat_timeout)

    import jax

    import trainers
    from trainers.health import Diverged
    from trainers.machine.host_memory import keep_freed_memory
    from trainers.machine.preemption import Interrupted
    from trainers.state.checkpointing import SaveError

    keep_freed_memory()
    try:
        (trainers.evaluate if flags.eval_only else trainers.train)(config, flags.workdir)
    except UserError as mistake:
        return distributed.leave(decision, report(MISTAKE, f"error: {mistake}"))
    except SaveError as failure:  # such as a full disk: only the last save is lost
        return distributed.leave(decision, report(FAILED, f"error: {failure}"))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return distributed.leave(decision, report(FAILED, f"error: {out_of_memory(config, error)}"))
    except Interrupted as stop:
        return report(INTERRUPTED, f"{stop}; {AGAIN}")
    except Diverged as end:
        return report(DIVERGED, f"diverged: {end}")
    except Exception:
        if decision.join:
            traceback.print_exc()
            distributed.leave(decision, FAILED)
        raise
    return DONE


def check_flags(parser: Parser, flags: argparse.Namespace, rest: list[str]) -> None:
    """Raises UserError for flags that make no command together."""
    known = [option for action in parser._actions for option in action.option_strings]
    for arg in rest:
        if re.match(r"-+[a-zA-Z]", arg) and not re.match(r"--?(no)?config\.", arg):
            flag = arg.partition("=")[0]
            raise UserError(f"unknown flag {flag}; {nearest(flag, known[2:])}")
    if not flags.config and not flags.eval_only and not (flags.show_config and flags.workdir):
        configs = sorted(map(str, pathlib.Path("configs").glob("[!_]*.py")))
        raise UserError(f"pass --config, one of {', '.join(configs) or 'your files'}; see --help")
    if "://" in (flags.workdir or ""):
        raise UserError(f"--workdir={flags.workdir} is no folder; mount the bucket")
    if not flags.workdir and not flags.show_config:
        stem = pathlib.Path((flags.config or "my_run").partition(":")[0]).stem
        raise UserError(f"pass --workdir, the folder of the run, such as --workdir runs/{stem}")


def show_config(flags: argparse.Namespace, rest: list[str]) -> int:
    """Prints every key of the config with its type, where its value comes from, and its meaning."""
    from trainers.config import complete, explain, stored

    overrides, rest = split_overrides(rest)
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}; settings are --config.key=value")
    tree = (
        complete.load_settings(flags.config, overrides)
        if flags.config
        else stored.read_settings(flags.workdir, overrides)
    )
    print("\n".join(explain.lines(tree)))
    return DONE


def prepare(flags: argparse.Namespace, rest: list[str]) -> tuple[Any, Any]:
    """The complete config and the decision about other processes, before jax starts a backend.

    Raises:
      UserError: the config is invalid, or the workdir holds a run of another one.
    """
    import jax

    from trainers.config import complete, stored
    from trainers.machine import compilation, distributed

    overrides, rest = split_overrides(rest)
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}; settings are --config.key=value")
    config: Any = (
        complete.load(flags.config, overrides)
        if flags.config
        else stored.read(flags.workdir, overrides)
    )
    stored.check_workdir(config, flags.workdir)
    decision = distributed.decide(
        os.environ,
        mode=flags.distributed,
        coordinator_address=flags.coordinator_address,
        num_processes=flags.num_processes,
        process_id=flags.process_id,
    )
    if config.mesh.cpu_devices:
        jax.config.update("jax_num_cpu_devices", config.mesh.cpu_devices)
    compilation.set_flags(
        os.environ, cpu_devices=config.mesh.cpu_devices, nvidia=compilation.NVIDIA.exists()
    )
    if not decision.join:  # several would all have to find the same programs, or none
        compilation.keep_programs(os.environ)
    return config, decision


def out_of_memory(config: Any, error: Exception) -> str:
    """The error line for a device that ran out of memory, with what to change."""
    from trainers.fit.compiled import shortage

    size = shortage(str(error))
    batch = config.input.batch_size
    again = "" if config.model.remat == "full" else "--config.model.remat=full or "
    return (
        f"the device has no memory for this{size}; {again}"
        f"--config.input.microbatch={max(1, batch // 8)} (embeds fewer of the {batch} pairs at a "
        "time) need less and change no result; so do a smaller input.batch_size, "
        f"input.res={config.input.res} or model. python -m programs.compile_only --fit finds "
        "settings that fit"
    )


def interrupt(signum: int, frame: Any) -> NoReturn:
    """The signal handler for all but the training loop: raises KeyboardInterrupt.

    Python drops an exception that is raised in a callback, such as the garbage collector's. Then
    the training loop sees `asked` and stops at its first step.
    """
    interrupt.asked = True
    raise KeyboardInterrupt


if __name__ == "__main__":
    # Where nobody saves on SIGTERM (imports, set-up, evaluation), it ends the run as Ctrl-C does.
    # JAX's own notifier of several processes is installed later, and so replaces this.
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, interrupt)
    sys.exit(main(sys.argv[1:]))
