"""What a block keeps for the backward pass, and what it computes again.

Bytes per token and unit of width, for bfloat16 matmuls and an MLP of four times the width. w are
those of attention's weights, where attention keeps them (siglip.towers.attention, on TPUs):
2 x heads x tokens / width, 6 at B/16 of 224 pixels.

    remat         kept    matmuls computed again (share of a step's FLOPs)
    none                  none; XLA keeps some of what is elementwise too, under scan all of it
    elementwise   22 + w  none
    mlp           12 + w  attention's output (3 %) and the first of the MLP (11 %)
    dense          6 + w  those, and query, key and value (8 %)
    full           4      those, and attention (1 %, which takes as long as all of the others)

Where attention keeps no weights, each but 'none' computes them again. The input of a block is a
float32 sum, 4 bytes; all else that is kept is a matmul's output.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

# From that which computes least again to that which keeps least.
REMAT = ("none", "elementwise", "mlp", "dense", "full")

# Names that blocks give to outputs of matmuls.
QUERY, KEY, VALUE, WEIGHTS, ATTENDED = "query", "key", "value", "weights", "attended"
PROJECTED = "projected"  # attention's output
HIDDEN = "hidden"  # of the MLP's first

DENSE = (WEIGHTS, ATTENDED)
MLP = (QUERY, KEY, VALUE, *DENSE)
KEPT = {"elementwise": (*MLP, PROJECTED, HIDDEN), "mlp": MLP, "dense": DENSE, "full": ()}


def remat_block(block: Any, remat: str, *, scan: bool) -> Any:
    """The class `block` of a layer, which keeps what `remat`, one of REMAT, says.

    Args:
      scan: whether the layer is the body of nn.scan, which XLA cannot merge with its copy.
    """
    if remat == "none":
        return block
    return nn.remat(block, prevent_cse=not scan, policy=policy_of(remat))


def policy_of(remat: str) -> Callable[..., bool]:
    """What jax.checkpoint keeps with `remat`, one of REMAT but 'none'."""
    return jax.checkpoint_policies.save_only_these_names(*KEPT[remat])
