"""What a refused name may have been meant to be."""

import difflib
from collections.abc import Iterable


def nearest(name: str, names: Iterable[str], most: int = 20) -> str:
    """'the nearest: a, b', or where none is near 'there are: ...' (at most `most` of them)."""
    names = sorted(set(names))
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if near:
        return f"the nearest: {', '.join(near)}"
    more = f", and {len(names) - most} more" if len(names) > most else ""
    return f"there are: {', '.join(names[:most])}{more}"
