"""Embeddings of a whole data set, computed on every device of every process."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Shaped

from base.errors import UserError
from evaluators.strict_source import ADVICE
from input_pipeline import loader
from input_pipeline.errors import BadExample
from siglip.embed import embed_batch
from siglip.sharding import check_batch_size, replicated, to_device
from siglip.towers.vit import IMAGE_FIELDS


class Embedder:
    """Embeds whole sets of examples, on every device of every process.

    Args:
      model, mesh, preprocess: see the evaluators.
      batch_size: examples at a time, over all devices and processes. No result depends on it.

    Raises:
      UserError: the devices do not divide batch_size.
    """

    def __init__(self, model, mesh: Mesh, preprocess, batch_size: int):
        check_batch_size("batch_size", batch_size, mesh)
        self._mesh, self._preprocess, self._batch_size = mesh, preprocess, batch_size

        def embed(params, batch: dict[str, Array]) -> dict[str, Array]:
            rest = {k: v for k, v in batch.items() if k not in (*IMAGE_FIELDS, "text")}
            return {**rest, "z": embed_batch(model, params, batch)}

        self._embed = jax.jit(embed, out_shardings=replicated(mesh))

    def images(self, params, examples: loader.Examples) -> Float[np.ndarray, "n d"]:
        """zimg of the examples, in their order."""
        fn = functools.partial(eval_image, self._preprocess)
        return self.rows(params, examples, fn)["z"]

    def texts(self, params, tokens: "Tokens") -> Float[np.ndarray, "n d"]:
        """ztxt of the texts, in their order; equal texts get equal embeddings, to the last bit."""
        rows = self.rows(params, list(tokens.distinct), lambda ids: {"text": ids})
        return rows["z"][tokens.index]

    def rows(
        self, params, examples: loader.Examples, fn: Callable[[Any], dict]
    ) -> dict[str, np.ndarray]:
        """Embeds the image or the 'text' of fn(example); every other array of it passes through.

        Args:
          params: of the model, in any placement on the mesh.
          examples: a source, or a list, the same on every process; each reads its share only.
          fn: runs in the loader's threads.

        Returns:
          {'z': f32 [len(examples), d], ...}, in the order of the examples, on every process.

        Raises:
          UserError: there are no examples, or an embedding is not finite.
        """
        # A short data set does not need a whole batch of padding.
        devices = self._mesh.size
        size = min(self._batch_size, -(-len(examples) // devices) * devices)
        batches = host_batches(examples, fn, size)
        parts = [_real_rows(batch) for batch in fetch(self._embed, params, batches, self._mesh)]
        rows = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        # A mesh may order devices otherwise than by process, and with them the rows.
        index = rows.pop("index")
        rows = {key: value[np.argsort(index)] for key, value in rows.items()}
        if not np.array_equal(np.sort(index), np.arange(len(examples))):
            raise AssertionError(f"{len(index)} embeddings of {len(examples)} examples")
        if not np.isfinite(rows["z"]).all():
            # NaN compares false with everything, which would look like a perfect rank.
            raise UserError(
                f"{(~np.isfinite(rows['z']).all(axis=1)).sum()} of {len(examples)} embeddings are "
                "not finite: these parameters are broken, evaluate an earlier checkpoint"
            )
        return rows


def _real_rows(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    mask = batch.pop("mask")
    return {key: value[mask] for key, value in batch.items()}


def host_batches(examples: loader.Examples, fn: Callable, batch_size: int) -> loader.Batches:
    """This process's rows of batches of `batch_size`, each example once and the last batch padded.

    Raises:
      UserError: there are no examples.
    """
    if not len(examples):
        raise UserError("there is nothing to evaluate on: the source has no examples")
    return loader.eval_batches(
        examples,
        fn,
        batch_size=batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def fetch(fn: Callable, params, batches: loader.Batches, mesh: Mesh) -> Iterator:
    """Yields fn(params, global batch) as NumPy arrays, each while the devices work on the next.

    Never more than two run at once, so that memory stays bounded.
    """
    running = None
    with batches:  # an error leaves no threads behind
        for batch in batches:
            started = fn(params, to_device(batch, mesh))
            if running is not None:
                yield jax.tree.map(np.asarray, running)
            running = started
    yield jax.tree.map(np.asarray, running)


def eval_image(preprocess, example: dict) -> dict[str, np.ndarray]:
    """The image without augmentation, as fields of a row (vit.IMAGE_FIELDS).

    Raises:
      UserError: it does not decode; an evaluation skips nothing.
    """
    try:
        return preprocess.pixels(example)
    except BadExample as bad:
        raise UserError(f"image {example['id']} cannot be read ({bad}); {ADVICE}") from bad


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Tokenised texts, equal ones kept once: text i is distinct[index[i]]."""

    distinct: Int[np.ndarray, "u l"]
    index: Int[np.ndarray, " n"]


def tokenize(preprocess, texts: Sequence[str]) -> Tokens:
    """Cleans and tokenises texts. Those that become the same tokens are kept once."""
    return Tokens(*unique_rows(np.stack([preprocess.text(text) for text in texts])))


def unique_rows(
    x: Shaped[np.ndarray, "n l"],
) -> tuple[Shaped[np.ndarray, "u l"], Int[np.ndarray, " n"]]:
    """(distinct rows in order of first appearance, int32 index) with x == distinct[index]."""
    seen: dict[bytes, int] = {}
    index = np.array([seen.setdefault(row.tobytes(), len(seen)) for row in x], np.int32)
    first = np.unique(index, return_index=True)[1]
    return x[first], index
