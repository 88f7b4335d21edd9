"""Text for one-line messages: similar names, exceptions, places in files, durations."""

import difflib
import os
import pathlib
import re
from collections.abc import Iterable
from typing import Any


def similar(name: str, names: Iterable[str], *, count: int = 3, always: bool = False) -> list[str]:
    """Up to `count` of `names` that resemble `name`, case ignored, the most similar first.

    Names much less similar than the best are left out, and so are all below a ratio of 0.5;
    with `always` the best ones come whatever their ratio is.
    """
    by_lower: dict[str, str] = {}
    for other in names:
        by_lower.setdefault(other.lower(), other)

    def ratio(other: str) -> float:
        return difflib.SequenceMatcher(None, other, name.lower()).ratio()

    cutoff = 0.0 if always else 0.5
    best = difflib.get_close_matches(name.lower(), by_lower, count, cutoff)
    return [by_lower[o] for o in best if always or ratio(o) > ratio(best[0]) - 0.15]


def nearest(name: str, names: Iterable[str], limit: int = 20) -> str:
    """'the nearest: a, b'; where no name is similar, 'there are: ...' with `limit` names."""
    names = sorted(set(names))
    if matches := similar(name, names):
        return f"the nearest: {', '.join(matches)}"
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    return f"there are: {', '.join(names[:limit])}{more}"


def listed(names: Iterable[str]) -> str:
    """The first twelve names, and how many there are where that is not all."""
    names = list(names)
    return ", ".join(names[:12]) + (f", ... ({len(names)} in all)" if len(names) > 12 else "")


def one_line(text: Any, limit: int = 200, *, with_type: bool = False) -> str:
    """A message or an exception on one line; beyond `limit` characters it ends in ' ...'.

    An exception without a message is given by its type; `with_type` puts the type before any.
    """
    if isinstance(text, BaseException) and (with_type or not str(text).strip()):
        text = f"{type(text).__name__}: {text}".rstrip(": ")
    line = " ".join(str(text).split())
    return line if len(line) <= limit else f"{line[:limit]} ..."


def show(file: pathlib.Path) -> str:
    """The path relative to the working directory where the file lies inside it."""
    return os.path.relpath(file) if file.is_relative_to(pathlib.Path.cwd()) else str(file)


def place(file: pathlib.Path, word: str) -> str:
    """'configs/x.py:12' if exactly one line sets the key `word` or contains it, else the file."""
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return show(file)
    name = rf"\b{re.escape(word)}\b"
    for pattern in (rf"[.'\"]{name}['\"]?\]?\s*(:|=(?!=))", name):
        hits = [i for i, line in enumerate(lines, 1) if re.search(pattern, line)]
        if len(hits) == 1:
            return f"{show(file)}:{hits[0]}"
    return show(file)


def duration(seconds: float | None) -> str:
    """'59s', '1m01s', '1h02m' or '2d03h'; '-' for None, a time that is not known yet."""
    if seconds is None:
        return "-"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02}h"
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"
