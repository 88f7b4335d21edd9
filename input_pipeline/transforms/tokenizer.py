"""Tokenizers.

Each has `vocab_size`, `eos_id`, `encode(text)`, which returns ids without special tokens, and
`decode(ids)`, which returns text for people to read.
"""

import os
from collections.abc import Sequence

import numpy as np
import sentencepiece
import tokenizers as hf
from jaxtyping import Int, Int32

from base.errors import UserError
from base.words import one_line

EOS_MODES = ("sticky", "yes", "none")

# Spellings of EOS, for a tokenizer.json that does not name its own.
EOS_TOKENS = ("</s>", "<eos>", "<|endoftext|>", "<|im_end|>", "[SEP]")


class Bytes:
    """UTF-8 bytes as ids, for any language and without a file, as in ByT5 (arXiv:2105.13626).

    Byte x has id x + 3; 0 is for padding, 1 is EOS, 2 is not used.
    """

    vocab_size = 259
    eos_id = 1

    def encode(self, text: str) -> list[int]:
        return [byte + 3 for byte in text.encode("utf-8")]

    def decode(self, ids: Sequence[int] | Int[np.ndarray, " l"]) -> str:
        return bytes(i - 3 for i in ids if i >= 3).decode("utf-8", "replace")


class SentencePiece:
    """The tokenizer of a SentencePiece .model file, e.g. of a released SigLIP.

    Args:
      path: the file.

    Raises:
      UserError: the file is missing, is not a model, or its vocabulary has no EOS.
    """

    def __init__(self, *, path: str):
        _check_file(path, "sentencepiece", "a SentencePiece .model")
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.Load(os.fspath(path))
        except (RuntimeError, OSError) as error:
            raise UserError(
                f"{path} is not a SentencePiece model; tokenizer 'sentencepiece' needs the .model "
                "file (a tokenizer.json is for tokenizer 'huggingface')"
            ) from error
        self.vocab_size: int = self._processor.vocab_size()
        self.eos_id: int = self._processor.eos_id()
        if self.eos_id < 0:
            raise UserError(
                f"the vocabulary of {path} has no EOS; train the model with an eos_id, e.g. 1"
            )

    def encode(self, text: str) -> list[int]:
        return self._processor.EncodeAsIds(text)

    def decode(self, ids: Sequence[int] | Int[np.ndarray, " l"]) -> str:
        return self._processor.DecodeIds([int(i) for i in ids])


class HuggingFace:
    """The tokenizer of a tokenizer.json file, without its special tokens, padding and truncation.

    Args:
      path: the file.
      eos_token: the EOS token; None: the one of EOS_TOKENS that the vocabulary has.

    Raises:
      UserError: the file is missing or cannot be read, or the vocabulary has no such token.
    """

    def __init__(self, *, path: str, eos_token: str | None = None):
        _check_file(path, "huggingface", "a tokenizer.json")
        try:
            self._tokenizer = hf.Tokenizer.from_file(os.fspath(path))
        except Exception as error:  # the package raises bare Exception
            raise UserError(
                f"{path} is not a tokenizer.json of Hugging Face tokenizers "
                f"({one_line(error)}); a SentencePiece .model is for tokenizer "
                "'sentencepiece'"
            ) from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        # Ids need not be dense: the embedding table must reach the highest.
        self.vocab_size: int = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        spellings = EOS_TOKENS if eos_token is None else (eos_token,)
        ids = [i for i in map(self._tokenizer.token_to_id, spellings) if i is not None]
        # Gemma's vocabulary has the HTML tag </s> beside its <eos>: special tokens come first, then
        # low ids.
        specials = {i for i, t in self._tokenizer.get_added_tokens_decoder().items() if t.special}
        ids.sort(key=lambda i: (i not in specials, i))
        if not ids:
            raise UserError(
                f"the vocabulary of {path} has no token {' or '.join(spellings)}; "
                "name the one that ends a text in config.input.tokenizer.eos_token"
            )
        self.eos_id: int = ids[0]

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int] | Int[np.ndarray, " l"]) -> str:
        return self._tokenizer.decode([int(i) for i in ids])


def _check_file(path: str, name: str, what: str) -> None:
    if not os.path.isfile(path):
        raise UserError(
            f"tokenizer '{name}': there is no file {path!r}; "
            f"set config.input.tokenizer.path to {what} file"
        )


def pad_to_length(
    ids: Sequence[int], token_len: int, *, eos_id: int, pad_id: int, eos: str = "sticky"
) -> Int32[np.ndarray, " token_len"]:
    """The ids with EOS added, truncated to token_len and padded with pad_id on the right.

    Args:
      eos: 'none': without EOS. 'yes': EOS at the end, lost where the text is truncated. 'sticky': a
        truncated text ends in EOS too, as in the released models.

    Raises:
      ValueError: `eos` has another value.

    Source: big_vision, pp/ops_text.py (the three modes of its tokenizer).
    """
    if eos not in EOS_MODES:
        raise ValueError(f"eos={eos!r} is none of {', '.join(EOS_MODES)}")
    ids = list(ids)
    if eos == "sticky":
        ids = ids[: token_len - 1]
    if eos != "none":
        ids.append(eos_id)
    ids = ids[:token_len]
    padded = np.full(token_len, pad_id, np.int32)
    padded[: len(ids)] = ids
    return padded


TOKENIZERS = {"bytes": Bytes, "sentencepiece": SentencePiece, "huggingface": HuggingFace}
