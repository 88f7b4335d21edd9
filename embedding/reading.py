"""Reading examples for embedding: their order, what waits for results, how many may be bad."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from base.errors import UserError
from input_pipeline.bad_examples import BadExamples, mostly_bad, too_many
from input_pipeline.errors import BadExample

SAMPLES = 64  # examples read from all over the source until one shows the shapes of a row
MIN_SAMPLE = 1000  # rows, of which more than half are bad only where something is wrong with all


class Slots(Sequence[int]):
    """The indices of the rows to embed, shard after shard, each shard filled up with -1 to whole
    batches.

    Args:
      examples: the length of the source.
      shards: the shards to embed, ascending.

    Attributes:
      rows: the number of slots that hold a row.
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

    def __getitem__(self, slot: Any) -> int:
        shard, offset = divmod(slot, self._padded)
        row = self._shards[shard] * self._size + offset
        return row if offset < self._size and row < self._examples else -1


class PendingRow(NamedTuple):
    """The part of an example that the host keeps until its embeddings are there."""

    id: str
    shard: str
    texts: list[str]
    tokens: list[np.ndarray]
    languages: list[str] | None
    weights: list[float] | None
    label: int | None
    bad: BadExample | None


class ExampleReader:
    """Makes rows of image batches, in the loader's threads, and keeps the rest for `take`.

    Args:
      zeros: see zeros_of.
    """

    def __init__(self, source: Any, preprocess: Any, zeros: dict[str, np.ndarray]):
        self._source, self._preprocess, self._texts = source, preprocess, "text" in zeros
        self.zeros = {key: value for key, value in zeros.items() if key != "text"}
        self._rows: dict[int, PendingRow] = {}  # one operation each, so threads need no lock

    def row(self, i: int) -> dict[str, np.ndarray]:
        """The image of example i, or zeros for a bad one and for i = -1, and its index as 'row'.

        Raises:
          UserError: the image has another shape than the others.
        """
        fields = self.zeros
        if i >= 0:
            example: dict[str, Any] = {}
            try:
                example = self._source[i]
                fields = self._preprocess.pixels(example) if self.zeros else {}
                self._rows[i] = self._pending(example)
            except BadExample as error:
                fields = self.zeros
                name = error.id or _text(example.get("id", f"[{i}]"))
                shard = error.shard or example.get("shard", "")
                self._rows[i] = PendingRow(name, shard, [], [], None, None, None, error)
        for key, like in self.zeros.items():
            if fields[key].shape != like.shape or fields[key].dtype != like.dtype:
                raise UserError(
                    f"{key} of example {i} is {fields[key].dtype}{list(fields[key].shape)}, that "
                    f"of another {like.dtype}{list(like.shape)}; a batch needs equal ones"
                )
        return {**fields, "row": np.asarray(i, np.int64)}

    def take(self, i: int) -> PendingRow:
        """What is kept of example i, which `row` has read; it is forgotten here."""
        return self._rows.pop(i)

    def _pending(self, example: dict[str, Any]) -> PendingRow:
        texts, label = [_text(text) for text in example["texts"]], example.get("label")
        languages, weights = example.get("languages"), example.get("weights")
        for parallel in (languages, weights):
            if parallel is not None and len(parallel) != len(texts):
                raise BadExample("damaged record", f"{len(parallel)} of {len(texts)} texts")
        if label is not None and not -(2**63) <= label < 2**63:
            raise BadExample("damaged record", f"its label is {label}")
        return PendingRow(
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
    """One row of zeros: the fields of an image and `text`, of what is to be embedded."""
    zeros: dict[str, np.ndarray] = {}
    if "image" in what:
        zeros |= {k: np.zeros_like(v) for k, v in _sample_image(source, preprocess).items()}
    if "text" in what:
        zeros["text"] = np.zeros_like(preprocess.text(""))
    return zeros


def _sample_image(source: Any, preprocess: Any) -> dict[str, np.ndarray]:
    """The image of the first good example among SAMPLES from all over the source."""
    bad, tries = BadExamples(), min(SAMPLES, len(source))
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
    """The value as text that UTF-8 can encode: a lone surrogate becomes '?'."""
    return str(value).encode("utf-8", "replace").decode("utf-8")


class BadExampleLimit:
    """Counts the bad examples of this process's shards, and stops once they are too many.

    Args:
      rows: of this process's shards.
      allowed: the fraction of them that may be bad.
      earlier: bad examples, with their ids, of shards that earlier runs completed.

    Raises:
      UserError: too many are bad; `add` raises it too.
    """

    def __init__(self, rows: int, allowed: float, earlier: Sequence[tuple[BadExample, str]]):
        self.bad, self._rows, self._allowed = BadExamples(), rows, allowed
        for error, name in earlier:
            self.bad.record(error, name)
        self._earlier, self._read = self.bad.count, 0
        self._check()

    def add(self, rows: Sequence[PendingRow]) -> None:
        for row in rows:
            if row.bad is not None:
                self.bad.record(row.bad, row.id, row.shard)
        self._read += len(rows)
        self._check()

    def _check(self) -> None:
        count, new = self.bad.count, self.bad.count - self._earlier
        failing = self._read >= MIN_SAMPLE and mostly_bad(new, self._read, self._allowed)
        if failing or too_many(count, self._rows, self._allowed):
            share = f"{new} of {self._read}" if failing else f"{count} of {self._rows}"
            kinds = ", ".join(f"{n} {kind}" for kind, n in self.bad.kinds().items())
            raise UserError(
                f"{share} examples cannot be used ({kinds}), more than max_bad_fraction="
                f"{self._allowed}; the worst: {self.bad.worst()}; mend them and embed into a new "
                "folder, or allow more"
            )
