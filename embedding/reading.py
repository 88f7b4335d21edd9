"""Rows of a source on their way to being embedded: their order, and what the host keeps."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from base.errors import UserError
from input_pipeline.bad_examples import BadExamples
from input_pipeline.errors import BadExample

TRIES = 64  # examples from all over the source, for one that shows what a row is like


class Slots(Sequence[int]):
    """Rows of the source in the order in which they are embedded, for whole batches: after the last
    row of a shard follow places without one, -1.

    Args:
      examples: of the source.
      shards: ascending.

    Attributes:
      rows: how many of the places have a row.
    """

    def __init__(self, examples: int, shards: Sequence[int], shard_rows: int, batch_size: int):
        self._examples, self._shards, self._size = examples, shards, shard_rows
        self._padded = -(-shard_rows // batch_size) * batch_size
        last = min(shard_rows, examples - shards[-1] * shard_rows) if shards else 0
        self.rows = max(0, len(shards) - 1) * shard_rows + last
        end = -(-last // batch_size) * batch_size
        self._length = max(0, len(shards) - 1) * self._padded + end

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, place: Any) -> int:
        which, inside = divmod(place, self._padded)
        row = self._shards[which] * self._size + inside
        return row if inside < self._size and row < self._examples else -1


class Row(NamedTuple):
    """What the host keeps of an example until its embeddings are there."""

    id: str
    shard: str
    texts: list[str]
    tokens: list[np.ndarray]
    languages: list[str] | None
    weights: list[float] | None
    label: int | None
    bad: BadExample | None


class Reader:
    """Examples to rows of a batch, in the loader's threads; what is no array waits in `taken`."""

    def __init__(self, source: Any, preprocess: Any, zeros: dict[str, np.ndarray]):
        self._source, self._preprocess, self._texts = source, preprocess, "text" in zeros
        self.zeros = {key: value for key, value in zeros.items() if key != "text"}
        self._rows: dict[int, Row] = {}  # one operation each, so threads need no lock

    def row(self, i: int) -> dict[str, np.ndarray]:
        fields = self.zeros
        if i >= 0:
            example: dict[str, Any] = {}
            try:
                example = self._source[i]
                fields = self._preprocess.pixels(example) if self.zeros else {}
                self._rows[i] = self._row(example)
            except BadExample as error:
                fields = self.zeros
                name = error.id or _text(example.get("id", f"[{i}]"))
                shard = error.shard or example.get("shard", "")
                self._rows[i] = Row(name, shard, [], [], None, None, None, error)
        for key, like in self.zeros.items():
            if fields[key].shape != like.shape or fields[key].dtype != like.dtype:
                raise UserError(
                    f"{key} of example {i} is {fields[key].dtype}{list(fields[key].shape)}, that "
                    f"of another {like.dtype}{list(like.shape)}; a batch needs equal ones"
                )
        return {**fields, "row": np.asarray(i, np.int64)}

    def taken(self, i: int) -> Row:
        return self._rows.pop(i)

    def _row(self, example: dict[str, Any]) -> Row:
        texts, label = [_text(text) for text in example["texts"]], example.get("label")
        languages, weights = example.get("languages"), example.get("weights")
        for parallel in (languages, weights):
            if parallel is not None and len(parallel) != len(texts):
                raise BadExample("damaged record", f"{len(parallel)} of {len(texts)} texts")
        if label is not None and not -(2**63) <= label < 2**63:
            raise BadExample("damaged record", f"its label is {label}")
        return Row(
            _text(example["id"]),
            example.get("shard", ""),
            texts,
            [self._preprocess.text(text) for text in texts] if self._texts else [],
            None if languages is None else [_text(language) for language in languages],
            None if weights is None else [float(weight) for weight in weights],
            None if label is None else int(label),
            None,
        )


def zeros_of(source: Any, preprocess: Any, what: Sequence[str]) -> dict[str, np.ndarray]:
    """Empty rows: the fields of an image and `text`, as far as they are embedded."""
    zeros: dict[str, np.ndarray] = {}
    if "image" in what:
        zeros |= {k: np.zeros_like(v) for k, v in _one(source, preprocess).items()}
    if "text" in what:
        zeros["text"] = np.zeros_like(preprocess.text(""))
    return zeros


def _one(source: Any, preprocess: Any) -> dict[str, np.ndarray]:
    """The image of any good example, from all over the source."""
    bad, tries = BadExamples(), min(TRIES, len(source))
    for i in range(tries):
        example: dict[str, Any] = {}
        try:
            example = source[i * len(source) // tries]
            return preprocess.pixels(example)
        except BadExample as error:
            bad.record(error, _text(example.get("id", "")), example.get("shard", ""))
    kinds = ", ".join(f"{count} {kind}" for kind, count in bad.kinds().items())
    raise UserError(f"none of {tries} examples from all over can be used ({kinds}); {bad.worst()}")


def _text(value: Any) -> str:
    """As it can be written: half a character pair becomes '?'."""
    return str(value).encode("utf-8", "replace").decode("utf-8")
