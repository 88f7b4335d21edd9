"""Results of the benchmark of input: statistics, goals, tables for terminal and Markdown, JSON."""

import json
import pathlib
import statistics
from typing import Any

from benchmarks import machine
from benchmarks.input_case import DECODE, EXPLAINED, GROUPS, OURS, PIL
from benchmarks.loss_report import aligned, as_markdown, left_out, quartiles

RATE, SHARE_OF_BARE, TIMES_PIL, STEP = 600, 0.85, 2.5, 1.03  # the goals
COLUMNS = ("images/s per core", "quartiles", "images/s", "of bare decoder")
STEP_COLUMNS = ("seconds of", "median", "quartiles")

NOTES = (
    "images/s per core: images over the CPU seconds of the process, all its threads included; "
    "images/s: over the clock. Medians and quartiles over the rounds. A round is some batches of "
    "each system, in turn; it begins with another system each time.",
    "of bare decoder: the median over the rounds of the rate per core over that of "
    f"`{DECODE}`.",
    "Ours is the whole way: read, decode, resize to 224 uint8, tokenize (11 words, as bytes), "
    "batch, by input_pipeline.loader, from a first batch on that is not timed; counted are the "
    f"images that threads made meanwhile. Formats take `{OURS}`. Files are in the page cache: a "
    "disk is not measured. Of Parquet at most 4 row groups of 100 images are kept in memory.",
    "The bare decoder and the peers are spared the text; peers also the shuffling and the copy "
    "into a batch.",
    *(f"{name}: {what}." for name, what in EXPLAINED.items()),
    "Where cores share their units (hyper-threads) or others work, a CPU second does less: it is "
    "the ratios that compare.",
)  # fmt: skip

STEP_NOTES = (
    "A step: that of benchmarks.train, fed by one batch in memory again and again, and by "
    f"input_pipeline.loader from WebDataset shards, `{OURS}`; in turn, after 2 untimed steps.",
    "Wait: what the host spent in `next(batches)`, as trainers.loop does; while a step is in "
    "flight on the device, that costs nothing.",
    "loader alone: of a batch, when nothing trains. A step cannot be shorter.",
)


def with_statistics(record: dict[str, Any]) -> dict[str, Any]:
    """The record with rates, their ratios, and goals."""
    bare = next((s["cpu_s"] for s in record["systems"] if s["name"] == DECODE and _has(s)), None)
    done = []
    for system in record["systems"]:
        system = dict(system)
        if _has(system):
            low, middle, high = quartiles([1 / s for s in system["cpu_s"]])
            system |= {
                "per_core": middle,
                "per_core_quartiles": [low, high],
                "images_per_s": statistics.median(1 / s for s in system["wall_s"]),
            }
            if bare:
                ratios = [b / s for b, s in zip(bare, system["cpu_s"])]
                system["of_bare"] = statistics.median(ratios)
        done.append(system)
    return {**record, "systems": done, "goals": goals(done)}


def goals(systems: list[dict[str, Any]]) -> list[str]:
    """A line for each goal: whether it is met, with the numbers."""
    measured = {s["name"]: s for s in systems if _has(s)}
    if OURS not in measured:
        return ["goals not measured: ours is left out"]
    ours, lines = measured[OURS], []
    if DECODE in measured:
        bare = measured[DECODE]["per_core"]
        least = min(RATE, SHARE_OF_BARE * bare)
        lines.append(
            f"{_met(ours['per_core'] >= least)}: `{OURS}` {_digits(ours['per_core'])} images/s per "
            f"core; at least min({RATE}, {SHARE_OF_BARE} x {_digits(bare)} of the bare decoder) "
            f"= {_digits(least)}"
        )
    if PIL in measured:
        ratio = statistics.median(p / o for p, o in zip(measured[PIL]["cpu_s"], ours["cpu_s"]))
        lines.append(
            f"{_met(ratio >= TIMES_PIL)}: {ratio:.2f} x the {PIL} path per core; at least "
            f"{TIMES_PIL} x"
        )
    return lines


def with_step_statistics(record: dict[str, Any]) -> dict[str, Any]:
    """The record of a step with its ratio, wait share and goal."""
    memory, files, wait = ([r[i] for r in record["seconds"]] for i in range(3))
    ratio = quartiles([f / m for f, m in zip(files, memory)])
    share = quartiles([w / f for w, f in zip(wait, files)])
    slower = statistics.median(memory) > record["loader_s"]
    times = f"{ratio[1]:.3f} x the step from memory"
    if slower:
        goal = f"{_met(ratio[1] <= STEP)}: {times}; at most {STEP} x"
    else:
        goal = f"does not apply, as the loader is slower than the model: {times}"
    return {**record, "ratio": ratio, "wait_share": share, "goals": [goal]}


def step_table(record: dict[str, Any]) -> list[list[str]]:
    rows: list[list[str]] = [list(STEP_COLUMNS)]
    names = ("a step from memory", "a step from files", "its wait for the batch")
    for i, name in enumerate(names):
        low, middle, high = quartiles([r[i] for r in record["seconds"]])
        rows.append([name, f"{middle:.4f}", f"{low:.4f} - {high:.4f}"])
    rows.append(["loader alone", f"{record['loader_s']:.4f}", "-"])
    for key, name in (("ratio", "files / memory"), ("wait_share", "wait share")):
        low, middle, high = record[key]
        rows.append([name, f"{middle:.3f}", f"{low:.3f} - {high:.3f}"])
    return rows


def tables(record: dict[str, Any]) -> list[list[list[str]]]:
    """One for each group of systems, or that of the step."""
    if "seconds" in record:
        return [step_table(record)]
    groups = []
    for group in GROUPS:
        rows = [
            [
                s["name"],
                _digits(s["per_core"]),
                " - ".join(map(_digits, s["per_core_quartiles"])),
                _digits(s["images_per_s"]),
                f"{100 * s['of_bare']:.0f} %" if "of_bare" in s else "-",
            ]
            for s in record["systems"]
            if s["group"] == group and _has(s)
        ]
        if rows:
            groups.append([[group, *COLUMNS], *rows])
    return groups


def disturbed(record: dict[str, Any]) -> list[str]:
    share = record["others_share_of_cpu"]
    if not share or share < 0.05:
        return []
    return [
        f"Others had {100 * share:.0f} % of the CPU meanwhile: do not rely on what the clock says."
    ]


def on_screen(record: dict[str, Any]) -> str:
    lines = [record["title"], *(f"{aligned(rows)}\n" for rows in tables(record))]
    lines += [f"goal {line}" for line in record["goals"]]
    lines += disturbed(record)
    lines += [f"left out, {line}" for line in left_out(record["systems"])]
    return "\n".join(lines)


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
    parts = ["# Input: images per second and core, from JPEG to batch\n"]
    for case in cases:
        versions: dict[str, str] = {}
        for system in case["systems"]:
            # PIL of our own interpreter is first, and may be another than the peers'.
            versions = {**system.get("versions", {}), **versions}
        peers = ", ".join(f"{name} {version}" for name, version in versions.items())
        parts += [
            f"## {case['title']}\n",
            f"    {case['command']}\n",
            f"{machine.one_line(case['machine'])}. Peers: {peers or 'none'}.\n",
            f"{case['count']:,} JPEGs of {case['mean_bytes'] / 1000:.1f} KB on average: "
            f"{case['how']}.\n",
            f"{case['rounds']} rounds of {case['repeat']} {case['unit']}.\n",
            *(as_markdown(_escaped(rows)) for rows in tables(case)),
            "".join(f"* Goal {line}.\n" for line in case["goals"]),
            *(f"{line}\n" for line in disturbed(case)),
        ]
        if missing := left_out(case["systems"]):
            parts.append("Left out: " + "; ".join(missing) + ".\n")
    notes = NOTES + (STEP_NOTES if any("seconds" in case for case in cases) else ())
    parts += ["## How to read it\n", "".join(f"* {note}\n" for note in notes)]
    return "\n".join(parts)


def _escaped(rows: list[list[str]]) -> list[list[str]]:
    """In Markdown the bar of `decode | resize` would end a cell."""
    return [[cell.replace("|", "\\|") for cell in row] for row in rows]


def _has(system: dict[str, Any]) -> bool:
    return bool(system.get("cpu_s"))


def _met(is_met: bool) -> str:
    return "met" if is_met else "not met"


def _digits(value: float) -> str:
    """Three significant digits, and no exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
