"""Zero-shot classification with class names written into prompt templates.

The text embeddings of a class's prompts are averaged and normalised again; an image belongs to the
class of the largest cosine. Temperature and bias do not matter. Ties: of equally near classes the
one with the smaller label is nearer, as argmax has it.
"""

import functools
from collections.abc import Iterator

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from base.errors import UserError
from evaluators.embed import Embedder, Tokens, eval_image, tokenize
from evaluators.ranks import Ranker
from input_pipeline.transforms.prompts import class_prompts, resolve_classnames, resolve_templates


class Evaluator:
    """Zero-shot classification of all images of a source.

    Args:
      model: apply({'params': params}, image=..., text=...) -> (zimg, ztxt, scalars).
      mesh: the devices.
      preprocess: input_pipeline.transforms.Preprocess, as in training but without augmentation.
      source: examples with 'image', 'label' and 'id'.
      loss_fn: not used.
      batch_size: over all devices; no result depends on it.
      classnames: 'source' (its class_names), 'imagenet' (CLIP's 1,000), or a tuple of names in the
        order of the labels.
      templates: strings with '{}' and names of sets: clip_paper (81), clip_best (8),
        class_name_only.
      canonicalize: lower case and no punctuation in names and templates, as in big_vision.
      aliases: where a class name has commas, 'first' uses the part before the first one and 'all'
        averages over the prompts of all parts.

    Raises:
      UserError: a value is not a valid one, or there are no class names.
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
        classnames: tuple | str = "source",
        templates: tuple | str = ("clip_paper",),
        canonicalize: bool = True,
        aliases: str = "first",
    ):
        del loss_fn
        self._preprocess, self._source = preprocess, source
        self._embedder = Embedder(model, mesh, preprocess, batch_size)
        self._ranker = Ranker(mesh)
        templates = resolve_templates(templates)
        names = resolve_classnames(classnames, source.class_names)
        self._prompts = class_prompts(names, templates, canonicalize=canonicalize, aliases=aliases)
        cleaning = "canonicalised" if canonicalize else "as written"
        self.protocol = (
            f"{len(source)} images, {len(names)} classes, {len(templates)} templates, "
            f"names and templates {cleaning}, {aliases} aliases"
        )

    def run(self, params) -> Iterator[tuple[str, float, float]]:
        """Yields (metric, value, chance), all shares in [0, 1].

        'top1'; 'top5' for more than 5 classes; 'mean_per_class_recall', the mean over the classes
        that occur of the top-1 share among their images.

        Raises:
          UserError: an image does not decode, a label is missing or out of range, an embedding is
            not finite.
        """
        zcls = self._class_embeddings(params)
        rows = self._embedder.rows(params, self._source, self._image_and_label)
        label, n_classes = rows["label"], len(zcls)
        ranks = self._ranker(rows["z"], zcls, label, np.arange(n_classes))
        yield "top1", float(np.mean(ranks < 1)), 1 / n_classes
        if n_classes > 5:
            yield "top5", float(np.mean(ranks < 5)), 5 / n_classes
        images_of = np.bincount(label, minlength=n_classes)
        hits_of = np.bincount(label, weights=ranks < 1, minlength=n_classes)
        occurs = images_of > 0
        yield (
            "mean_per_class_recall",
            float(np.mean(hits_of[occurs] / images_of[occurs])),
            1 / n_classes,
        )

    def _class_embeddings(self, params) -> Float[np.ndarray, "classes d"]:
        ztxt = self._embedder.texts(params, self._tokens)
        ends = np.cumsum([len(prompts) for prompts in self._prompts])[:-1]
        return np.stack([unit_mean(z) for z in np.split(ztxt, ends)])

    @functools.cached_property
    def _tokens(self) -> Tokens:
        return tokenize(self._preprocess, [p for prompts in self._prompts for p in prompts])

    def _image_and_label(self, example: dict) -> dict[str, np.ndarray]:
        label = example.get("label")
        if label is None or not 0 <= label < len(self._prompts):
            raise UserError(
                f"{example['id']}: label {label} is none of the {len(self._prompts)} classes "
                "0, 1, ...; zero-shot classification needs one for every image"
            )
        return {**eval_image(self._preprocess, example), "label": np.array(label, np.int32)}


def unit_mean(z: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " d"]:
    """The normalised mean of unit vectors. Vectors that cancel give zeros, not NaN."""
    mean = z.mean(axis=0)
    return mean / max(float(np.linalg.norm(mean)), 1e-8)
