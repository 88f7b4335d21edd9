"""Compiles the step of a config for a topology, with settings as given or with others that fit."""

import time
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO

import jax

from base.errors import UserError
from base.words import duration
from siglip.chips import GiB
from trainers.assemble import abstract_batch, make_step
from trainers.fit import compiled as compiling
from trainers.fit import config as configs
from trainers.fit.compiled import SPARE, Memory, compile_step, memory_of
from trainers.fit.flops import matmul_flops
from trainers.fit.report import Report, make_report
from trainers.machine import topology
from trainers.plan import check_batch
from trainers.setup import make_setup

Overrides = Iterable[tuple[str, str]]
STEPS, EXAMPLES = 100_000, 10**9  # of a run whose data nobody has counted


def try_settings(
    config_flag: str,
    overrides: Overrides,
    name: str,
    *,
    quick: bool = False,
    log: BinaryIO | None = None,
    tell: Callable[..., None] = print,
) -> tuple[Report, str | None]:
    """The report on the step of a config on a topology, and the compiled program's text (None
    where it does not fit).

    Args:
      overrides: settings, (key, text) each. quick, log: see compile_step.
      tell: called with what is being done.

    Raises:
      UserError: the config is invalid, or does not fit the topology's devices.
    """
    overrides = list(overrides)
    config, notes = configs.load(config_flag, overrides)
    for note in notes:
        tell(f"note: {note}", stays=True)
    devices = topology.find_devices(name)
    jax.config.update("jax_enable_compilation_cache", False)  # programs for others cannot be read
    tell(f"tracing the step for {name}")
    setup = make_setup(config, devices)
    check_batch(config, setup.mesh)
    model_flops = _model_flops(config, devices)
    step = make_step(setup, total_steps=STEPS, examples_per_epoch=EXAMPLES)
    traced = step.trace(abstract_batch(setup), setup.mesh)
    run_flops = matmul_flops(traced.jaxpr.jaxpr)
    lowered = traced.lower()
    begin = time.monotonic()
    tell(f"compiling for {name}, " + ("the quick way" if quick else "which can take minutes"))
    program = compile_step(lowered, devices[0], quick=quick, log=log)
    fits = not isinstance(program, Memory)
    text = program.as_text() if fits else None
    report = make_report(
        text,
        devices[0],
        config=config_flag,
        settings=dict(overrides),
        topology=name,
        devices=len(devices),
        device_kind=devices[0].device_kind,
        mesh=dict(setup.mesh.shape),
        pairs=config.input.batch_size // len(devices),
        quick=quick and devices[0].platform == "tpu",
        memory=memory_of(program, devices[0]) if fits else program,
        model_flops=model_flops // len(devices),
        run_flops=run_flops // len(devices),
        compile_seconds=round(time.monotonic() - begin, 1),
    )
    return report, text


def _model_flops(config: Any, devices: Any) -> int:
    """Matmul FLOPs of a step that computes nothing twice, over all devices."""
    plain = config.copy_and_resolve_references()
    with plain.unlocked():
        plain.model.remat, plain.model.scan, plain.input.microbatch = "none", True, 0
    setup = make_setup(plain, devices)
    step = make_step(setup, total_steps=STEPS, examples_per_epoch=EXAMPLES)
    return matmul_flops(step.trace(abstract_batch(setup), setup.mesh).jaxpr.jaxpr)
