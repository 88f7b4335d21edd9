"""Leaves of nested dicts have one name, and find their place by it again."""

from types import MappingProxyType

import pytest

from base.nested import flatten, insert

TREE = {"a": {"b": 1, "c": {"d": [2, {"e": 3}]}}, "f": None}


@pytest.mark.parametrize(
    ("sep", "names"), [(".", ["a.b", "a.c.d", "f"]), ("/", ["a/b", "a/c/d", "f"])]
)
def test_names_lead_to_the_leaves_and_back(sep, names):
    flat = flatten(TREE, sep)
    assert list(flat) == names and list(flat.values()) == [1, [2, {"e": 3}], None]
    tree = {}
    for name, value in flat.items():
        insert(tree, name, value, sep)
    assert tree == TREE


def test_any_mapping_is_a_branch_and_an_empty_one_has_no_leaf():
    assert flatten({"a": MappingProxyType({"b": 1}), "c": {}}) == {"a.b": 1}


def test_a_value_replaces_another_and_leaves_its_neighbours():
    tree = {"a": {"b": 1, "c": 2}}
    insert(tree, "a.b", 3)
    insert(tree, "x.y.z", 4)
    assert tree == {"a": {"b": 3, "c": 2}, "x": {"y": {"z": 4}}}
