"""Mixtures: several sources by weight, or the languages of one source by temperature."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging

from base.errors import UserError
from input_pipeline.order import Pattern, order_of


class Mixture:
    """A source whose indices run through its parts one after another.

    In training each part comes as often as its weight says and has epochs of its own: a small part
    with a large weight is seen in more epochs than the others.

    Args:
      parts: name -> source.
      weights: one per part, in their order; only their ratios count.

    Raises:
      UserError: there is no part, a part is empty, or a weight is out of range.
    """

    class_names = None  # the same label is another class in another source

    def __init__(self, parts: Mapping[str, Any], weights: tuple[float, ...]):
        for name, part in parts.items():
            if not len(part):
                raise UserError(f"{name} of the mixture has no examples")
        try:
            self._pattern = Pattern(weights)
        except ValueError as error:
            raise UserError(f"mixture of {', '.join(parts) or 'nothing'}: {error}") from error
        self.names, self._parts = list(parts), list(parts.values())
        self._starts = np.concatenate([[0], np.cumsum([len(part) for part in self._parts])])
        counts = [identities(part) for part in self._parts]
        self._first_identity = np.concatenate([[0], np.cumsum(counts)]).tolist()
        self.identities = self._first_identity[-1]
        self.damage = sum(
            (Counter(getattr(part, "damage", {})) for part in parts.values()), Counter()
        )

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, i: int) -> dict[str, Any]:
        part, index = self._find(i)
        return {"source": self.names[part], **self._parts[part][index]}

    def identity(self, i: int) -> int:
        """A number below `identities`, the same for the same example."""
        part, index = self._find(i)
        return self._first_identity[part] + identity(self._parts[part], index)

    def order(self, seed: int) -> "_MixedOrder":
        """Position in the stream -> index.

        Each part has a seed of its own, so that two copies of a source have different orders.
        """
        seeds = np.random.SeedSequence(seed).generate_state(len(self._parts))
        orders = [order_of(part, int(seed)) for part, seed in zip(self._parts, seeds)]
        return _MixedOrder(self._pattern, orders, self._starts)

    def _find(self, i: int) -> tuple[int, int]:
        if not 0 <= i < len(self):
            raise IndexError(i)
        part = int(np.searchsorted(self._starts, i, "right")) - 1
        return part, i - int(self._starts[part])


class _MixedOrder:
    """Maps a position to an index: the pattern gives the part, and its order the example."""

    def __init__(self, pattern: Pattern, orders: list, starts: np.ndarray):
        self._pattern, self._orders, self._starts = pattern, orders, starts

    def __getitem__(self, position: int) -> int:
        part, index = self._pattern[position]
        return int(self._starts[part]) + self._orders[part][index]


class OneLanguage:
    """The examples of a source that have texts in one language, with only these texts."""

    class_names = None

    def __init__(self, source: Any, language: str, indices: np.ndarray):
        self._source, self._language, self._indices = source, language, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, i: int) -> dict[str, Any]:
        example = self._source[int(self._indices[i])]
        places = [k for k, tag in enumerate(example["languages"]) if tag == self._language]
        parallel = {
            key: example[key] for key in ("texts", "languages", "weights") if key in example
        }
        return {**example, **{key: [v[k] for k in places] for key, v in parallel.items()}}

    def identity(self, i: int) -> int:
        return identity(self._source, int(self._indices[i]))


class Languages(Mixture):
    """A source whose languages are balanced by a temperature.

    A language that n examples have gets a share of the stream proportional to
    n ** (1 / temperature): with 1 as often as it comes, with a large temperature all languages
    equally often. Multilingual BERT and XLM-R do so (arXiv:1911.02116; their exponent is
    1 / temperature). An example with texts in several languages counts as one example of each.

    Raises:
      UserError: the source has no languages, or temperature is not positive.
    """

    def __init__(self, source: Any, temperature: float):
        if not temperature > 0:
            raise UserError(
                f"config.input.language_temperature={temperature} must be above 0 "
                "(1: languages as often as they come; 100: nearly all alike)"
            )
        indices = languages_of(source)
        if not indices:
            raise UserError(
                "config.input.language_temperature is set, but this source has no languages; "
                "leave it unset, or name where the language stands (`language`, `language_column`)"
            )
        tagged = len(np.unique(np.concatenate(list(indices.values()))))
        if tagged < len(source):
            logging.warning(
                "languages: %d of %d examples name no language and are left out",
                len(source) - tagged,
                len(source),
            )
        counts = {language: len(indices[language]) for language in sorted(indices)}
        largest = max(counts.values())
        super().__init__(
            {language: OneLanguage(source, language, indices[language]) for language in counts},
            tuple((count / largest) ** (1 / temperature) for count in counts.values()),
        )
        # Not the parts' sum: an example with two languages is one example.
        self.identities = identities(source)
        self.damage = Counter(getattr(source, "damage", {}))

    def __getitem__(self, i: int) -> dict[str, Any]:
        example = super().__getitem__(i)
        del example["source"]  # the parts are languages, not sources
        return example

    def identity(self, i: int) -> int:
        part, index = self._find(i)
        return identity(self._parts[part], index)


def languages_of(source: Any) -> dict[str, np.ndarray]:
    """Language -> indices of its examples; {} where the source has no languages."""
    return source.by_language() if hasattr(source, "by_language") else {}


def identities(source: Any) -> int:
    """The number below which all identities of a source lie."""
    return getattr(source, "identities", len(source))


def identity(source: Any, i: int) -> int:
    """A number for example i, the same at every index that leads to the same example."""
    return source.identity(i) if hasattr(source, "identity") else i
