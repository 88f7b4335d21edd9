"""A model as a function from a batch to embeddings; evaluation, files and exports all call it."""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Array, Float

from siglip.towers.vit import images_of


def embed_batch(model: Any, params: Any, batch: Mapping[str, Array]) -> Float[Array, "n d"]:
    """Unit-norm embeddings of the images of a batch, or of its texts where it has no images.

    Args:
      model: model.apply({'params': params}, image=..., text=...) -> (zimg, ztxt, _).
      batch: the fields of an image (vit.IMAGE_FIELDS), or 'text'. Other fields are ignored.
    """
    image = images_of(batch)
    text = batch["text"] if image is None else None
    zimg, ztxt, _ = model.apply({"params": params}, image=image, text=text)
    return ztxt if zimg is None else zimg
