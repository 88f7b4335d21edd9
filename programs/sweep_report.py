"""The report of a sweep: sweep.csv (all numbers), sweep.md (a table), sweep.png (one metric)."""

import csv
import dataclasses
import math
import pathlib
from typing import Any

from base import whole_file

Results = dict[str, dict[str, Any]]  # {'evaluator/metric': {'value': float, 'chance'}}


@dataclasses.dataclass(frozen=True)
class SweepRow:
    """One run: its swept settings {key: text}, and its results or the error that left none."""

    swept: dict[str, str]
    results: Results
    error: str = ""

    def summary(self, metric: str | None) -> str:
        """The value of the metric, or why there is none."""
        if self.error or metric not in self.results:
            return f"failed, {self.error}"
        return f"{metric} = {cell(self.results[metric])}"


def first_metric(results: Results) -> str:
    """The first metric that has a chance level, else the first of all."""
    with_chance = [name for name, numbers in results.items() if numbers["chance"] is not None]
    return (with_chance or list(results))[0]


def cell(numbers: dict[str, Any]) -> str:
    """A value for people, with its chance level where it has one."""
    value, chance = numbers["value"], numbers["chance"]
    return f"{value:.4g}" if chance is None else f"{value:.4g} (chance {chance:.3g})"


def write(rows: list[SweepRow], metric: str | None, workdir: pathlib.Path) -> list[pathlib.Path]:
    """Writes the three files, without the plot where no run has results; returns their paths."""
    workdir.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(name for row in rows for name in row.results))
    paths = [workdir / "sweep.csv", workdir / "sweep.md"]
    _write_csv(rows, names, paths[0])
    _write_markdown(rows, names, paths[1])
    if metric:
        paths.append(workdir / "sweep.png")
        _write_plot(rows, metric, paths[2])
    return paths


def _write_csv(rows: list[SweepRow], names: list[str], path: pathlib.Path) -> None:
    with whole_file.create(path, "w", newline="") as file:
        writer = csv.writer(file)
        chances = [f"{name} chance" for name in names]
        writer.writerow([*rows[0].swept, *names, *chances, "error"])
        for row in rows:
            numbers = [row.results.get(name, {}) for name in names]
            values = [n.get("value") for n in numbers] + [n.get("chance") for n in numbers]
            writer.writerow([*row.swept.values(), *values, row.error])


def _write_markdown(rows: list[SweepRow], names: list[str], path: pathlib.Path) -> None:
    """Writes the table; a chance level that all runs share gets a row of its own."""
    chances = {
        name: {row.results[name]["chance"] for row in rows if name in row.results} for name in names
    }
    shared = {name: levels.pop() for name, levels in chances.items() if len(levels) == 1}

    def shown(row: SweepRow, name: str) -> str:
        if name not in row.results:
            return "failed"
        return cell(row.results[name] | ({"chance": None} if name in shared else {}))

    header = [*rows[0].swept, *names]
    lines = [header, ["---"] * len(header)]
    lines += [[*row.swept.values(), *(shown(row, name) for name in names)] for row in rows]
    if any(chance is not None for chance in shared.values()):
        blank = [""] * (len(rows[0].swept) - 1)
        levels = [shared.get(name) for name in names]
        lines.append(["chance", *blank, *("" if c is None else f"{c:.3g}" for c in levels)])
    text = "".join(f"| {' | '.join(c.replace('|', '/') for c in line)} |\n" for line in lines)
    whole_file.write_text(path, text)


def _write_plot(rows: list[SweepRow], metric: str, path: pathlib.Path) -> None:
    """Plots the metric against the first numeric key (else the first), a line per other setting."""
    import matplotlib

    matplotlib.use("Agg")  # no display
    import matplotlib.pyplot as plt

    rows = [row for row in rows if metric in row.results]
    key = _x_key(rows)
    numeric = all(map(_is_number, (row.swept[key] for row in rows)))
    labels = list(dict.fromkeys(row.swept[key] for row in rows))

    def x_of(row: SweepRow) -> float:
        return float(row.swept[key]) if numeric else labels.index(row.swept[key])

    lines: dict[str, list[tuple[float, float]]] = {}
    chances = set()
    for row in rows:
        others = ", ".join(f"{k} = {v}" for k, v in row.swept.items() if k != key)
        numbers = row.results[metric]
        lines.setdefault(others, []).append((x_of(row), numbers["value"]))
        if numbers["chance"] is not None:
            chances.add((x_of(row), numbers["chance"]))
    fig, ax = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for (others, points), marker in zip(lines.items(), "osD^vP*X<>" * len(lines)):
        ax.plot(*zip(*sorted(points)), marker=marker, label=others or None)
    if len({chance for _, chance in chances}) == 1:
        ax.axhline(next(iter(chances))[1], color="gray", linestyle="--", label="chance")
    elif chances:
        ax.plot(*zip(*sorted(chances)), color="gray", linestyle="--", label="chance")
    ticks = sorted({x_of(row) for row in rows})
    if numeric and _spans_doublings(ticks):
        ax.set_xscale("log", base=2)
    ax.set_xticks(ticks, [f"{x:g}" for x in ticks] if numeric else labels)
    ax.minorticks_off()
    if all(value >= 0 for points in lines.values() for _, value in points):
        ax.set_ylim(bottom=0)
    ax.set_xlabel(key)
    ax.set_ylabel(metric)
    ax.grid(alpha=0.3)
    if ax.get_legend_handles_labels()[0]:
        ax.legend()
    fig.savefig(path, dpi=150)
    plt.close(fig)


def _x_key(rows: list[SweepRow]) -> str:
    keys = list(rows[0].swept)
    numeric = [key for key in keys if all(_is_number(row.swept[key]) for row in rows)]
    return (numeric or keys)[0]


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _spans_doublings(values: list[float]) -> bool:
    """Whether the values are better shown on a logarithmic axis: a factor of 4 or more."""
    return values[0] > 0 and values[-1] >= 4 * values[0]
