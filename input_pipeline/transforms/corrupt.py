"""Noise on purpose: the corruptions of the paper's study of robustness (section 4.10, Figure 7).

Steps of config.input.corrupt, 'image(0.2) | text(0.2) | batch(0.1)'; each with its probability.
All is a function of (seed, step). Runs that differ in p alone make noise of nested sets of images
and of texts.
"""

import functools
import threading
from typing import Any

import numpy as np

from base.errors import UserError
from input_pipeline.transforms import steps as program


def image(*, p: float) -> tuple[str, float]:
    """With probability p the image becomes uniform random noise; an embedding, a random one of all
    directions."""
    return "image", p


def text(*, p: float) -> tuple[str, float]:
    """With probability p the tokens become random ones, of a random length from 1 to token_len,
    filled up with id 0. (The paper does not state its distribution of lengths.)"""
    return "text", p


def batch(*, p: float) -> tuple[str, float]:
    """The texts of a share p of the global batch are shuffled among themselves."""
    return "batch", p


CORRUPT_OPS = {"image": image, "text": text, "batch": batch}
IMAGE, TEXT, BATCH = 1, 2, 3  # generators of their own: p of one does not change another's draws


class Corruption:
    """What is corrupted in which row.

    Raises:
      UserError: steps that cannot be read, or a probability out of range.
    """

    def __init__(self, steps: str | tuple, *, seed: int, batch_size: int):
        self._seed, self._batch_size = seed, batch_size
        self._p, given = {"image": 0.0, "text": 0.0, "batch": 0.0}, set()
        for name, step in program.parse(steps, CORRUPT_OPS, "input.corrupt"):
            _, p = step()
            if name in given:
                raise UserError(f"config.input.corrupt: {name} is given twice")
            given.add(name)
            if not isinstance(p, int | float) or not 0 <= p <= 1:
                raise UserError(f"config.input.corrupt: {name}({p}) must be from 0 to 1")
            self._p[name] = float(p)
        self._lock = threading.Lock()
        self._of_step = functools.lru_cache(maxsize=8)(self._shuffle)

    def text_position(self, position: int) -> int:
        """Of whom the text of this row is."""
        if not self._p["batch"]:
            return position
        step, row = divmod(position, self._batch_size)
        with self._lock:
            return step * self._batch_size + int(self._of_step(step)[row])

    def corrupt_image(self, made: dict[str, Any], position: int) -> dict[str, Any]:
        if not self._p["image"]:
            return made
        rng = np.random.default_rng((self._seed, position, IMAGE))
        if rng.random() >= self._p["image"]:
            return made
        pixels = made["image"]
        if pixels.dtype != np.uint8:
            return {**made, "image": rng.standard_normal(pixels.shape, pixels.dtype)}
        return {**made, "image": rng.integers(0, 256, pixels.shape, pixels.dtype)}

    def corrupt_text(self, tokens: np.ndarray, position: int, vocab_size: int) -> np.ndarray:
        if not self._p["text"]:
            return tokens
        rng = np.random.default_rng((self._seed, position, TEXT))
        if rng.random() >= self._p["text"]:
            return tokens
        noise = np.zeros_like(tokens)
        length = int(rng.integers(1, len(tokens) + 1))
        noise[:length] = rng.integers(0, vocab_size, length)
        return noise

    def _shuffle(self, step: int) -> np.ndarray:
        rng = np.random.default_rng((self._seed, step, BATCH))
        rows = rng.permutation(self._batch_size)
        chosen = rows[: round(self._p["batch"] * self._batch_size)]
        places = np.arange(self._batch_size)
        places[chosen] = rng.permutation(chosen)
        return places
