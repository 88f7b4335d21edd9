"""The rules for which pairs of a batch are positive, negative, or left out of the loss.

Plainly, pair (i, j) is positive where i == j and negative elsewhere (arXiv 2303.15343, Alg. 1).
Two options change that, for the definition (`labels`) and the ring (`Pairs`) alike:

* Duplicates: pairs whose rows share an id (the same caption, the same image) are false negatives.
  'ignore' leaves them out, 'positive' makes them positives.
* Negative selection (section 4.8): each image keeps `ratio` of its negatives in the global batch:
  'hard' those with the highest loss, 'easy' those with the lowest, 'random' any. As t > 0, the
  loss of a negative grows with its cosine, so ranks are those of cosines. Ties with the last one
  kept are kept as well. The loss is still divided by the number of pairs that are given.
  Ranking is per image over the global batch, wherever the negatives are (negatives.py).
"""

import dataclasses
import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Integer, UInt32

NEGATIVES = ("all", "random", "hard", "easy")
DUPLICATES = ("negative", "ignore", "positive")


@dataclasses.dataclass(frozen=True)
class Pairs:
    """The options of pairs, see above. `ratio` is the number of negatives that an image keeps."""

    negatives: str = "all"
    ratio: int = 0
    duplicates: str = "negative"

    def __post_init__(self):
        if self.negatives not in NEGATIVES:
            raise ValueError(f"negatives {self.negatives!r} is none of {', '.join(NEGATIVES)}")
        if self.duplicates not in DUPLICATES:
            raise ValueError(f"duplicates {self.duplicates!r} is none of {', '.join(DUPLICATES)}")
        if self.negatives != "all" and self.ratio < 1:
            raise ValueError(
                f"negatives {self.negatives!r} needs ratio, the negatives that each image keeps: "
                f"at least 1, not {self.ratio}"
            )
        if self.negatives == "all" and self.ratio:
            raise ValueError(f"ratio {self.ratio} needs negatives: random, hard or easy")

    @property
    def plain(self) -> bool:
        return self.negatives == "all" and self.duplicates == "negative"

    @property
    def needs(self) -> tuple[str, ...]:
        """The facts of a batch that these options ask for (facts.FACTS)."""
        ids = () if self.duplicates == "negative" else ("ids",)
        return (*ids, "seed") if self.negatives == "random" else ids

    def prior_loss(self, n: int) -> float:
        """Sigmoid loss, in nats per pair, of a model that knows only that 1 of n texts is the
        image's: m binary decisions of probability 1/m, together m H(1/m) = ln m + (m-1) ln(m /
        (m-1)), where m - 1 is the number of negatives that an image keeps."""
        m = min(n, self.ratio + 1) if self.ratio else n
        return math.log(m) + (m - 1) * math.log(m / (m - 1)) if m > 1 else 0.0

    def label(
        self, img: dict, txt: dict, diagonal: Bool[Array, "r c"] | None
    ) -> tuple[Array | None, Array | None]:
        """Masks (positive, counted) over pairs; None where no pair is positive, where all count.

        Args:
          img, txt: properties of the images and of the texts, shaped to broadcast against each
            other: 'mask', and 'ids' with a trailing axis. Absent where there are none.
          diagonal: True where both rows are one example; None where none are.
        """
        positive, counted = diagonal, None
        if "mask" in img:
            counted = img["mask"] & txt["mask"]
        if self.duplicates != "negative":
            same = jnp.any((img["ids"] == txt["ids"]) & (img["ids"] >= 0), axis=-1)
            if self.duplicates == "positive":
                positive = same if diagonal is None else same | diagonal
            else:
                others = ~same if diagonal is None else ~same | diagonal
                counted = others if counted is None else counted & others
        return positive, counted

    def key(
        self, s: Float[Array, "*pairs"] | None, img: dict, txt: dict, seed
    ) -> UInt32[Array, "*pairs"]:
        """Keys that order negatives: those with the largest are kept. `s` are cosines, which random
        negatives do not need."""
        if self.negatives == "random":
            return pair_hash(seed, img["index"], txt["index"])
        assert s is not None
        # Negated for easy ones, and -0 is 0. Unsigned order of the bits is then that of the
        # numbers, once the sign bit is flipped, and all bits of negative ones.
        s = jnp.where(s == 0, 0.0, -s if self.negatives == "easy" else s)
        bits = lax.bitcast_convert_type(s, jnp.uint32)
        sign = jnp.uint32(2**31)
        return jnp.where(bits >= sign, ~bits, bits | sign)


def labels(
    pairs: Pairs,
    zimg: Float[Array, "n d"],
    ztxt: Float[Array, "n d"],
    mask: Bool[Array, " n"] | None = None,
    ids: Int[Array, "n k"] | None = None,
    seed: Integer[Array, ""] | int = 0,
) -> Int[Array, "n n"]:
    """The labels z of definitions.sigmoid_loss: +1 positive, -1 negative, 0 left out."""
    n = len(zimg)
    rows = {"index": jnp.arange(n)}
    rows |= {} if mask is None else {"mask": mask}
    rows |= {} if ids is None else {"ids": ids}
    img, txt = facing(rows, rows)
    positive, counted = pairs.label(img, txt, jnp.eye(n, dtype=bool))
    assert positive is not None  # the diagonal at least
    counted = jnp.ones((n, n), bool) if counted is None else counted
    negative = counted & ~positive
    if pairs.negatives != "all":
        s = jnp.matmul(zimg, ztxt.T, precision="highest")
        keys = jnp.where(negative, pairs.key(s, img, txt, seed), 0)
        least = jnp.sort(keys, axis=1)[:, max(0, n - pairs.ratio)]
        negative &= keys >= least[:, None]
    return jnp.where(counted & positive, 1, 0) - jnp.where(negative, 1, 0)


def facing(rows: dict, columns: dict) -> tuple[dict, dict]:
    """Properties of two sets of rows, shaped to broadcast against each other over pairs."""
    down = {k: jnp.expand_dims(v, 1) for k, v in rows.items()}
    across = {k: jnp.expand_dims(v, 0) for k, v in columns.items()}
    return down, across


# Ids and hashes


def pair_hash(seed, i: Int[Array, "..."], j: Int[Array, "..."]) -> UInt32[Array, "..."]:
    """A hash of (seed, i, j), uniform over 32 bits and the same on every device."""
    row = _mix(i.astype(jnp.uint32) ^ _mix(jnp.asarray(seed, jnp.uint32)))
    return _mix(row + _mix(j.astype(jnp.uint32) ^ jnp.uint32(0x9E3779B9)))


def ids(text: Int[Array, "n l"], index: Int[Array, " n"] | None = None) -> Int[Array, "n k"]:
    """Ids of the rows of a batch: rows with equal captions (empty ones too) agree in a column, and
    so do rows that are the same example."""
    columns = [row_hash(text)] + ([] if index is None else [index])
    return jnp.stack(columns, axis=1)


def row_hash(tokens: Int[Array, "n l"]) -> Int[Array, " n"]:
    """A 31-bit hash of each row: equal rows agree, and of 2**31 pairs of unequal rows about one."""
    h = jnp.zeros(len(tokens), jnp.uint32)
    for column in range(tokens.shape[1]):
        h = _mix(h * jnp.uint32(31) + tokens[:, column].astype(jnp.uint32) + jnp.uint32(1))
    return (h >> jnp.uint32(1)).astype(jnp.int32)


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    # The 32-bit finaliser "lowbias32" (Chris Wellons, Prospecting for Hash Functions).
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> jnp.uint32(shift))) * jnp.uint32(factor)
    return x ^ (x >> jnp.uint32(16))


def log_odds(batch_size: int, ratio: int = 0) -> float:
    """The bias log(p / (1 - p)), at which the sigmoid is the share p of positives among the pairs.

    p = 1 / N over all pairs of a batch; 1 / (1 + ratio) where an image keeps `ratio` negatives.
    """
    negatives = max(batch_size - 1, 1)
    return -math.log(min(ratio, negatives) if ratio else negatives)


def check_ids(pairs: Pairs, ids: Int[Array, "n k"] | None) -> None:
    """Raises ValueError where the options need ids and there are none."""
    if pairs.duplicates != "negative" and ids is None:
        raise ValueError(f"duplicates {pairs.duplicates!r} needs ids of the rows")
