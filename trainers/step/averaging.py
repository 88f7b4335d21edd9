"""Exponential moving averages of parameters: a teacher, or smoother weights to evaluate."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Average:
    """What is averaged over steps, and how slowly.

    Attributes:
      what: names at the top of the parameter tree, such as 'img' and 'heads'; () for none.
      decay: share of the old average that each update keeps, in [0, 1).

    Raises:
      ValueError: a decay outside of [0, 1), or one of nothing.
    """

    what: tuple[str, ...] = ()  # names at the top of the parameter tree, such as img and txt
    decay: float = 0.999  # share of the old average that an update keeps

    def __post_init__(self):
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be in [0, 1), such as 0.999, not {self.decay}")
        if not self.what and self.decay != Average.decay:
            raise ValueError(
                f"decay={self.decay} averages nothing, as what is empty; set what, such as "
                "img,txt,t,b"
            )

    def check(self, params: PyTree) -> None:
        """Raises ValueError where `what` names parameters that are not there."""
        if unknown := [name for name in self.what if name not in params]:
            known = ", ".join(params)
            raise ValueError(f"there are no parameters {unknown[0]!r}; there are {known}")


def start(params: PyTree, what: tuple[str, ...]) -> PyTree:
    """The first averages: copies of the parameters, whose buffers a step may be given."""
    return {name: jax.tree.map(jnp.copy, params[name]) for name in what}


def update(averaged: PyTree, params: PyTree, decay: float) -> PyTree:
    """The averages after an update that led to `params`."""
    return {
        name: jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, old, params[name])
        for name, old in averaged.items()
    }
