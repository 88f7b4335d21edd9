"""Canonical spelling of class names and prompt templates."""

import string

_WITHOUT_PUNCTUATION = str.maketrans("_", " ", string.punctuation.replace("_", ""))


def canonicalize_text(text: str, *, keep_punctuation_exact_string: str = "") -> str:
    """The text in lower case, without ASCII punctuation, "_" as a space, with single spaces.

    Args:
      text: any text. Punctuation beyond ASCII stays.
      keep_punctuation_exact_string: an exact string that is kept, e.g. '{}' in a template. A lone
        '{' is still removed.

    Source: big_vision's prompt_engineering, also for the argument's name.
    """
    keep = keep_punctuation_exact_string
    parts = text.split(keep) if keep else [text]
    text = keep.join(part.translate(_WITHOUT_PUNCTUATION) for part in parts)
    return " ".join(text.lower().split())
