"""Leaves of a pytree have one name, whatever its nodes are."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from siglip.leaf_names import leaves, path_names


class Moments(NamedTuple):
    mu: dict
    nu: list


def test_names_are_paths_in_the_order_of_the_leaves():
    tree = {"t": jnp.ones(1), "img": {"b": jnp.zeros(2), "a": [jnp.zeros(3), jnp.zeros(4)]}}
    names = path_names(tree)
    assert names == ["img/a/0", "img/a/1", "img/b", "t"]
    assert [leaf.size for leaf in jax.tree.leaves(tree)] == [3, 4, 2, 1]
    assert {name: leaf.size for name, leaf in leaves(tree).items()} == dict(
        zip(names, (3, 4, 2, 1))
    )


def test_fields_of_a_state_and_positions_are_parts_of_a_name():
    tree = {"opt_state": (Moments({"img": 1}, [2, 3]), 4)}
    assert leaves(tree) == {
        "opt_state/0/mu/img": 1,
        "opt_state/0/nu/0": 2,
        "opt_state/0/nu/1": 3,
        "opt_state/1": 4,
    }
