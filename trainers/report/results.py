"""The numbers of a run as a file and as a table: {evaluator: {metric: {"value", "chance"}}}."""

import json
import pathlib

from base import whole_file

Results = dict[str, dict[str, dict[str, float | None]]]


def write_json(path: pathlib.Path, results: Results) -> None:
    """Writes or replaces the file as a whole."""
    whole_file.write_text(path, json.dumps(results, indent=2) + "\n")


def table(results: Results) -> str:
    """A line per metric, its chance level beside it, and how many times chance it is."""
    rows = [("evaluator", "metric", "value", "chance", "x chance")]
    for evaluator, metrics in results.items():
        for metric, result in metrics.items():
            value, chance = result["value"], result["chance"]
            # A multiple of chance means something for shares, but not for losses.
            assert value is not None
            share = chance is not None and 0 < chance <= 1 and not metric.endswith("loss")
            rows.append(
                (
                    evaluator,
                    metric,
                    _number(value, share),
                    "" if chance is None else _number(chance, share),
                    f"{value / chance:.1f}" if chance and share else "",
                )
            )
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    ]
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


def _number(value: float, share: bool) -> str:
    return f"{100 * value:.2f} %" if share else f"{value:.4f}"
