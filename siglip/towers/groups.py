"""A block applied to a few examples at a time, so that what it computes stays in on-chip memory.

A TPU's matrix units wait while intermediate results go to memory and come back. Of 32 images those
of a block of B/16 fit the 128 MiB that v4 has on the chip: by XLA's estimate a layer takes 117 ms
in the place of 168 for 1,024 images, with remat=full. On v5e and v6e groups were slower than all
examples at once (docs/log.md, 2026-11-30).
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from siglip.towers.remat import policy_of


def takes_groups(n: int, group: int) -> bool:
    """Whether n examples go through a block in groups: not where these do not divide them."""
    return 0 < group < n and n % group == 0


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
