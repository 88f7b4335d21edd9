"""The training loss on held-out pairs.

The loss is a property of a batch, not of a pair, as each pair is compared with the others of its
batch. So the value grows with batch_size, like ln n for a model that knows nothing, and the chance
level grows with it: only losses of equal batch_size compare.
"""

from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from base.errors import UserError
from evaluators.embed import eval_image, fetch, host_batches
from evaluators.strict_source import ADVICE
from siglip.losses.definitions import Loss
from siglip.losses.facts import facts
from siglip.sharding import check_batch_size, replicated
from siglip.towers.vit import images_of

SEED = 0  # of what is random in a loss: the same parameters always get the same number


class Evaluator:
    """Mean loss over batches of consecutive pairs; an image counts with its first text.

    Args:
      model: apply({'params': params}, image=..., text=...) -> (zimg, ztxt, {'t', 'b'}).
      mesh: the devices.
      preprocess: input_pipeline.transforms.Preprocess, as in training but without augmentation.
      source: examples with 'image', 'texts' and 'id'.
      loss_fn: the training loss. Random negatives are the same draw of rows in every batch and
        every evaluation.
      batch_size: pairs in a batch, over all devices. THE RESULT DEPENDS ON IT.

    Raises:
      UserError: the devices do not divide batch_size.
    """

    def __init__(
        self, model, mesh: Mesh, preprocess, source, loss_fn: Loss, *, batch_size: int = 256
    ):
        check_batch_size("batch_size", batch_size, mesh)
        self._mesh, self._preprocess, self._source = mesh, preprocess, source
        self._batch_size = batch_size
        self._chance = loss_fn.chance
        self.protocol = f"{len(source)} pairs (first captions) in batches of {batch_size}"

        def loss(params, batch: dict[str, Array]) -> tuple[Float[Array, ""], Int[Array, ""]]:
            zimg, ztxt, scalars = model.apply(
                {"params": params}, image=images_of(batch), text=batch["text"], train=False
            )
            extras = facts(loss_fn.needs, batch, seed=SEED, step=0)
            value = loss_fn(zimg, ztxt, scalars["t"], scalars["b"], batch["mask"], **extras)
            return value, batch["mask"].sum()

        self._loss = jax.jit(loss, out_shardings=replicated(mesh))

    def run(self, params) -> Iterator[tuple[str, float, float | None]]:
        """Yields ('loss', value, chance): means over pairs, so a short last batch counts less.
        Chance is None where the loss states none.

        Raises:
          UserError: an image does not decode, or the loss is not finite.
        """
        batches = host_batches(self._source, self._pair, self._batch_size)
        results = list(fetch(self._loss, params, batches, self._mesh))
        values = np.array([float(value) for value, _ in results])
        counts = np.array([int(n) for _, n in results])
        if counts.sum() != len(self._source):
            raise AssertionError(f"{counts.sum()} pairs counted of {len(self._source)}")
        if not np.isfinite(values).all():
            raise UserError("the validation loss is not finite: these parameters are broken")
        chance = None
        if self._chance is not None:
            chances = np.array([self._chance(int(n)) for n in counts])
            chance = float(chances @ counts / counts.sum())
        yield "loss", float(values @ counts / counts.sum()), chance

    def _pair(self, example: dict) -> dict[str, np.ndarray]:
        if not example["texts"]:
            raise UserError(f"{example['id']} has no caption; {ADVICE}")
        text = self._preprocess.text(example["texts"][0])
        return {**eval_image(self._preprocess, example), "text": text}
