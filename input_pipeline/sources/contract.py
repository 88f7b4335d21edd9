"""The contract of a source: all that training, evaluation, conversion and embedding ask of one.

A source is a class whose keyword-only arguments are the keys of config.input.source, registered
in registry.py. `Source` is required of it. `OptionalMembers` lists what it may have beside that;
readers look for each member by its name, so a source defines those that it has and no others.
Mistakes in the arguments raise base.errors.UserError.
"""

from collections.abc import Mapping, Sequence
from typing import NotRequired, Protocol, TypedDict, runtime_checkable

import numpy as np


class Captions(TypedDict):
    """The captions of an example, in lists of equal length."""

    texts: list[str]  # training draws one, evaluators use all; [] is enough for classification
    weights: NotRequired[list[float]]  # how often each is drawn, in any unit; absent: equally often
    languages: NotRequired[list[str]]  # language tag of each; '': not known


class Example(Captions):
    """What a source returns for an index."""

    # Encoded bytes, or uint8 [h, w, 3], or float32 [d] of a source of embeddings. b'': missing.
    image: bytes | np.ndarray
    id: str  # a name for messages, such as a file's; need not be unique
    label: NotRequired[int]  # the class, an index into class_names where the source has them
    shard: NotRequired[str]  # the file that the example is in; bad examples are counted by it
    source: NotRequired[str]  # name of the part of a mixture, which the mixture adds


@runtime_checkable
class Source(Protocol):
    """The required part."""

    @property
    def class_names(self) -> Sequence[str] | None:
        """Names of the classes; None: there are no labels, or labels without names."""
        ...

    def __len__(self) -> int:
        """Number of examples, which never changes."""
        ...

    def __getitem__(self, i: int, /) -> Example:
        """Example i, the same one every time; called from many threads at once.

        Raises:
          BadExample: it cannot be read. Training counts it and goes on, evaluation stops.
          IndexError: there are not so many examples.
        """
        ...


class OptionalMembers(Protocol):
    """Members that a source may have, each on its own (window goes with blocks)."""

    # Samples left out when the source was opened: (kind of BadExample, file) -> count. Training
    # holds them against max_bad_fraction, evaluation refuses any.
    damage: Mapping[tuple[str, str], int]

    # For files that are read a block at a time: the starts of the blocks and then the number of
    # examples, int64 [k + 1] or None, and how many blocks are mixed. See order.BlockEpochs.
    blocks: np.ndarray | None
    window: int

    def by_language(self) -> Mapping[str, np.ndarray]:
        """Language -> ascending indices of the examples with a text in it; {}: not known."""
        ...

    # For sources made of other sources, as in mixture.py:

    def order(self, seed: int) -> Mapping[int, int]:
        """Maps a position of the endless training stream to an index; absent: epochs."""
        ...

    identities: int  # all values of `identity` are below it

    def identity(self, i: int) -> int:
        """A number that equal examples share, whatever their index; absent: the index."""
        ...
