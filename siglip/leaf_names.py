"""Names of the leaves of a pytree: 'img/Transformer/encoderblock_0/LayerNorm_0/scale', 't'."""

from typing import Any

import jax


def path_name(path: tuple) -> str:
    """The name of a jax key path."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def leaves(tree: Any) -> dict[str, Any]:
    """Name -> leaf, in the order of `jax.tree.leaves`."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def path_names(tree: Any) -> list[str]:
    """Names of the leaves, in the order of `jax.tree.leaves`."""
    return [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
