"""Corruptions of the paper's robustness study (arXiv 2303.15343, section 4.10, Figure 7).

Steps of config.input.corrupt: 'image(0.2) | text(0.2) | batch(0.1)', each with its probability.
The noise is a function of (seed, step). Among runs that differ only in p, the images (and texts)
that a smaller p corrupts are a subset of those that a larger p corrupts.
"""

import functools
import threading

import numpy as np

from base.errors import UserError
from input_pipeline.transforms.steps import parse_steps


def image(*, p: float) -> tuple[str, float]:
    """Replaces the image with probability p by uniform noise; an embedding, by Gaussian noise."""
    return "image", p


def text(*, p: float) -> tuple[str, float]:
    """Replaces the tokens with probability p by random ones, of a random length from 1 to token_len
    and padded with id 0. (The paper does not state its distribution of lengths.)"""
    return "text", p


def batch(*, p: float) -> tuple[str, float]:
    """Shuffles the texts of a share p of the global batch among themselves."""
    return "batch", p


CORRUPT_OPS = {"image": image, "text": text, "batch": batch}
# Part of the seeds: each corruption has its own generator, so p of one changes no other.
IMAGE, TEXT, BATCH = 1, 2, 3


class Corruption:
    """Corrupts images, texts and the pairing of a batch, as a function of the position.

    Raises:
      UserError: steps that cannot be read, or a probability out of range.
    """

    def __init__(self, steps: str | tuple, *, seed: int, batch_size: int):
        self._seed, self._batch_size = seed, batch_size
        self._p, names = {"image": 0.0, "text": 0.0, "batch": 0.0}, set()
        for name, step in parse_steps(steps, CORRUPT_OPS, "input.corrupt"):
            _, p = step()
            if name in names:
                raise UserError(f"config.input.corrupt: {name} is given twice")
            names.add(name)
            if not isinstance(p, int | float) or not 0 <= p <= 1:
                raise UserError(f"config.input.corrupt: {name}({p}) must be from 0 to 1")
            self._p[name] = float(p)
        self._lock = threading.Lock()
        self._text_rows = functools.lru_cache(maxsize=8)(self._make_text_rows)

    def text_position(self, position: int) -> int:
        """Position whose caption this row gets."""
        if not self._p["batch"]:
            return position
        step, row = divmod(position, self._batch_size)
        with self._lock:
            return step * self._batch_size + int(self._text_rows(step)[row])

    def corrupt_image(self, image: np.ndarray, position: int) -> np.ndarray:
        """The image, or noise of its shape and dtype."""
        if not self._p["image"]:
            return image
        rng = np.random.default_rng((self._seed, position, IMAGE))
        if rng.random() >= self._p["image"]:
            return image
        if image.dtype != np.uint8:
            return rng.standard_normal(image.shape, image.dtype)
        return rng.integers(0, 256, image.shape, image.dtype)

    def corrupt_text(self, tokens: np.ndarray, position: int, vocab_size: int) -> np.ndarray:
        """The tokens [token_len], or random ones of the text at `position`."""
        if not self._p["text"]:
            return tokens
        rng = np.random.default_rng((self._seed, position, TEXT))
        if rng.random() >= self._p["text"]:
            return tokens
        noise = np.zeros_like(tokens)
        length = int(rng.integers(1, len(tokens) + 1))
        noise[:length] = rng.integers(0, vocab_size, length)
        return noise

    def _make_text_rows(self, step: int) -> np.ndarray:
        """Row of the global batch whose text each row gets, int [batch_size]."""
        rng = np.random.default_rng((self._seed, step, BATCH))
        rows = rng.permutation(self._batch_size)
        chosen = rows[: round(self._p["batch"] * self._batch_size)]
        text_rows = np.arange(self._batch_size)
        text_rows[chosen] = rng.permutation(chosen)
        return text_rows
