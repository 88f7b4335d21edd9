"""The contract of an objective: what one training step optimises.

Every loss of this field is a sum over examples (captioning, distillation, masked patches), or a
function of all embeddings of the batch (sigmoid, softmax), or both. A factory
`make_x(model, mesh, *, my_option=1.0) -> Objective` and a line in OBJECTIVES of
siglip/objectives/__init__.py make `config.objectives.any_name.name=x` work, in microbatches, with
frozen towers, a teacher, and state that is handed from step to step.
"""

import dataclasses
import zlib
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from siglip.losses.facts import check_needs
from siglip.towers.shards import Known, gather_outside_blocks
from siglip.towers.two_towers import TOWERS
from siglip.towers.vit import images_of

Params = dict[str, Any]


class Rows(NamedTuple):
    """What an objective makes of the n rows of one microbatch on one device.

    Attributes:
      z: name -> [n, ...], what `batch` must see of every example. The name, up to a '/', is the
        subtree of the parameters that made it ('img', 'txt', 'decoder', 'img/local'): where that
        subtree is frozen, z gets no gradient and the loss saves the matmul of it. So it is with
        'averaged/...', a teacher's, and with what is not a floating-point number.
      total: sum of the objective's loss over the rows whose `mask` is True; the step divides the
        sum over all microbatches and devices by the number of those rows.
      stats: pytree of sums over rows, which `carry` gets, added up over microbatches and devices.
    """

    z: dict[str, Array] = {}  # noqa: RUF012  # read only
    total: Array | float = 0.0
    stats: PyTree = ()


@dataclasses.dataclass(frozen=True)
class Objective:
    """One term of the training loss: pure functions, of which only `rows` is required.

    Attributes:
      rows: (params, averaged, carried, part, key) -> Rows. `params` is the whole tree, `averaged`
        the moving averages that config.average keeps (a teacher, {} without), `carried` this
        objective's own state, `part` one device's rows of one microbatch (see Part): arrays are
        ordinary ones, and nothing is exchanged with other devices. `key` differs every step and
        is the same for all microbatches and devices: fold part.batch['row'] in.
      init: (key, params) -> {subtree: parameters} that this objective adds to those of the towers,
        such as a decoder or a head; named as no other subtree is.
      batch: (z, params, facts) -> scalar, a loss of the whole batch, on global arrays. `z` joins
        the microbatches; `params` holds the parameters named in `reads`; `facts` holds `mask` and
        what `needs` names.
      reads: parameters at the top of the tree that `batch` uses beside z, such as 't' and 'b'.
      needs: facts of the batch that `batch` asks for (siglip.losses.facts).
      capture: outputs of the towers that `rows` uses and that are made only where they are asked
        for, such as 'img/block:-2' and 'txt/attention'. All objectives' are captured in one pass.
      metrics: (z, params, facts, logged) -> {name: scalar} for the log; what costs much is made
        only `when(logged, ...)`.
      start: () -> the first `carried`, a pytree of arrays.
      carry: (carried, stats, count) -> the next `carried`; no gradient passes, `count` is the
        number of rows in the sums.
      weight: of this term in the loss.

    Raises:
      ValueError: one of start and carry is given without the other, or `needs` names no fact.
    """

    rows: Callable[..., Rows]
    init: Callable[[Array, Params], Params] | None = None
    batch: Callable[..., Array] | None = None
    reads: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    capture: tuple[str, ...] = ()
    metrics: Callable[..., dict[str, Array]] | None = None
    start: Callable[[], PyTree] | None = None
    carry: Callable[..., PyTree] | None = None
    weight: float = 1.0

    def __post_init__(self):
        if (self.start is None) != (self.carry is None):
            raise ValueError("an objective has both start and carry, or neither")
        check_needs("an objective", self.needs)


class Part:
    """One device's rows of one microbatch, and the towers.

    Objectives that call a tower with the same parameters share one forward and one backward pass.

    Attributes:
      batch: the fields of the batch, [n, ...] each, of these rows: image (image_mask and
        image_shape of NaFlex), text, mask, and row (place in the whole batch).
    """

    def __init__(
        self,
        model: Any,
        batch: Mapping[str, Array],
        key: Array,
        capture: Collection[str] = (),
        known: Known | None = None,
    ):
        """Args: see Objectives, which makes parts; `capture` is that of all objectives, `known`
        has the shards of parameters that are split over devices."""
        self.batch = batch
        self._model, self._key, self._known = model, key, known or Known()
        split = sorted({tuple(name.split("/", 1)) for name in capture})
        self._capture = {
            tower: tuple(output for of, output in split if of == tower) for tower in TOWERS
        }
        self._outputs: list[tuple] = []  # of one trace: a handful

    def img(self, params: Params) -> tuple[Array, dict[str, Any]]:
        """(zimg [n, d] of unit norm, out) of the images, as TwoTowers.encode_image gives them."""
        return self._once("img", params, images_of(self.batch), "encode_image")

    def txt(self, params: Params) -> tuple[Array, dict[str, Any]]:
        """(ztxt [n, d] of unit norm, out) of the texts, as TwoTowers.encode_text gives them."""
        return self._once("txt", params, self.batch["text"], "encode_text")

    def _once(self, tower: str, params: Params, inputs: Any, method: str) -> Any:
        for known_params, known_tower, output in self._outputs:
            if known_params is params and known_tower == tower:
                return output
        own = {tower: params[tower]} if tower in params else {}  # a precomputed tower has none
        z, out = self._model.apply(
            {"params": gather_outside_blocks(self._known.shards(own))},
            inputs,
            rows=self.batch["row"],
            train=True,
            capture=self._capture[tower],
            rngs={"dropout": self._key},
            method=method,
        )
        self._outputs.append((params, tower, (z, out)))
        return z, out


def objective_key(key: Array, name: str) -> Array:
    """A random key for the objective of this name, the same in every process."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()) % 2**31)


def when(wanted: Array, f: Callable, *args) -> PyTree:
    """f(*args) where `wanted`, else NaN in its place: for numbers that only some steps log."""
    nothing = jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan, x.dtype), jax.eval_shape(f, *args))
    return jax.lax.cond(wanted, f, lambda *_: nothing, *args)
