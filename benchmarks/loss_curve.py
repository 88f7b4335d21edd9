"""Draws the memory of the loss on each device against the number of devices.

For JAX the programs are compiled and nothing runs. open_clip's loss runs once, since PyTorch knows
its memory only then.
"""

import json
import math
import pathlib
import tempfile
from typing import Any

from benchmarks.loss_case import LossCase, write_inputs

ROOT = pathlib.Path(__file__).resolve().parents[1]
NUMBERS = ROOT / "benchmarks" / "results" / "loss_memory_curve.json"
PICTURE = ROOT / "docs" / "ring_memory.png"
DEVICES, PEER_DEVICES = (1, 2, 4, 8, 16), (1, 2, 4, 8)
N, WIDTH = 1024, 512

# Form, options, name; the first one is this project's.
JAX_LINES = (
    ("ours", "this project's ring"),
    ("xla-full", "definition sharded by XLA"),
    ("all-gather", "all-gather and autodiff"),
    ("ring-autodiff", "ring and autodiff"),
)
PEER_LINE = "open_clip (PyTorch)"

RED, GRAY, DARK = "#c1272d", "#9a9a9a", "#505050"

Lines = dict[str, dict[int, int]]  # name -> {devices: bytes on each}


def run(peer_python: str, command: str) -> int:
    """Writes NUMBERS and PICTURE; the exit code."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(DEVICES))
    from benchmarks import loss_systems, machine

    peers = loss_systems.probe_peers(peer_python)
    lines = jax_lines()
    peer = loss_systems.choose("open_clip-bidir", "cpu")[0]
    reason = loss_systems.why_not(peer, LossCase(1, N, WIDTH), "cpu", peers)
    if reason:
        print(f"left out, {peer.name}: {reason}", flush=True)
    else:
        lines[PEER_LINE] = peer_line(peer, peer_python)
    result = {
        "command": command,
        "machine": machine.describe(),
        "peers": peers,
        "pairs_per_device": N,
        "width": WIDTH,
        "dtype": "float32",
        "left_out": {peer.name: reason} if reason else {},
        "bytes_per_device": lines,
    }
    NUMBERS.parent.mkdir(parents=True, exist_ok=True)
    NUMBERS.write_text(json.dumps(result, indent=1) + "\n")
    draw(lines, PICTURE)
    print(f"written: {NUMBERS.relative_to(ROOT)}, {PICTURE.relative_to(ROOT)}")
    return 0


def jax_lines(devices: tuple[int, ...] = DEVICES, n: int = N, d: int = WIDTH) -> Lines:
    """Temporary bytes on each device, as XLA plans them for the CPU."""
    from benchmarks import loss_jax

    lines: Lines = {}
    for form, name in JAX_LINES:
        options = {"exchange": "ring"} if form == "ours" and loss_jax.has_exchanges() else {}
        lines[name] = {}
        for count in devices:
            shapes = loss_jax.Shapes(count * n, d, "float32")
            program = loss_jax.compile_loss(loss_jax.make_mesh(count), shapes, form, **options)
            lines[name][count] = loss_jax.temp_bytes(program)
        _say(name, lines[name])
    return lines


def peer_line(system: Any, peer_python: str) -> dict[int, int]:
    """Peak bytes of tensors on the fullest process, beyond inputs and gradients."""
    from benchmarks.loss_worker import Failed

    line: dict[int, int] = {}
    for count in PEER_DEVICES:
        case = LossCase(count, N, WIDTH)
        with tempfile.TemporaryDirectory(prefix="loss_curve_") as folder:
            write_inputs(case, pathlib.Path(folder))
            worker = system.start(case, "cpu", folder, peer_python)
            try:
                line[count] = worker.prepare()["memory_bytes"]
            except Failed as failure:
                print(f"left out, {system.name} on {count} devices: {failure}", flush=True)
            finally:
                worker.close()
    _say(PEER_LINE, line)
    return line


def title(lines: Lines) -> str:
    """The result as a title, if it holds from 4 devices on, where the ring has all its buffers."""
    ours, *others = lines.values()
    start, most = 4, max(ours)

    def per_doubling(line: dict[int, int]) -> float:
        return (line[max(line)] / line[start]) ** (1 / math.log2(max(line) / start))

    flat = abs(ours[most] / ours[start] - 1) < 0.02
    grow = all(per_doubling(line) > 1.5 for line in others if start in line and max(line) > start)
    if flat and grow:
        return (
            f"On {start} devices or on {most} the ring needs {_mib(ours[most])} MiB on each;\n"
            "every other form grows with the devices"
        )
    return "Memory of the loss on each device"


def draw(lines: Lines, file: pathlib.Path) -> None:
    """One line for each form, named at its right end."""
    import matplotlib

    matplotlib.use("Agg")  # no display
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(8, 5), layout="constrained")
    lines = {name: line for name, line in lines.items() if line}
    first, most = next(iter(lines)), max(max(line) for line in lines.values())
    for name, line in lines.items():
        x = sorted(line)
        ours = name == first
        ax.plot(
            x, [line[count] / 2**20 for count in x], "--" if name == PEER_LINE else "-",
            color=RED if ours else GRAY, linewidth=2.5 if ours else 1.5,
            marker="o", markersize=5 if ours else 3.5, zorder=3 if ours else 2,
        )  # fmt: skip
    for names, x, y in _ends(lines):
        beside = x == most  # a shorter line has others to its right, so its name is on top of it
        label = " and\n".join(names)
        ax.annotate(
            f"{label}, {_mib(y)} MiB", (x, y / 2**20),
            xytext=(9, 0) if beside else (3, 6), textcoords="offset points",
            ha="left" if beside else "right", va="center" if beside else "bottom",
            color=RED if first in names else DARK, weight="bold" if first in names else "normal",
        )  # fmt: skip
    sizes = [size / 2**20 for line in lines.values() for size in line.values()]
    ticks = [2**k for k in range(math.floor(math.log2(min(sizes))), 32) if 2**k < 2 * max(sizes)]
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    ax.set_xticks(list(DEVICES), [str(count) for count in DEVICES])
    ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()
    ax.set_xlim(0.9, most * 4.2)
    ax.set_xlabel("devices", x=0.33)
    ax.set_ylabel("MiB on each device,\nbeyond inputs and gradients")
    ax.grid(axis="y", alpha=0.25)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    ax.spines["bottom"].set_bounds(1, most)
    ax.set_title(title(lines), loc="left", weight="bold", fontsize=12)
    fig.text(
        0.99, 0.01, f"{N} pairs on each device, width {WIDTH}, float32; loss and all gradients",
        ha="right", fontsize=8, color=DARK,
    )  # fmt: skip
    file.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(file, dpi=150)
    plt.close(fig)


def _ends(lines: Lines) -> list[tuple[list[str], int, int]]:
    """Names, devices and bytes at the right ends; lines that end together share theirs."""
    ends: list[tuple[list[str], int, int]] = []
    for name, line in lines.items():
        x = max(line)
        for names, other_x, other_y in ends:
            if x == other_x and abs(line[x] / other_y - 1) < 0.1:
                names.append(name)
                break
        else:
            ends.append(([name], x, line[x]))
    return ends


def _mib(size: float) -> str:
    return f"{size / 2**20:.3g}"


def _say(name: str, line: dict[int, int]) -> None:
    sizes = ", ".join(f"{count}: {_mib(size)}" for count, size in line.items())
    print(f"{name}, MiB on each of so many devices: {sizes}", flush=True)
