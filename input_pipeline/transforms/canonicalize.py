"""One spelling for class names and prompt templates."""

import string

_WITHOUT_PUNCTUATION = str.maketrans("_", " ", string.punctuation.replace("_", ""))


def canonicalize_text(text: str, *, keep_punctuation_exact_string: str = "") -> str:
    """Lower case, no ASCII punctuation, "_" as a space, single spaces, none at the ends.

    Args:
      text: any text; letters and punctuation beyond ASCII stay (but letters become lower case).
      keep_punctuation_exact_string: this exact string survives, e.g. '{}' in a template. A lone
        '{' does not.

    The behaviour, and the name of the argument, of big_vision's prompt_engineering.
    """
    keep = keep_punctuation_exact_string
    parts = text.split(keep) if keep else [text]
    text = keep.join(part.translate(_WITHOUT_PUNCTUATION) for part in parts)
    return " ".join(text.lower().split())
