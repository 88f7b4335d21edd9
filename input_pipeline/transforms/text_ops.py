"""Steps of config.input.text: plain functions (text, context, *, options) -> text.

The last one, `tokenize`, returns tokens.
"""

import dataclasses
import threading
import unicodedata
from typing import Any

import numpy as np

from input_pipeline.transforms.canonicalize import canonicalize_text
from input_pipeline.transforms.tokenizer import EOS_MODES, pad_to_length


@dataclasses.dataclass
class TextContext:
    """What a step knows beside the text. Thread-safe.

    Attributes:
      tokenizer: see tokenizer.py.
      token_len: number of tokens that a text becomes.
      truncated: texts so far that were longer and lost their end.
    """

    tokenizer: Any
    token_len: int
    truncated: int = 0
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock, repr=False)

    def count_truncated(self) -> None:
        with self.lock:
            self.truncated += 1


def lower(text: str, context: TextContext) -> str:
    """Makes the text lower case, as for all released models."""
    return text.lower()


def strip(text: str, context: TextContext) -> str:
    """Replaces runs of white space by one space, and removes it at the ends."""
    return " ".join(text.split())


def nfkc(text: str, context: TextContext) -> str:
    """Normalizes to Unicode NFKC: full-width letters, ligatures, separate accents."""
    return unicodedata.normalize("NFKC", text)


def canonicalize(text: str, context: TextContext) -> str:
    """Makes the text lower case, without ASCII punctuation, with single spaces."""
    return canonicalize_text(text)


def tokenize(
    text: str, context: TextContext, *, eos: str = "sticky", pad_id: int | None = None
) -> np.ndarray:
    """Tokens, int32 [token_len]. eos: 'sticky', 'yes' or 'none', see tokenizer.pad_to_length.
    pad_id: the id that pads; None: the EOS id, as in SigLIP v1. SigLIP 2 has 0."""
    tokenizer = context.tokenizer
    if eos not in EOS_MODES:
        raise ValueError(f"eos={eos!r} is none of {', '.join(EOS_MODES)}")
    pad: int = tokenizer.eos_id if pad_id is None else pad_id
    if not isinstance(pad, int) or not 0 <= pad < tokenizer.vocab_size:
        raise ValueError(
            f"pad_id={pad} is not an id of the tokenizer, which has {tokenizer.vocab_size}"
        )
    ids = tokenizer.encode(text)
    if len(ids) + (eos != "none") > context.token_len:
        context.count_truncated()
    return pad_to_length(ids, context.token_len, eos_id=tokenizer.eos_id, pad_id=pad, eos=eos)


TEXT_OPS = {
    "lower": lower,
    "strip": strip,
    "nfkc": nfkc,
    "canonicalize": canonicalize,
    "tokenize": tokenize,
}
