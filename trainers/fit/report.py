"""What a compiled step tells about itself: numbers as JSON, and a page for people."""

import collections
import dataclasses
import pathlib
import re
from typing import Any

from siglip.chips import GiB, find_chip
from trainers.fit.compiled import Memory
from trainers.fit.hlo import Instruction, Program, Run, array_bytes, elements

ROOT = str(pathlib.Path(__file__).resolve().parents[2])
COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "collective-permute",
    "all-to-all",
    "ragged-all-to-all",
    "collective-broadcast",
)
WORKING = ("fusion", "convolution", "dot", "custom-call", "while", "conditional", "call")
LARGEST = 10


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind that wait in the same way, on one device in one step.

    Attributes:
      count: how many are run.
      bytes: what each device contributes, of a gather what it receives; all together.
      asynchronous: other work stands between their start and their end.
      in_loop: whether they are run inside a loop, such as that over layers or round the ring.
    """

    kind: str
    count: int
    bytes: int
    asynchronous: bool
    in_loop: bool


@dataclasses.dataclass(frozen=True)
class Operation:
    """Instructions of one line of our code, layers together.

    Attributes:
      place: 'siglip/towers/vit.py:120', or ''.
      count: how often they are run in a step.
    """

    place: str
    what: str
    count: int
    bytes: int
    cycles: int


@dataclasses.dataclass(frozen=True)
class Report:
    """All numbers of a compiled step; of one device unless they say otherwise.

    Attributes:
      pairs: of the batch, on one device.
      model_flops: of a step without recomputation. run_flops: with it.
      traffic: bytes to and from the device's memory.
      seconds_by_flops, seconds_by_traffic: lower bounds of a step; None for unknown chips.
      estimate: seconds of XLA's cycles; None where it has none, and after a quick compilation.
      pallas: runs of kernels that the estimate leaves out; kernel_seconds: a lower bound of their
        time, counted by hand.
      attention: the implementation, see siglip.towers.attention.
      activations: the settings that decide what of them is in memory.
      equations: of the traced step. host_memory: bytes that compiling it took here, at most.
    """

    config: str
    settings: dict[str, str]
    topology: str
    devices: int
    device_kind: str
    mesh: dict[str, int]
    pairs: int
    quick: bool
    memory: Memory
    model_flops: int
    run_flops: int
    traffic: int = 0
    seconds_by_flops: float | None = None
    seconds_by_traffic: float | None = None
    estimate: float | None = None
    mfu: float | None = None
    pallas: int = 0
    kernel_seconds: float = 0.0
    attention: str = ""
    activations: str = ""
    unknown_loops: int = 0
    collectives: tuple[Collective, ...] = ()
    by_bytes: tuple[Operation, ...] = ()
    by_cycles: tuple[Operation, ...] = ()
    compile_seconds: float = 0.0
    equations: int = 0
    host_memory: int = 0

    def as_json(self) -> dict[str, Any]:
        own = {"fits": self.memory.fits, "spare": round(self.memory.spare, 4)}
        return own | dataclasses.asdict(self)


def make_report(text: str | None, device: Any, **known: Any) -> Report:
    """The report on a program's text; without one, as of a program that does not fit, its memory
    and FLOPs. `known`: what the text does not say."""
    chip, model_flops = find_chip(device), known["model_flops"]
    by_flops = model_flops / chip.flops if chip else None
    if text is None:
        return Report(seconds_by_flops=by_flops, **known)
    program = Program(text)
    runs = list(program.runs())
    operations = _operations(program, runs)
    traffic = sum(operation.bytes for operation in operations)
    cycles = sum(operation.cycles for operation in operations)
    estimate = (
        cycles / chip.clock if chip and chip.clock and cycles and not known["quick"] else None
    )
    return Report(
        traffic=traffic,
        seconds_by_flops=by_flops,
        seconds_by_traffic=traffic / chip.bandwidth if chip else None,
        estimate=estimate,
        mfu=by_flops / estimate if by_flops and estimate else None,
        pallas=sum(run.times for run in runs if "tpu_custom_call" in run.instruction.rest),
        unknown_loops=len(program.unknown_loops),
        collectives=collectives(program, runs),
        by_bytes=_largest(operations, "bytes"),
        by_cycles=() if known["quick"] else _largest(operations, "cycles"),
        **known,
    )


def collectives(program: Program, runs: list[Run]) -> tuple[Collective, ...]:
    """The collectives of a step, summed up by kind, place and manner of waiting."""
    counts: dict[tuple, list[int]] = collections.defaultdict(lambda: [0, 0])
    for run in runs:
        instruction = run.instruction
        kind, asynchronous = _collective(program, instruction)
        if kind is None:
            continue
        if instruction.opcode.endswith("-start"):
            after = program.computations[run.computation]
            asynchronous = _works_before_done(after, instruction)
        sums = counts[kind, asynchronous, bool(run.loops)]
        sums[0] += run.times
        sums[1] += run.times * _payload(program, run, kind)
    return tuple(
        Collective(kind, count, size, asynchronous, in_loop)
        for (kind, asynchronous, in_loop), (count, size) in sorted(counts.items())
    )


def _collective(program: Program, instruction: Instruction) -> tuple[str | None, bool]:
    """(kind of a collective, whether it is made part by part in other operations).

    (None, False) for all else, and for what continues or ends a collective. TPUs have two forms of
    their own: a fusion that starts one whose parts later fusions make, and a fusion that is a
    reduce-scatter and looks like an all-reduce.
    """
    opcode, called = instruction.opcode, instruction.called("calls") or ""
    if opcode.removesuffix("-start") in COLLECTIVES:
        return opcode.removesuffix("-start"), False
    if opcode in ("async-start", "fusion"):
        inside = program.computations.get(called, ())
        inner = next((i.opcode for i in inside if i.opcode in COLLECTIVES), None)
        if called.startswith("all-reduce-scatter"):
            return "reduce-scatter", False
        if any("AsyncCollectiveStart" in i.rest for i in inside):
            return inner, True
        if opcode == "async-start":
            return inner, False
    return None, False


def _works_before_done(computation: list[Instruction], start: Instruction) -> bool:
    """Whether the device has other work between the start and the end of a collective."""
    place = computation.index(start)
    for instruction in computation[place + 1 :]:
        if start.name in instruction.operands and instruction.opcode.endswith("-done"):
            return False
        if instruction.opcode in WORKING:
            return True
    return False


def _payload(program: Program, run: Run, kind: str) -> int:
    instruction = run.instruction
    around = {i.name: i for i in program.computations[run.computation]}
    if kind == "all-gather":
        whole = instruction.shape
        if instruction.opcode != "all-gather":  # where it starts: (operands, results, ...)
            whole = elements(whole)[1]
        return array_bytes(whole, in_vmem=True)
    shapes = [around[name].shape for name in instruction.operands if name in around]
    return sum(array_bytes(shape, in_vmem=True) for shape in shapes)


def _operations(program: Program, runs: list[Run]) -> list[Operation]:
    sums: dict[tuple[str, str], list[int]] = collections.defaultdict(lambda: [0, 0, 0])
    for run in runs:
        size, cycles = program.traffic(run), run.instruction.cycles
        if size or cycles:
            key = program.place(run.instruction, ROOT), what(run.instruction.op_name)
            for i, more in enumerate((1, size, cycles)):
                sums[key][i] += more * run.times
    return [Operation(*key, *values) for key, values in sums.items()]


def _largest(operations: list[Operation], by: str) -> tuple[Operation, ...]:
    ordered = sorted(operations, key=lambda operation: -getattr(operation, by))
    return tuple(o for o in ordered[:LARGEST] if getattr(o, by))


def what(op_name: str) -> str:
    """A short name of an operation: 'jit(update)/transpose(jvp(TwoTowers.encode_image))/img/
    Transformer/encoderblock_3/MlpBlock_0/Dense_0/dot_general' -> 'backward img MlpBlock_0 Dense_0
    dot_general', where layers are not told apart."""
    backward = "transpose(" in op_name
    again = "rematted_computation" in op_name
    parts = [part for part in op_name.split("/") if not re.match(r"(jit|jvp|transpose)\(", part)]
    dull = r"(while|body|closed_call|checkpoint|rematted_computation|shard_map|cond|branch_.*)"
    parts = [part for part in parts if not re.fullmatch(dull, part)]
    parts = [p for p in parts if not re.fullmatch(r"(Transformer|Encoder_0|TwoTowers\.\w+)", p)]
    parts = [part for part in parts if not re.fullmatch(r"encoderblock(_\d+)?", part)]
    parts = [part.replace("MultiHeadDotProductAttention_0", "attention") for part in parts]
    when = "again" if again else "backward" if backward else ""
    return " ".join(filter(None, (when, *parts)))


# The page


def page(report: Report) -> str:
    """The report for people."""
    memory, mesh = report.memory, ", ".join(f"{k}={v}" for k, v in report.mesh.items())
    settings = " ".join(f"--config.{key}={value}" for key, value in report.settings.items())
    lines = [
        f"{report.config} {settings}".rstrip(),
        f"  on {report.topology}: {report.devices} x {report.device_kind}, mesh {mesh}; "
        f"{report.pairs:,} pairs a device",
        f"  attention {report.attention}, {report.activations}",
        f"  fits: {'yes' if memory.fits else 'NO'}, {memory}"
        + ("" if memory.fits else _excess(memory)),
    ]
    if memory.arguments:
        lines.append(f"  of it state and batch: {memory.arguments / GiB:.2f} GiB")
    more = report.run_flops / report.model_flops if report.model_flops else 1
    again = f", {more:.2f} x with what is computed again" if more > 1.005 else ""
    lines.append(f"  matmuls: {report.model_flops / 1e12:.1f} TFLOP a device and step{again}")
    if report.traffic:
        lines.append(f"  memory traffic: {report.traffic / 1e9:,.0f} GB a device and step")
    if report.seconds_by_flops is not None:
        bounds = f"{report.seconds_by_flops * 1e3:,.0f} ms by FLOPs"
        if report.seconds_by_traffic is not None:
            bounds += f", {report.seconds_by_traffic * 1e3:,.0f} ms by traffic"
        lines.append(f"  a step takes at least {bounds}")
    if report.estimate is not None:
        lines.append(
            f"  {report.estimate * 1e3:,.0f} ms a step, MFU {report.mfu:.1%}, "
            f"{report.pairs / report.estimate:,.0f} pairs/s a device "
            "(estimate, no wire time, no Pallas time)"
        )
    if report.pallas:
        lines.append(
            f"  {report.pallas} runs of Pallas kernels, which the estimate leaves out: attention "
            f"at least {report.kernel_seconds * 1e3:,.0f} ms, counted by hand"
        )
    if report.quick and memory.fits and report.traffic:
        lines.append("  compiled the quick way: memory up to a tenth too high, no estimate of time")
    if report.unknown_loops:
        lines.append(f"  {report.unknown_loops} loops of unknown length count once")
    if report.collectives:
        lines += ["", "collectives, on each device in a step:"]
    for c in report.collectives:
        waits = "beside other work" if c.asynchronous else "blocking"
        where = "in a loop" if c.in_loop else "outside of loops"
        lines.append(f"  {c.kind:<20} {c.count:>6} x, {c.bytes / 1e6:>9,.1f} MB  {waits}, {where}")
    for title, operations, unit in (
        ("largest operations by XLA's cycles:", report.by_cycles, "cycles"),
        ("largest operations by bytes:", report.by_bytes, "bytes"),
    ):
        if operations:
            lines += ["", title]
        for o in operations:
            amount = f"{o.bytes / 1e9:,.1f} GB" if unit == "bytes" else f"{o.cycles / 1e6:,.0f} M"
            lines.append(f"  {amount:>10}  {o.count:>5} x  {o.place or '-'}  {o.what}")
    if not memory.fits:
        lines += ["", "the same command with --fit tries settings until one fits"]
    if memory.largest:
        lines += ["", "what takes the memory:"]
        lines += [f"  {size / GiB:>6.2f} GiB  {shape}" for size, shape in memory.largest]
    return "\n".join(lines)


def _excess(memory: Memory) -> str:
    return f": {(memory.peak - memory.limit) / GiB:.1f} GiB too much" if memory.peak else ""
