"""Compiles the step of a config for a topology, with settings as given or with others that fit."""

import math
import resource
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO

import jax

from base.errors import UserError
from base.words import one_line
from siglip.chips import find_chip
from siglip.towers.fused_attention import work
from siglip.towers.precomputed import Precomputed
from siglip.towers.remat import REMAT
from siglip.towers.two_towers import TOWERS
from trainers.assemble import Step, abstract_batch, make_step
from trainers.config import durations
from trainers.fit import config as configs
from trainers.fit.compiled import SPARE, Memory, compile_step, memory_of
from trainers.fit.flops import equations, matmul_flops
from trainers.fit.report import Report, make_report
from trainers.machine import topology
from trainers.plan import check_batch
from trainers.setup import Setup, make_setup

Overrides = Iterable[tuple[str, str]]
EXAMPLES = 10**9  # of data that nobody has counted


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
    tell(f"tracing the step for {name}")
    setup = make_setup(config, devices)
    check_batch(config, setup.mesh)
    model_flops = _model_flops(config, devices)
    step = _step(setup)
    traced = step.trace(abstract_batch(setup), setup.mesh)
    run_flops, size = matmul_flops(traced.jaxpr.jaxpr), equations(traced.jaxpr.jaxpr)
    check_host_memory(size, devices[0].platform, scan=config.model.scan)
    lowered = traced.lower()
    begin = time.monotonic()
    tell(f"compiling for {name}, " + ("the quick way" if quick else "which can take minutes"))
    try:
        program = compile_step(lowered, devices[0], quick=quick, log=log)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"the compiler refuses the step: {one_line(error)}") from error
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
        attention=setup.model.txt.attention,
        activations=_activations(config),
        kernel_seconds=kernel_seconds(setup, config.input.batch_size // len(devices)),
        equations=size,
        host_memory=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )
    return report, text


def _activations(config: Any) -> str:
    model = config.model
    settings = [f"remat {model.remat}", "layers scanned" if model.scan else "layers unrolled"]
    settings += [f"{t}.group {model[t].group}" for t in TOWERS if model[t].group]
    if config.input.microbatch:
        settings.append(f"microbatch {config.input.microbatch:,}")
    return ", ".join(settings)


def check_host_memory(equations: int, platform: str, *, scan: bool) -> None:
    """Checks that this machine can compile a step of so many equations for TPUs.

    libtpu took 2.5 GB for 7,988 equations (B/16 under scan) and 7.0 GB for 49,841 (unrolled).

    Raises:
      UserError: it needs more than is free.
    """
    need, free = 1.5e9 + 1.2e5 * equations, _free_memory()
    if platform == "tpu" and free and need > free:
        less = "end other programs" if scan else "pass --config.model.scan=True, which needs less"
        raise UserError(
            f"compiling this step takes about {need / 1e9:.0f} GB of memory, {free / 1e9:.0f} GB "
            f"are free here; {less}"
        )


def _free_memory() -> int:
    """Bytes; 0 where the system does not say."""
    try:
        with open("/proc/meminfo") as lines:
            return next(int(s.split()[1]) * 1024 for s in lines if s.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 0


def kernel_seconds(setup: Setup, pairs: int) -> float:
    """Lower bound of the time of the fused attention of a step on a TPU, counted by hand, forward
    and backward once; 0 where there is none. XLA's estimate knows nothing of it."""
    chip, model = find_chip(setup.mesh.devices.flat[0]), setup.model
    if chip is None or model.txt.attention != "fused":
        return 0.0
    texts = jax.ShapeDtypeStruct((1, setup.config.input.token_len), "int32")
    image, _ = setup.inputs
    towers = {"encode_image": (model.img, image), "encode_text": (model.txt, texts)}
    seconds = 0.0
    for method, (tower, inputs) in towers.items():
        if isinstance(tower, Precomputed):
            continue
        params = setup.abstract_towers()
        _, out = jax.eval_shape(
            lambda p, x, method=method: model.apply({"params": p}, x, method=method), params, inputs
        )
        tokens, heads = out["tokens"].shape[1], tower.num_heads
        done = work(chip, pairs, tokens, heads, tower.width // heads, cores=chip.cores)
        seconds += tower.depth * done.seconds
    return seconds


def _step(setup: Setup) -> Step:
    config = setup.config
    total = durations.to_steps(
        config.total,
        batch_size=config.input.batch_size,
        examples_per_epoch=EXAMPLES,
        total_steps=None,
        key="config.total",
    )
    return make_step(setup, total_steps=total or 1, examples_per_epoch=EXAMPLES)


def _model_flops(config: Any, devices: Any) -> int:
    """Matmul FLOPs of a step that computes nothing twice, over all devices."""
    plain = config.copy_and_resolve_references()
    with plain.unlocked():
        plain.model.remat, plain.model.scan, plain.input.microbatch = "none", True, 0
        plain.model.attention = "xla"
    setup = make_setup(plain, devices)
    step = _step(setup)
    return matmul_flops(step.trace(abstract_batch(setup), setup.mesh).jaxpr.jaxpr)


def fit(
    config_flag: str,
    overrides: Overrides,
    name: str,
    *,
    log: BinaryIO | None = None,
    tell: Callable[..., None] = print,
) -> tuple[Report, str | None]:
    """The first report with SPARE memory left, of the settings that `candidates` proposes; if there
    is none, that of the settings that need least."""
    overrides, best = list(overrides), None
    config, _ = configs.load(config_flag, overrides)
    given = dict(overrides)
    for settings in candidates(config, topology.find_devices(name)):
        trial = {**given, **settings}
        shown = " ".join(f"--config.{key}={value}" for key, value in settings.items())
        report, text = try_settings(
            config_flag, trial.items(), name, quick=True, log=log, tell=tell
        )
        tell(f"{shown or 'as it is'}: {report.memory}", stays=True)
        if best is None or report.memory.peak < best[0].memory.peak:
            best = report, text
        if report.memory.fits and report.memory.spare >= SPARE:
            return report, text
    assert best is not None  # the settings as they are were tried
    return best


def candidates(config: Any, devices: list[Any]) -> Iterator[dict[str, str]]:
    """Settings to try, from those that cost no time to those that cost most.

    1. As it is. 2. `fsdp`, if state fills more than a quarter of the memory: until it fills less.
    3. `remat`, which computes up to a quarter of a step again. 4. `microbatch`, which adds a
    forward pass; halved until a device has one pair.
    """
    yield {}
    chip, count, settings = find_chip(devices[0]), len(devices), {}
    now = make_setup(config, devices).mesh.shape["fsdp"]
    most = (chip.memory if chip else math.inf) / 4
    for fsdp in (f for f in range(now, count + 1) if count % f == 0):
        split = config.copy_and_resolve_references()
        with split.unlocked():
            split.mesh.data, split.mesh.fsdp = -1, fsdp
        if fsdp > now:
            settings = {"mesh.data": "-1", "mesh.fsdp": str(fsdp)}
        if state_bytes(_step(make_setup(split, devices)).state) <= most:
            break
    if settings:
        yield settings
    heavier = REMAT[REMAT.index(config.model.remat) + 1 :]
    for remat in heavier:
        settings = {**settings, "model.remat": remat}
        yield settings
    pairs = config.input.microbatch or config.input.batch_size
    while pairs % (2 * count) == 0:
        pairs //= 2
        n = pairs // count
        if all(g == 0 or g >= n or n % g == 0 for g in (config.model[t].group for t in TOWERS)):
            yield {**settings, "input.microbatch": str(pairs)}


def state_bytes(state: Any) -> int:
    """Bytes of the state on one device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(state)
    )
