"""The training loss on held-out pairs.

The loss is a property of a batch, not of a pair: a pair is compared with the others of its batch,
so the value grows with batch_size (with a model that knows nothing, like ln n) and only losses of
equal batch_size compare. The chance level grows in the same way.
"""

import math
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from evaluators.embed import check_batch_size, eval_image, fetch, host_batches
from input_pipeline.errors import UserError
from siglip.sharding import replicated


class Evaluator:
    """Mean loss over batches of consecutive pairs; an image counts with its first text.

    Args:
      model: apply({'params': params}, image=..., text=...) -> (zimg, ztxt, {'t', 'b'}).
      mesh: the devices.
      preprocess: input_pipeline.transforms.Preprocess, as in training but without augmentation.
      source: examples with 'image', 'texts' and 'id'.
      loss_fn: loss_fn(zimg, ztxt, t, b, mask) -> scalar on global arrays, per unmasked pair. Its
        attribute `chance`, a function of the number of pairs, is the loss of a model that knows
        only the prior; without one see `prior_loss`.
      batch_size: pairs in a batch, over all devices. THE RESULT DEPENDS ON IT.

    Raises:
      UserError: the devices do not divide batch_size.
    """

    def __init__(self, model, mesh: Mesh, preprocess, source, loss_fn, *, batch_size: int = 256):
        check_batch_size(batch_size, mesh)
        self._mesh, self._preprocess, self._source = mesh, preprocess, source
        self._batch_size = batch_size
        self._chance: Callable[[int], float] | None = getattr(loss_fn, "chance", None)
        self.protocol = f"{len(source)} pairs (first captions) in batches of {batch_size}"

        def loss(params, batch: dict[str, Array]) -> tuple[Array, Array, Array | None]:
            zimg, ztxt, scalars = model.apply(
                {"params": params}, image=batch["image"], text=batch["text"], train=False
            )
            value = loss_fn(zimg, ztxt, scalars["t"], scalars["b"], batch["mask"])
            return value, batch["mask"].sum(), scalars["b"]

        self._loss = jax.jit(loss, out_shardings=replicated(mesh))

    def run(self, params) -> Iterator[tuple[str, float, float]]:
        """Yields ('loss', value, chance): means over pairs, so a short last batch counts less.

        Raises:
          UserError: an image does not decode, or the loss is not finite.
        """
        batches = host_batches(self._source, self._pair, self._batch_size)
        results = list(fetch(self._loss, params, batches, self._mesh))
        values = np.array([float(value) for value, _, _ in results])
        pairs = np.array([int(n) for _, n, _ in results])
        if pairs.sum() != len(self._source):
            raise AssertionError(f"{pairs.sum()} pairs counted of {len(self._source)}")
        if not np.isfinite(values).all():
            raise UserError("the validation loss is not finite: these parameters are broken")
        has_bias = results[0][2] is not None
        chance = self._chance or (lambda n: prior_loss(n, has_bias=has_bias))
        chances = np.array([chance(int(n)) for n in pairs])
        yield "loss", float(values @ pairs / pairs.sum()), float(chances @ pairs / pairs.sum())

    def _pair(self, example: dict) -> dict[str, np.ndarray]:
        text = self._preprocess.text(example["texts"][0])
        return {"image": eval_image(self._preprocess, example), "text": text}


def prior_loss(n: int, *, has_bias: bool) -> float:
    """Loss, in nats per pair, of a model that knows only that 1 of n texts is the image's.

    With a bias, the sigmoid loss: each pair sums n binary decisions of probability 1/n, together
    n H(1/n) = ln n + (n-1) ln(n / (n-1)). Without one, the softmax loss: ln n.
    """
    if n <= 1:
        return 0.0
    return math.log(n) + (has_bias and (n - 1) * math.log(n / (n - 1)))
