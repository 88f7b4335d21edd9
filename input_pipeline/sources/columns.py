"""What Parquet columns and ArrayRecord features share: which hold captions, what an example has of
them, and many files opened at once."""

import concurrent.futures
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

from base.errors import UserError
from input_pipeline.errors import BadExample

OPENERS = 16  # threads that read footers, mostly waiting


def weighted_names(source: str, text: str | Sequence) -> tuple[list[str], list[float] | None]:
    """The fields that the setting `text` names, and how often each is drawn (None: not said).

    Raises:
      UserError: the setting is neither a name nor (name, how often) pairs.
    """
    if isinstance(text, str):
        return [text] if text else [], None
    try:
        names = [str(name) for name, _ in text]
        weights = [float(weight) for _, weight in text]
        if not math.inf > max(weights) > 0 <= min(weights) or len(set(names)) < len(names):
            raise ValueError
    except (TypeError, ValueError):
        raise UserError(
            f"{source}: text={text!r} is neither a name nor pairs of a name and how often it is "
            "drawn, as in (('caption', 0.7), ('alt_text', 0.3))"
        ) from None
    return names, weights


def captions(
    found: Sequence[Sequence[str | None]],
    weights: Sequence[float] | None,
    languages: Sequence[str | None] | None,
) -> dict[str, Any]:
    """texts, weights and languages of an example, without its empty texts.

    Args:
      found: the texts of each field.
      weights: of each field, which its texts share; None: there are none.
      languages: of each text, or one for all; None: there are none.

    Raises:
      BadExample: there are more languages than one and not as many as texts.
    """
    shares = []
    for texts, weight in zip(found, weights or itertools.repeat(1.0)):
        kept = sum(_is_said(text) for text in texts)
        shares += [weight / kept if kept else 0.0] * len(texts)
    flat = [text for texts in found for text in texts]
    keep = [k for k, text in enumerate(flat) if _is_said(text)]
    example: dict[str, Any] = {"texts": [flat[k] for k in keep]}
    if weights is not None:
        example["weights"] = [shares[k] for k in keep]
    if languages is not None:
        if len(languages) == 1:
            languages = [languages[0]] * len(flat)
        if len(languages) not in (0, len(flat)):
            told = f"{len(flat)} texts in {len(languages)} languages"
            raise BadExample("damaged record", told)
        example["languages"] = [languages[k] or "" for k in keep] if languages else [""] * len(keep)
    return example


def _is_said(text: str | None) -> bool:
    return bool(text and text.strip())


def in_threads(function: Callable, values: Sequence) -> list:
    """In threads; the error of the first that fails, without waiting for all others."""
    pool = concurrent.futures.ThreadPoolExecutor(min(OPENERS, len(values)))
    try:
        return list(pool.map(function, values))
    finally:
        pool.shutdown(cancel_futures=True)
