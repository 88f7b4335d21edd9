"""Bytes that a compiled step moves between devices, and those of its parameters."""

import collections
import re

import jax

from siglip.sharding import params_sharding
from trainers.fit.hlo import Program, array_bytes


def traffic(text: str, devices: int) -> collections.Counter:
    """(kind, devices that take part, in a loop over layers or parts) -> bytes of one device."""
    sums = collections.Counter()
    for run in (program := Program(text)).runs():
        i, kind = run.instruction, run.instruction.opcode.removesuffix("-start")
        if kind in ("all-gather", "reduce-scatter", "all-reduce"):
            first = re.search(r"replica_groups=(?:\{\{([\d,]+)\}|\[\d+,(\d+)\])", i.rest)
            size = devices  # where no groups are named
            if first:
                size = int(first[2]) if first[2] else first[1].count(",") + 1
            by_name = {other.name: other for other in program.computations[run.computation]}
            shapes = [i.shape] if kind == "all-gather" else [by_name[n].shape for n in i.operands]
            moved = sum(array_bytes(shape, in_vmem=True) for shape in shapes)
            sums[kind, size, bool(run.loops)] += run.times * moved
    assert not program.unknown_loops
    return sums


def sizes(params, mesh) -> tuple[int, int, int]:
    """Bytes of parameters: split and in blocks, split and elsewhere, not split."""
    sums = collections.Counter()
    place = params_sharding(params, mesh)
    for (path, x), s in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(place)):
        name = jax.tree_util.keystr(path)
        where = "whole" if s.is_fully_replicated else "block" if "encoderblock" in name else "rest"
        sums[where] += x.size * x.dtype.itemsize
    return sums["block"], sums["rest"], sums["whole"]
