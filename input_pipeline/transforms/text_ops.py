"""Steps of config.input.text: plain functions from a caption to a caption, the last to tokens."""

import dataclasses
import threading
import unicodedata
from typing import Any

import numpy as np

from input_pipeline.transforms import canonicalize as spelling
from input_pipeline.transforms.tokenizer import EOS_MODES, pad_to_length


@dataclasses.dataclass
class To:
    """What a text becomes: token_len ids of a tokenizer.

    Attributes:
      cut: texts so far that lost their end, as they had more.
    """

    tokenizer: Any
    token_len: int
    cut: int = 0
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock, repr=False)

    def count_cut(self) -> None:
        with self.lock:
            self.cut += 1


def lower(text: str, to: To) -> str:
    """Lower case, as all released models were trained."""
    return text.lower()


def strip(text: str, to: To) -> str:
    """Runs of white space become one space, none at the ends."""
    return " ".join(text.split())


def nfkc(text: str, to: To) -> str:
    """Unicode's compatible composed form: full-width letters, ligatures, separate accents."""
    return unicodedata.normalize("NFKC", text)


def canonicalize(text: str, to: To) -> str:
    """Lower case, no ASCII punctuation, single spaces."""
    return spelling.canonicalize_text(text)


def tokenize(text: str, to: To, *, eos: str = "sticky", pad_id: int | None = None) -> np.ndarray:
    """int32 [token_len]. eos: 'sticky', 'yes' or 'none', see tokenizers.pad_to_length. pad_id: the
    id that fills a text up; None: the EOS id, as in SigLIP v1. SigLIP 2 has 0."""
    tokenizer = to.tokenizer
    if eos not in EOS_MODES:
        raise ValueError(f"eos={eos!r} is none of {', '.join(EOS_MODES)}")
    pad: int = tokenizer.eos_id if pad_id is None else pad_id
    if not isinstance(pad, int) or not 0 <= pad < tokenizer.vocab_size:
        raise ValueError(
            f"pad_id={pad} is not an id of the tokenizer, which has {tokenizer.vocab_size}"
        )
    ids = tokenizer.encode(text)
    if len(ids) + (eos != "none") > to.token_len:
        to.count_cut()
    return pad_to_length(ids, to.token_len, eos_id=tokenizer.eos_id, pad_id=pad, eos=eos)


TEXT_OPS = {
    "lower": lower,
    "strip": strip,
    "nfkc": nfkc,
    "canonicalize": canonicalize,
    "tokenize": tokenize,
}
