"""Results of the loss benchmark: statistics, the table for the terminal and for Markdown, JSON."""

import json
import pathlib
import statistics
from typing import Any

from benchmarks import machine
from benchmarks.loss_systems import BASE

COLUMNS = (
    "system", "median ms", "quartiles", "x ours", "memory MiB", "x ours",
    "error dX", "dY", "dt", "db",
)  # fmt: skip

NOTES = (
    "Time: of the loss and its gradients wrt both embeddings, t and b, on inputs that all "
    "systems share. Rounds alternate between the systems, and each turn begins with an untimed "
    "repetition. JAX: until all results are ready. PyTorch: from the first start of a process "
    "to the last end, after a barrier; what would average the loss, t and b over processes is "
    "left out.",
    "Memory: per device, at most, beyond the inputs and the returned gradients. JAX: XLA's plan"
    " (`memory_analysis().temp_size_in_bytes`). PyTorch on a CPU: live results of operators, "
    "without what an operator or gloo allocates inside; on a GPU: "
    "`torch.cuda.max_memory_allocated`.",
    "Error: L2 norm of a gradient's error over that of the gradient, against float64.",
    "On a CPU JAX's devices are threads of one process, PyTorch's are processes that exchange "
    "over the loopback interface.",
    "x ours: the ratio to this project's ring; above 1 the system is slower or larger.",
)


def quartiles(seconds: list[float]) -> tuple[float, float, float]:
    """First quartile, median and third, interpolated between repetitions."""
    if len(seconds) == 1:
        return seconds[0], seconds[0], seconds[0]
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return low, middle, high


def with_statistics(systems: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each system's record with quartiles (ms) and its ratios to BASE's, where both have one."""
    done = []
    for system in systems:
        record = dict(system)
        if system.get("seconds"):
            low, middle, high = (1000 * s for s in quartiles(system["seconds"]))
            record |= {"median_ms": middle, "quartiles_ms": [low, high]}
        done.append(record)
    base = next((record for record in done if record["name"] == BASE), {})
    for record in done:
        for key, ratio in (("median_ms", "time_ratio"), ("memory_bytes", "memory_ratio")):
            if record.get(key) and base.get(key):
                record[ratio] = record[key] / base[key]
    return done


def table(systems: list[dict[str, Any]]) -> list[list[str]]:
    """COLUMNS, then a row for each system that was measured; "-" where one does not apply."""
    rows: list[list[str]] = [list(COLUMNS)]
    for record in systems:
        if not record.get("seconds"):
            continue
        memory = record.get("memory_bytes")
        low, high = record["quartiles_ms"]
        errors = record.get("errors") or {}
        rows.append(
            [
                record["name"],
                _digits(record["median_ms"]),
                f"{_digits(low)} - {_digits(high)}",
                _ratio(record.get("time_ratio")),
                "-" if memory is None else _digits(memory / 2**20),
                _ratio(record.get("memory_ratio")),
                *(f"{errors[k]:.1e}" if k in errors else "-" for k in ("zimg", "ztxt", "t", "b")),
            ]
        )
    return rows


def aligned(rows: list[list[str]]) -> str:
    """The table for a terminal: the first column to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def as_markdown(rows: list[list[str]]) -> str:
    rule = ["---", *["--:"] * (len(rows[0]) - 1)]
    return "".join(f"| {' | '.join(row)} |\n" for row in [rows[0], rule, *rows[1:]])


def left_out(systems: list[dict[str, Any]]) -> list[str]:
    """'names: why' of the systems that were not measured."""
    names: dict[str, list[str]] = {}
    for record in systems:
        if record.get("left_out"):
            names.setdefault(record["left_out"], []).append(record["name"])
    return [f"{', '.join(named)}: {reason}" for reason, named in names.items()]


def title(case: dict[str, Any]) -> str:
    return (
        f"{case['devices']} {case['platform'].upper()} device{'s' * (case['devices'] > 1)}, "
        f"{case['n']} pairs each (N = {case['n'] * case['devices']}), d = {case['d']}, "
        f"{case['dtype']}"
    )


def write(result: dict[str, Any], file: pathlib.Path) -> list[pathlib.Path]:
    """`result` as JSON, and its tables as Markdown beside it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n")
    page = file.with_suffix(".md")
    page.write_text(_page(result))
    return [file, page]


def _page(result: dict[str, Any]) -> str:
    peers = ", ".join(f"{name} {v}" for name, v in result["peers"]["versions"].items())
    parts = [
        "# The loss: time, memory and error against peers\n",
        f"    {result['command']}\n",
        f"{machine.one_line(result['machine'])}. Peers: {peers or 'none installed'}.\n",
    ]
    for case in result["cases"]:
        parts.append(f"## {title(case)}\n")
        repeats = max((len(r.get("seconds") or []) for r in case["systems"]), default=0)
        parts.append(f"{repeats} repetitions in {case['rounds']} rounds; t = 117, b = -12.9.\n")
        parts.append(as_markdown(table(case["systems"])))
        if case["no_reference"]:
            parts.append(f"No errors: {case['no_reference']}.\n")
        if missing := left_out(case["systems"]):
            parts.append("Left out: " + "; ".join(missing) + ".\n")
    parts.append("## Systems\n")
    named = {r["name"]: r["what"] for case in result["cases"] for r in case["systems"]}
    parts.append("".join(f"* `{name}`: {what}\n" for name, what in named.items()))
    parts.append("## How to read it\n")
    parts.append("".join(f"* {note}\n" for note in NOTES))
    return "\n".join(parts)


def _digits(value: float) -> str:
    """Three significant digits, and no exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
