"""Facts of a batch that a loss may ask for, made alike in training and in evaluation."""

from collections.abc import Collection, Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int

from siglip.losses import pairs

FACTS = ("ids", "seed")


def check_needs(what: str, needs: Collection[str]) -> None:
    """Raises ValueError where `needs` names no fact; `what` says whose needs they are."""
    if unknown := [name for name in needs if name not in FACTS]:
        raise ValueError(
            f"{what} asks for {', '.join(map(repr, unknown))}; facts of a batch are "
            f"{', '.join(FACTS)} (siglip/losses/facts.py)"
        )


def facts(
    needs: Collection[str], batch: Mapping[str, Array], *, seed: int, step: Int[Array, ""] | int
) -> dict[str, Array]:
    """The named facts of a global batch, as keyword arguments of a loss.

    Args:
      needs: names, of FACTS.
      batch: 'text' [N, l], and 'index' [N] where the source numbers its examples.
      seed, step: of what is random in a loss: another draw for each step, the same in a resumed
        run. An evaluation passes constants.

    Returns:
      Of these what is needed:
      'ids', int32 [N, k]: two rows are duplicates if they agree in a column (pairs.ids).
      'seed', uint32: of random negatives.
    """
    values: dict[str, Any] = {}
    if "ids" in needs:
        values["ids"] = pairs.ids(batch["text"], batch.get("index"))
    if "seed" in needs:
        step = jnp.asarray(step).astype(jnp.uint32)
        values["seed"] = jnp.uint32(seed % 2**32) * jnp.uint32(0x9E3779B1) + step
    return values
