"""Nested dicts and the names of their leaves: {'a': {'b': 1}} and {'a.b': 1}."""

from collections.abc import Mapping
from typing import Any


def flatten(tree: Mapping[str, Any], sep: str = ".") -> dict[str, Any]:
    """Name -> leaf, in the order of the dicts.

    What is no mapping is a leaf. A mapping without keys has none, and leaves no trace.
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}{sep}{name}": leaf for name, leaf in flatten(value, sep).items()}
        else:
            flat[key] = value
    return flat


def insert(tree: dict[str, Any], name: str, value: Any, sep: str = ".") -> None:
    """tree['a']['b'] = value for the name 'a.b'; the dicts on the way are made where absent,
    and no leaf may lie there."""
    *folders, last = name.split(sep)
    for folder in folders:
        tree = tree.setdefault(folder, {})
    tree[last] = value
