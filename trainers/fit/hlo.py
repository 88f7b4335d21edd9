"""Reads the text of a compiled program (HLO): instructions, loops and how often each one runs.

XLA offers no other way to see what a program for a machine that is not here does. Only what the
reports need is read, and whatever has another form than expected is left out, never guessed.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8} | {
    f"{sign}{bits}": max(1, bits // 8) for sign in "su" for bits in (2, 4, 8, 16, 32, 64)
}
SMALL = 4096
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_NAME = re.compile(r"%([\w.-]+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      shape: its type as text, layouts included.
      operands: names of instructions.
      rest: the text behind the operands.
    """

    name: str
    opcode: str
    shape: str
    operands: tuple[str, ...]
    rest: str

    def called(self, key: str) -> str | None:
        """The computation that an attribute names: 'calls', 'body', 'condition'."""
        match = re.search(rf"\b{key}=%([\w.-]+)", self.rest)
        return match[1] if match else None

    @property
    def branches(self) -> list[str]:
        """The computations of a conditional."""
        if match := re.search(r"branch_computations=\{([^}]*)\}", self.rest):
            return _NAME.findall(match[1])
        found = (self.called(f"{which}_computation") for which in ("true", "false"))
        return [name for name in found if name]

    @property
    def rest_number(self) -> str:
        """What stands in the brackets of a parameter or a constant."""
        return self.rest.partition(")")[0]

    @property
    def op_name(self) -> str:
        match = re.search(r'op_name="([^"]*)"', self.rest)
        return match[1] if match else ""

    @property
    def cycles(self) -> int:
        """XLA's estimate for TPUs; 0 where it has none, as for Pallas kernels and collectives."""
        match = re.search(r'"estimated_cycles":"(\d+)"', self.rest)
        return int(match[1]) if match else 0


@dataclasses.dataclass(frozen=True)
class Run:
    """An instruction of the program with how often a step runs it.

    Attributes:
      times: product of the lengths of the loops around it.
      loops: names of the computations that are the bodies of those loops.
    """

    instruction: Instruction
    times: int
    loops: tuple[str, ...]
    computation: str


class Program:
    """A compiled program as text.

    Attributes:
      computations: name -> instructions, in the order in which they run.
      unknown_loops: whiles whose length could not be read; their bodies count once.
    """

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self._entry = ""
        self._tables: dict[str, dict[int, str]] = {}
        self.unknown_loops: list[str] = []
        current: list[Instruction] | None = None
        table: dict[int, str] | None = None
        for line in text.split("\n"):
            if current is not None:
                if line.startswith("}"):
                    current = None
                elif instruction := _parse(line):
                    current.append(instruction)
            elif line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
                table = self._tables.setdefault(line, {})
            elif line.endswith("{") and (match := re.match(r"(ENTRY )?%?([\w.-]+) ", line)):
                current = self.computations.setdefault(match[2], [])
                if match[1]:
                    self._entry = match[2]
            elif table is not None and (match := re.match(r"(\d+) (.*)", line)):
                table[int(match[1])] = match[2]

    def runs(self) -> Iterator[Run]:
        """Every instruction that a step runs, outside of fusions, in order.

        Of a conditional that yields a state (more than SMALL bytes) the branch with more
        instructions, which makes an update; of others, such as statistics of logged steps alone,
        the one with fewer.
        """
        self.unknown_loops.clear()
        yield from self._runs(self._entry, 1, ())

    def _runs(self, name: str, times: int, loops: tuple[str, ...]) -> Iterator[Run]:
        for instruction in self.computations.get(name, ()):
            match instruction.opcode:
                case "while":
                    body = instruction.called("body") or ""
                    length = self._length(instruction, name)
                    if length is None:
                        self.unknown_loops.append(instruction.name)
                    yield from self._runs(body, times * (length or 1), (*loops, body))
                case "conditional":
                    sizes = {b: len(self.computations.get(b, ())) for b in instruction.branches}
                    if sizes:
                        choose = max if array_bytes(instruction.shape) > SMALL else min
                        yield from self._runs(choose(sizes, key=lambda b: sizes[b]), times, loops)
                case "call":
                    yield from self._runs(instruction.called("to_apply") or "", times, loops)
                case _:
                    yield Run(instruction, times, loops, name)

    def _length(self, loop: Instruction, where: str) -> int | None:
        """How often a while runs, if its condition compares a counter with a constant."""
        if match := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
            return int(match[1])
        condition = self.computations.get(loop.called("condition") or "", [])
        by_name = {i.name: i for i in condition}
        test = next((i for i in condition if i.opcode == "compare"), None)
        if test is None:  # fused
            fusion = next((i for i in condition if i.opcode == "fusion"), None)
            inside = self.computations.get((fusion and fusion.called("calls")) or "", [])
            test = next((i for i in inside if i.opcode == "compare"), None)
            if test is None or fusion is None:
                return None
            parameters = {i.name: _index(i.rest_number) for i in inside if i.opcode == "parameter"}
            constants = {i.name: i for i in inside if i.opcode == "constant"}
            by_name |= constants
            outside = {name: fusion.operands[i] for name, i in parameters.items() if i is not None}
            operands = [outside.get(name, name) for name in test.operands]
        else:
            operands = list(test.operands)
        if "direction=LT" not in test.rest:
            return None
        start, end = (self._constant(name, by_name, loop, where) for name in operands)
        return None if start is None or end is None or end < start else end - start

    def _constant(self, name: str, by_name, loop: Instruction, where: str) -> int | None:
        """The number that an operand of a loop's condition has before the loop."""
        instruction = by_name.get(name)
        if instruction is None:
            return None
        if instruction.opcode == "constant":
            return _index(instruction.rest_number)
        if instruction.opcode != "get-tuple-element":
            return None
        index = _index(re.search(r"index=(\d+)", instruction.rest))
        around = self._by_name(where)
        state = around.get(loop.operands[0])
        if index is None or state is None or state.opcode != "tuple":
            return None
        value = around.get(state.operands[index])
        while value is not None and value.opcode in ("copy", "bitcast", "convert"):
            value = around.get(value.operands[0])
        if value is None or value.opcode != "constant":
            return None
        return _index(value.rest_number)

    @functools.cache  # noqa: B019  # a program lives as long as its report
    def _by_name(self, computation: str) -> dict[str, Instruction]:
        return {i.name: i for i in self.computations.get(computation, ())}

    def place(self, instruction: Instruction, root: str) -> str:
        """'siglip/towers/vit.py:120' of the innermost frame below the folder `root`; '' if none."""
        match = re.search(r"stack_frame_id=(\d+)", instruction.rest)
        frame, seen = int(match[1]) if match else 0, set()
        while frame and frame not in seen:
            seen.add(frame)
            text = self._tables.get("StackFrames", {}).get(frame, "")
            location = _index(re.search(r"file_location_id=(\d+)", text))
            where = self._tables.get("FileLocations", {}).get(location or 0, "")
            file = _index(re.search(r"file_name_id=(\d+)", where))
            path = self._tables.get("FileNames", {}).get(file or 0, "").strip('"')
            line = _index(re.search(r"\bline=(\d+)", where))
            if path.startswith(root) and "site-packages" not in path:
                return f"{path[len(root) :].lstrip('/')}:{line}"
            frame = (_index(re.search(r"parent_frame_id=(\d+)", text)) or 1) - 1  # written + 1
        return ""

    def traffic(self, run: Run) -> int:
        """Bytes that an instruction moves to and from the device's memory: operands and results,
        padded as they lie there; of an operand that is only sliced the slices. What stays in a
        TPU's vector memory costs nothing."""
        instruction, around = run.instruction, self._by_name(run.computation)
        if instruction.opcode in _NO_TRAFFIC or instruction.opcode.endswith("-done"):
            return 0
        shapes = [around[name].shape if name in around else "" for name in instruction.operands]
        reads, writes = [array_bytes(shape) for shape in shapes], array_bytes(instruction.shape)
        if instruction.opcode in ("dynamic-slice", "gather", "slice"):
            return writes * 2
        if instruction.opcode == "dynamic-update-slice":
            return reads[1] * 2
        if instruction.opcode in ("copy-start", "slice-start"):  # between two kinds of memory
            there, here, *_ = (a[0] for a in re.finditer(_ARRAY, instruction.shape))
            to, of = (there, here) if instruction.opcode == "copy-start" else (here, there)
            return (array_bytes(to, in_vmem=True) if array_bytes(of) else 0) + array_bytes(to)
        if instruction.opcode in ("all-gather-start", "reduce-scatter-start"):
            return sum(reads) + array_bytes(elements(instruction.shape)[1])
        if instruction.opcode.endswith("-start"):
            return sum(reads) * 2
        inside = self.computations.get(instruction.called("calls") or "", [])
        if instruction.opcode == "fusion" and inside:
            reads, writes = self._fused(inside, reads, writes)
        return sum(reads) + writes

    def _fused(self, inside: list[Instruction], reads: list[int], writes: int):
        """Bytes read and written by a fusion whose parameters or results are slices of arrays."""
        users: dict[str, list[Instruction]] = {}
        for i in inside:
            for name in i.operands:
                users.setdefault(name, []).append(i)
        by_name = {i.name: i for i in inside}
        for i in inside:
            if i.opcode != "parameter" or (index := _index(i.rest_number)) is None:
                continue
            using, names = [], [i.name]
            while names:  # through bitcasts
                for user in users.get(name := names.pop(), ()):
                    if user.opcode == "bitcast":
                        names.append(user.name)
                    else:
                        using.append((user, name))
            if index >= len(reads) or not using:
                continue
            if all(u.opcode in _SLICES and u.operands[0] == n for u, n in using):
                reads[index] = min(reads[index], sum(array_bytes(u.shape) for u, _ in using))
            elif all(u.opcode == "dynamic-update-slice" and u.operands[0] == n for u, n in using):
                part = sum(array_bytes(by_name[u.operands[1]].shape) for u, _ in using)
                writes = max(0, writes - reads[index]) + part  # the array itself stays in place
                reads[index] = 0
        return reads, writes


_SLICES = ("dynamic-slice", "slice", "gather")
_NO_TRAFFIC = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "after-all",
    "partition-id",
    "iota",
}


def _parse(line: str) -> Instruction | None:
    match = re.match(r"\s+(?:ROOT )?%([\w.-]+) = ", line)
    if not match:
        return None
    text = line[match.end() :]
    end = _closing(text) + 1 if text.startswith("(") else text.find(" ")
    shape, text = text[:end], text[end:].lstrip()
    opcode, bracket, text = text.partition("(")
    if not bracket:
        return None
    end = _closing("(" + text) - 1
    operands = tuple(_NAME.findall(text[:end]))
    # The number of a parameter or a constant stands where others have operands.
    rest = text[end + 1 :] if operands else f"{text[:end]}){text[end + 1 :]}"
    return Instruction(match[1], opcode, shape, operands, rest)


def _closing(text: str) -> int:
    """The place of the bracket that closes the one at the beginning."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.start()
    return len(text)


def elements(shape: str) -> list[str]:
    """The types in a tuple type, '(f32[2], (s8[3]))' -> ['f32[2]', '(s8[3])']; else the type."""
    if not shape.startswith("("):
        return [shape]
    parts, depth = [""], 0
    for char in re.sub(r"/\*.*?\*/", "", shape)[1:-1]:
        depth += (char in "([{") - (char in ")]}")
        if char == "," and not depth:
            parts.append("")
        else:
            parts[-1] += char
    return [part.strip() for part in parts]


def _index(match: re.Match | str | None) -> int | None:
    text = match if isinstance(match, str) or match is None else match[1]
    return int(text) if text and re.fullmatch(r"-?\d+", text) else None


def array_bytes(shape: str, *, in_vmem: bool = False) -> int:
    """Bytes of all arrays of a type, padded to the tiles of its layout.

    Arrays whose layout names a memory space, S(1), do not lie in the main memory: they count only
    with `in_vmem`.
    """
    total = 0
    for kind, dims, layout in _ARRAY.findall(shape):
        if kind not in BYTES or ("S(" in layout and not in_vmem):
            continue
        sizes = [int(size) for size in dims.split(",") if size]
        order, _, tiling = layout.partition(":")
        tile = re.match(r"T\(([\d,]+)\)", tiling)
        if tile and sizes:
            minor_first = [int(axis) for axis in order.split(",") if axis]
            for axis, size in zip(minor_first, map(int, reversed(tile[1].split(",")))):
                sizes[axis] = -(-sizes[axis] // size) * size
        total += BYTES[kind] * math.prod(sizes)
    return total
