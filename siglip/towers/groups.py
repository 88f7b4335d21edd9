"""A block applied to a few examples at a time, so that what it computes stays in on-chip memory.

A TPU's matrix units wait while intermediate results go to memory and come back. Of 32 images those
of a block of B/16 stay on a v4: by XLA's estimate a layer takes 117 ms for 1,024 images with
remat=full, all at once 143. On v5e and v6e groups were slower than all at once (docs/log.md,
2026-11-30).
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Array

from siglip.sharding import in_shard_map
from siglip.towers.remat import policy_of


def check_group(tower: str, group: int) -> None:
    """Raises ValueError for what is no number of examples; `tower` is its name in the message."""
    if group < 0:
        raise ValueError(f"group of the {tower} tower must be 0 (all) or more, not {group}")


def takes_groups(x: Array, group: int) -> bool:
    """Whether the examples x [n, ...] go through a block in groups.

    Only in the training step: elsewhere a loop over groups of a batch that is split over devices
    would have every device compute all of it. The trainer's groups divide what a device has.
    """
    return group > 0 and in_shard_map() and group < x.shape[0] and x.shape[0] % group == 0


def in_groups(method: Callable[..., Any], group: int, remat: str) -> Callable[..., Any]:
    """`method` of a module, (module, x [n, ...], ...) -> [n, ...], on `group` examples at a time.

    Args:
      remat: one of remat.REMAT, what the backward pass of a group computes again.
    """
    if remat != "none":  # in a loop XLA cannot merge the second computation with the first
        method = nn.remat(method, prevent_cse=False, policy=policy_of(remat))

    def one(module: Any, carry: tuple[()], args: Any) -> tuple[tuple[()], Any]:
        return carry, method(module, *args)

    loop = nn.scan(one, variable_broadcast="params", split_rngs={"params": False})

    def grouped(module: Any, *args: Any) -> Any:
        groups = jax.tree.map(lambda x: x.reshape(-1, group, *x.shape[1:]), args)
        _, out = loop(module, (), groups)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), out)

    return grouped
