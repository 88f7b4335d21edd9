"""Text -> ids. Every tokenizer has vocab_size, eos_id, encode(text) -> ids without specials, and
decode(ids) -> text, for people."""

import os
from collections.abc import Sequence

import numpy as np
import sentencepiece
import tokenizers as hf
from jaxtyping import Int32

from base.errors import UserError

EOS_MODES = ("sticky", "yes", "none")

# How models whose tokenizer.json does not say so spell the end of a text.
EOS_TOKENS = ("</s>", "<eos>", "<|endoftext|>", "<|im_end|>", "[SEP]")


class Bytes:
    """The UTF-8 bytes of the text: any language, no file. Ids as in ByT5 (arXiv:2105.13626).

    Byte x is id x + 3; 0 is free for padding, 1 ends a text, 2 is not used.
    """

    vocab_size = 259
    eos_id = 1

    def encode(self, text: str) -> list[int]:
        return [byte + 3 for byte in text.encode("utf-8")]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i - 3 for i in ids if i >= 3).decode("utf-8", "replace")


class SentencePiece:
    """A SentencePiece .model file, e.g. that of a released SigLIP.

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

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.DecodeIds([int(i) for i in ids])


class HuggingFace:
    """A tokenizer.json file. What it says of specials, padding and truncation is not used.

    Args:
      path: the file.
      eos_token: the token that ends a text; None: the first of EOS_TOKENS that the vocabulary has.

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
                f"({_one_line(error)}); a SentencePiece .model is for tokenizer 'sentencepiece'"
            ) from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        # Ids need not be dense: the embedding table must reach the highest.
        self.vocab_size: int = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        wanted = EOS_TOKENS if eos_token is None else (eos_token,)
        found = [i for i in map(self._tokenizer.token_to_id, wanted) if i is not None]
        # Gemma's vocabulary has the HTML tag </s> beside its <eos>: specials first, then low ids.
        specials = {i for i, t in self._tokenizer.get_added_tokens_decoder().items() if t.special}
        found.sort(key=lambda i: (i not in specials, i))
        if not found:
            raise UserError(
                f"the vocabulary of {path} has no token {' or '.join(wanted)}; "
                "name the one that ends a text in config.input.tokenizer.eos_token"
            )
        self.eos_id: int = found[0]

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids])


def _check_file(path: str, name: str, what: str) -> None:
    if not os.path.isfile(path):
        raise UserError(
            f"tokenizer '{name}': there is no file {path!r}; "
            f"set config.input.tokenizer.path to {what} file"
        )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def pad_to_length(
    ids: Sequence[int], token_len: int, *, eos_id: int, pad_id: int, eos: str = "sticky"
) -> Int32[np.ndarray, " token_len"]:
    """Adds EOS, cuts to token_len, fills up with pad_id on the right.

    Args:
      eos: 'none': without EOS. 'yes': EOS at the end, lost where the text is cut. 'sticky': a text
        that is cut ends in EOS too, as in the released models.

    Raises:
      ValueError: another `eos`.

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
