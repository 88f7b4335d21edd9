"""Image-text retrieval: R@1, R@5 and R@10 in both directions.

Definitions as in big_vision and CLIP_benchmark, so that numbers can be compared:
  text-to-image R@k: share of texts whose own image is among the k nearest images.
  image-to-text R@k: share of images with ANY of their texts among the k nearest texts.
Ties: of equally near candidates the one with the smaller index is nearer.
"""

import collections
import concurrent.futures
import functools
import math
from collections.abc import Iterator, Sequence

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int, Real

from base.errors import UserError
from evaluators.embed import Embedder, Tokens, tokenize
from evaluators.ranks import Ranker, best_match_ranks
from input_pipeline.transforms.canonicalize import canonicalize_text

KS = (1, 5, 10)


class Evaluator:
    """Retrieval over all images and texts of a source.

    Args:
      model: apply({'params': params}, image=..., text=...) -> (zimg, ztxt, scalars).
      mesh: the devices.
      preprocess: input_pipeline.transforms.Preprocess, as in training but without augmentation.
      source: examples with 'image', 'texts' and 'id'.
      loss_fn: not used.
      batch_size: over all devices; no result depends on it.
      captions: 'all' texts of an image (big_vision; the SigLIP papers' XM3600) or its 'first'
        (CLIP_benchmark's and open_clip's XM3600). 'all' makes image-to-text clearly higher.
      canonicalize: canonicalize_text on captions, on top of what preprocess does. big_vision does
        not, open_clip does for its SigLIP models.

    Raises:
      UserError: a value is not a valid one.
    """

    def __init__(
        self,
        model,
        mesh: Mesh,
        preprocess,
        source,
        loss_fn,
        *,
        batch_size: int = 256,
        captions: str = "all",
        canonicalize: bool = False,
    ):
        del loss_fn
        if captions not in ("all", "first"):
            raise UserError(f"captions {captions!r} is none of all, first")
        self._preprocess, self._source = preprocess, source
        self._captions, self._canonicalize = captions, canonicalize
        self._embedder = Embedder(model, mesh, preprocess, batch_size)
        self._ranker = Ranker(mesh)
        cleaning = ", canonicalised" if canonicalize else ""
        self.protocol = f"{len(source)} images, {captions} captions of each{cleaning}"

    def run(self, params) -> Iterator[tuple[str, float, float]]:
        """Yields (metric, value, chance) for 'i2t_R@k' and 't2i_R@k', all shares in [0, 1].

        Raises:
          UserError: an image does not decode, a caption is empty, an embedding is not finite.
        """
        tokens, image_of_text = self._texts
        zimg = self._embedder.images(params, self._source)
        ztxt = self._embedder.texts(params, tokens)
        images = np.arange(len(zimg))
        i2t = self._ranker(zimg, ztxt, images, image_of_text)
        t2i = self._ranker(ztxt, zimg, image_of_text, images)
        for k in KS:
            yield f"i2t_R@{k}", _recall(i2t, k), i2t_chance(k, image_of_text)
        for k in KS:
            yield f"t2i_R@{k}", _recall(t2i, k), t2i_chance(k, len(zimg))

    @functools.cached_property
    def _texts(self) -> tuple[Tokens, Int[np.ndarray, " n_texts"]]:
        """All texts, and the index of each one's image. Read once, in the first run."""

        def texts_of(i: int) -> list[str]:
            example = self._source[i]
            texts = example["texts"][: 1 if self._captions == "first" else None]
            if self._canonicalize:
                texts = [canonicalize_text(text) for text in texts]
            if not texts or not all(text.strip() for text in texts):
                raise UserError(f"{example['id']}: a caption to retrieve is missing or empty")
            return texts

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            texts = list(pool.map(texts_of, range(len(self._source))))
        image_of_text = np.repeat(np.arange(len(texts)), [len(t) for t in texts])
        return tokenize(
            self._preprocess, [t for of_image in texts for t in of_image]
        ), image_of_text


def _recall(ranks: Int[np.ndarray, " n"], k: int) -> float:
    return float(np.mean(ranks < k))


def t2i_chance(k: int, n_images: int) -> float:
    """R@k of a random order of the images."""
    return min(k / n_images, 1.0)


def i2t_chance(k: int, image_of_text: Sequence[int] | Int[np.ndarray, " n_texts"]) -> float:
    """R@k of a random order of the M texts: mean over images of 1 - C(M - c, k) / C(M, k).

    c is the number of the image's texts; an image has at least one.
    """
    m = len(image_of_text)
    k = min(k, m)
    texts_of = collections.Counter(np.asarray(image_of_text).tolist())
    images_with = collections.Counter(texts_of.values())
    orders = math.comb(m, k) * len(texts_of)
    misses = sum(n * math.comb(m - c, k) for c, n in images_with.items())
    return (orders - misses) / orders  # integers until here


def text_to_image_retrieval_eval(
    dist_matrix: Real[np.ndarray, "n_images n_texts"],
    text_image_correspondence: Sequence[int] | Int[np.ndarray, " n_texts"],
) -> dict[str, float]:
    """Recall of a matrix of distances (small is near), by big_vision's contract of this name.

    Args:
      dist_matrix: images in rows, texts in columns.
      text_image_correspondence: for each text the row of its image.

    Returns:
      {'Recall@1', 'Recall@5', 'Recall@10'}; k may exceed the number of candidates.

    Raises:
      ValueError: a distance is NaN.
    """
    images, texts = np.arange(len(dist_matrix)), np.asarray(text_image_correspondence)
    return _recalls(best_match_ranks(_similarity(dist_matrix).T, texts, images))


def image_to_text_retrieval_eval(
    dist_matrix: Real[np.ndarray, "n_images n_texts"],
    text_image_correspondence: Sequence[int] | Int[np.ndarray, " n_texts"],
) -> dict[str, float]:
    """As text_to_image_retrieval_eval, for images as queries: any of an image's texts is a hit."""
    images, texts = np.arange(len(dist_matrix)), np.asarray(text_image_correspondence)
    return _recalls(best_match_ranks(_similarity(dist_matrix), images, texts))


def _similarity(dist_matrix: Real[np.ndarray, "n m"]) -> Float[np.ndarray, "n m"]:
    dist_matrix = np.asarray(dist_matrix, np.float64)
    if np.isnan(dist_matrix).any():
        raise ValueError("dist_matrix has NaN, which has no rank")
    return -dist_matrix


def _recalls(ranks) -> dict[str, float]:
    return {f"Recall@{k}": _recall(ranks, k) for k in KS}
