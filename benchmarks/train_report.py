"""Results of the benchmark of training: statistics, tables for terminal and Markdown, JSON."""

import json
import pathlib
import statistics
from typing import Any

from benchmarks import machine
from benchmarks.loss_report import aligned, as_markdown, left_out, quartiles
from benchmarks.train_case import peak_flops

OURS = "ours"
PARTS = ("transfer", "forward", "loss", "backward", "update")
COLUMNS = ("system", "images/s", "quartiles", "TFLOP/s", "MFU", "peak GiB", "ours / it")
PART_COLUMNS = ("ms of a step", *PARTS)

NOTES = (
    "images/s: pairs of a step over its seconds, transfer from the host included; median and "
    "quartiles over the rounds. A round is some steps in a row of each system, in turn, after an "
    "untimed one; it begins with another system each time.",
    "ours / it: the median over the rounds of our images/s over the other system's.",
    "TFLOP/s: 3 x the FLOPs of the towers' matmuls in a forward pass, 2 per multiply-add; nothing "
    "recomputed is counted. MFU: the share of the chips' dense bfloat16 peak; unknown for CPUs.",
    "peak GiB: on a CPU the resident memory of the whole process in a warm step; on a GPU "
    "what is allocated on it, in JAX since the start, in PyTorch in a warm step.",
    "Parts: ours are programs of their own (towers; the loss with its gradients; all gradients), "
    "backward and update are differences, the update includes the norms that are logged. "
    "open_clip waits after each part.",
    "On a CPU other processes decide the result: PyTorch's threads wait for each other and lose "
    "far more than their share of a core. A run in which others took over 5 % of the CPU says so.",
    "Both: AdamW on float32 parameters, gradients clipped to norm 1, the sigmoid loss, no "
    "recomputation unless the config asks for it. open_clip: its CustomTextCLIP with a timm ViT, "
    "autocast for bfloat16, AdamW with fused=True, images as normalised float32; ours: uint8.",
)


def with_statistics(record: dict[str, Any]) -> dict[str, Any]:
    """A case's record with images/s, FLOP/s, MFU and ratios of each system that was measured."""
    peak = peak_flops(record["device_kind"] or "")
    ours = next((s.get("seconds") for s in record["systems"] if s["name"] == OURS), None)
    done = []
    for system in record["systems"]:
        system = dict(system)
        if seconds := system.get("seconds"):
            low, middle, high = quartiles([record["batch"] / s for s in seconds])
            flops = record["step_flops"] / record["batch"] * middle
            system |= {
                "images_per_s": middle,
                "images_per_s_quartiles": [low, high],
                "flops_per_s": flops,
                "mfu": flops / (peak * record["devices"]) if peak else None,
            }
            if ours and system["name"] != OURS:
                ratios = [theirs / own for own, theirs in zip(ours, seconds)]
                system["ratio"] = statistics.median(ratios)
                system["ratio_quartiles"] = list(quartiles(ratios)[::2])
        done.append(system)
    measured = [s for s in done if s["name"] != OURS and s.get("seconds")]
    best = max(measured, key=lambda s: s["images_per_s"], default=None)
    return {**record, "systems": done, "best_peer": best and best["name"]}


def table(record: dict[str, Any]) -> list[list[str]]:
    rows: list[list[str]] = [list(COLUMNS)]
    for s in record["systems"]:
        if not s.get("seconds"):
            continue
        low, high = s["images_per_s_quartiles"]
        rows.append(
            [
                s["name"],
                _digits(s["images_per_s"]),
                f"{_digits(low)} - {_digits(high)}",
                _digits(s["flops_per_s"] / 1e12),
                "unknown" if s["mfu"] is None else f"{100 * s['mfu']:.1f} %",
                "-" if s["peak_bytes"] is None else _digits(s["peak_bytes"] / 2**30),
                "-" if "ratio" not in s else f"{s['ratio']:.2f}",
            ]
        )
    return rows


def part_table(record: dict[str, Any]) -> list[list[str]]:
    rows: list[list[str]] = [list(PART_COLUMNS)]
    for s in record["systems"]:
        if s.get("seconds"):
            rows.append([s["name"], *(_digits(1000 * s["parts"][part]) for part in PARTS)])
    return rows


def summary(record: dict[str, Any]) -> str:
    """One line under the table."""
    counts = {s["parameters"] for s in record["systems"] if "parameters" in s}
    words = [f"{count:,} parameters" for count in sorted(counts)]
    if best := next((s for s in record["systems"] if s["name"] == record["best_peer"]), None):
        low, high = best["ratio_quartiles"]
        words[0] += ", the same in all systems"
        words.append(
            f"ours / {best['name']}, its best: {best['ratio']:.2f} ({low:.2f} - {high:.2f})"
        )
    return "; ".join(words)


def disturbed(record: dict[str, Any]) -> list[str]:
    """A line of warning where other processes, or the host, took part of the CPU."""
    share = record["others_share_of_cpu"]
    if not share or share < 0.05 or record["machine"]["platform"] != "cpu":
        return []
    return [f"Not to be relied on: {100 * share:.0f} % of the CPU went to others meanwhile."]


def write(record: dict[str, Any], file: pathlib.Path) -> list[pathlib.Path]:
    """Puts the case into the JSON file, in place of the same case, and writes all as Markdown."""
    cases = {}
    if file.exists():
        cases = {case["title"]: case for case in json.loads(file.read_text())["cases"]}
    cases[record["title"]] = record
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"cases": list(cases.values())}, indent=1) + "\n")
    page = file.with_suffix(".md")
    page.write_text(_page(list(cases.values())))
    return [file, page]


def _page(cases: list[dict[str, Any]]) -> str:
    parts = ["# Training: images per second, beside open_clip\n"]
    for case in cases:
        versions = next((s["versions"] for s in case["systems"] if s.get("versions")), {})
        peers = ", ".join(f"{name} {version}" for name, version in versions.items())
        parts += [
            f"## {case['title']}\n",
            f"    {case['command']}\n",
            f"{machine.one_line(case['machine'])}. Peers: {peers or 'none'}.\n",
            f"{case['rounds']} rounds of {case['repeat']} steps. {summary(case)}.\n",
            as_markdown(table(case)),
            as_markdown(part_table(case)),
            *(f"{line}\n" for line in disturbed(case)),
        ]
        if missing := left_out(case["systems"]):
            parts.append("Left out: " + "; ".join(missing) + ".\n")
    parts += ["## How to read it\n", "".join(f"* {note}\n" for note in NOTES)]
    return "\n".join(parts)


def on_screen(record: dict[str, Any]) -> str:
    lines = [record["title"], aligned(table(record)), "", aligned(part_table(record))]
    lines += ["", summary(record), *disturbed(record)]
    lines += [f"left out, {line}" for line in left_out(record["systems"])]
    return "\n".join(lines)


def _digits(value: float) -> str:
    """Three significant digits, and no exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
