"""What Parquet columns and ArrayRecord features share: captions of several fields with weights,
and many files opened at once."""

import concurrent.futures
import itertools
import math
from collections.abc import Callable, Sequence

from base.errors import UserError
from input_pipeline.errors import BadExample
from input_pipeline.sources.contract import Captions

OPENERS = 16  # threads that read footers; they mostly wait for the storage


def weighted_names(source: str, text: str | Sequence) -> tuple[list[str], list[float] | None]:
    """The fields that the setting `text` names, and the weight of each (None: no weights).

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


def make_captions(
    texts_of_fields: Sequence[Sequence[str | None]],
    weights: Sequence[float] | None,
    languages: Sequence[str | None] | None,
) -> Captions:
    """The captions of an example, without empty texts.

    Args:
      texts_of_fields: the texts of each field.
      weights: weight of each field, which its texts share; None: there are no weights.
      languages: language of each text, or one for all; None: the source has no languages.

    Raises:
      BadExample: there are several languages, and not one for each text.
    """
    shares = []
    for texts, weight in zip(texts_of_fields, weights or itertools.repeat(1.0)):
        kept = sum(_has_text(text) for text in texts)
        shares += [weight / kept if kept else 0.0] * len(texts)
    flat = [text for texts in texts_of_fields for text in texts]
    keep = [k for k, text in enumerate(flat) if _has_text(text)]
    captions: Captions = {"texts": [flat[k] or "" for k in keep]}
    if weights is not None:
        captions["weights"] = [shares[k] for k in keep]
    if languages is not None:
        if len(languages) == 1:
            languages = [languages[0]] * len(flat)
        if len(languages) not in (0, len(flat)):
            message = f"{len(flat)} texts in {len(languages)} languages"
            raise BadExample("damaged record", message)
        captions["languages"] = (
            [languages[k] or "" for k in keep] if languages else [""] * len(keep)
        )
    return captions


def _has_text(text: str | None) -> bool:
    return bool(text and text.strip())


def in_threads(function: Callable, values: Sequence) -> list:
    """The results of the function for all values, computed in threads.

    The first error is raised at once, without waiting for the others.
    """
    pool = concurrent.futures.ThreadPoolExecutor(min(OPENERS, len(values)))
    try:
        return list(pool.map(function, values))
    finally:
        pool.shutdown(cancel_futures=True)
