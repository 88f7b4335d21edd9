"""Words for one-line messages: names that are close, the place in a file."""

import difflib
import os
import pathlib
import re
from collections.abc import Iterable
from typing import Any


def close(name: str, names: Iterable[str]) -> list[str]:
    """Up to three names like `name`, the best first, and none that is much less like it."""

    def likeness(other: str) -> float:
        return difflib.SequenceMatcher(None, other, name).ratio()

    found = difflib.get_close_matches(name, names)
    return [other for other in found if likeness(other) > likeness(found[0]) - 0.15]


def listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:12]) + (f", ... ({len(names)} in all)" if len(names) > 12 else "")


def one_line(text: Any) -> str:
    return " ".join(str(text).split())


def show(file: pathlib.Path) -> str:
    """As short a path as names the file from here."""
    return os.path.relpath(file) if file.is_relative_to(pathlib.Path.cwd()) else str(file)


def place(file: pathlib.Path, word: str) -> str:
    """'configs/x.py:12' where just one line of the file has the word, else the file."""
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return show(file)
    hits = [i for i, line in enumerate(lines, 1) if re.search(rf"\b{re.escape(word)}\b", line)]
    return f"{show(file)}:{hits[0]}" if len(hits) == 1 else show(file)


def nearest(name: str, names: Iterable[str], most: int = 20) -> str:
    """'the nearest: a, b', or where none is near 'there are: ...' (at most `most` of them)."""
    names = sorted(set(names))
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if near:
        return f"the nearest: {', '.join(near)}"
    more = f", and {len(names) - most} more" if len(names) > most else ""
    return f"there are: {', '.join(names[:most])}{more}"
