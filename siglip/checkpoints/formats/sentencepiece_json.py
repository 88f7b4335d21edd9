"""SentencePiece models of byte-pair merges as tokenizer.json, for Gemma's, which SigLIP 2 has.

transformers' SiglipTokenizer puts a space before every text, as SigLIP's SentencePiece models do.
Gemma's does not: read by SiglipTokenizer, it would give other ids for every text.
"""

import pathlib
from typing import Any

from base.words import one_line
from siglip.checkpoints.errors import CheckpointError

SPACE = "▁"
PROBES = (  # texts on which both tokenizers must agree
    "",
    "a photo of a cat",
    "  two  spaces ",
    "red, blue. yes! (no?) #1 50% e-mail_me @home 3.14",
    "tab\tand\nline",
    "été à la plage, naïve façade",
    "кошка на окне",
    "猫が座っている。窓辺",
    "قطة على النافذة",
    "बिल्ली खिड़की पर",
    "🐈‍⬛ and 🇺🇳 \u200b",
    "x" * 50,
    "<bos> </s> <unk> ▁",
    "a <h1>title</h1> <table> </s>b",
    "\n\n\n and \t\t and" + " " * 9 + "blanks",
)


def read_model(path: str) -> Any:
    """The parsed file: a ModelProto of sentencepiece_model.proto.

    Raises:
      CheckpointError: it is no SentencePiece model.
    """
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2 as proto

    model: Any = getattr(proto, "ModelProto")()  # noqa: B009  (pyright does not see it)
    try:
        model.ParseFromString(pathlib.Path(path).read_bytes())
    except (DecodeError, OSError) as error:
        raise CheckpointError(f"{path} is no SentencePiece model ({one_line(error)})") from None
    return model


def to_tokenizer(path: str, *, lower: bool) -> Any | None:
    """A `tokenizers.Tokenizer` with the ids of the model at `path`.

    Args:
      lower: it lower-cases texts first.

    Returns:
      None for a model of another kind, or if a text of PROBES gets other ids.
    """
    import sentencepiece
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    model = read_model(path)
    bpe, identity = 2, not model.normalizer_spec.precompiled_charsmap
    if model.trainer_spec.model_type != bpe or not identity:
        return None
    pieces = {piece.piece: i for i, piece in enumerate(model.pieces)}
    unknown = next((p.piece for p in model.pieces if p.type == p.UNKNOWN), None)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=pieces,
            merges=_merges(model.pieces, pieces),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=model.trainer_spec.byte_fallback,
        )
    )
    space = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), space] if lower else [space]
    )
    # SentencePiece matches these pieces (HTML tags, runs of blanks) before it merges anything. They
    # are matched in the normalized text, which has no capitals if it is lower-cased.
    whole = [p.piece for p in model.pieces if p.type == p.USER_DEFINED]
    whole = [piece for piece in whole if not lower or piece == piece.lower()]
    tokenizer.add_tokens([AddedToken(piece, normalized=True, special=False) for piece in whole])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    original: Any = sentencepiece.SentencePieceProcessor()
    original.Load(path)

    def agrees(text: str) -> bool:
        ids = original.EncodeAsIds(text.lower() if lower else text)
        return tokenizer.encode(text, add_special_tokens=False).ids == ids

    return tokenizer if all(map(agrees, PROBES)) else None


def _merges(pieces: Any, index: dict[str, int]) -> list[tuple[str, str]]:
    """Pairs of pieces that join to a third, the best of these first, as SentencePiece merges."""
    merges = []
    for piece in pieces:
        if piece.type != piece.NORMAL:
            continue
        text = piece.piece
        pairs = [(text[:i], text[i:]) for i in range(1, len(text))]
        pairs = [(left, right) for left, right in pairs if left in index and right in index]
        pairs.sort(key=lambda pair: (index[pair[0]], index[pair[1]]))
        merges += [(piece.score, *pair) for pair in pairs]
    merges.sort(key=lambda merge: merge[0], reverse=True)  # stable
    return [(left, right) for _, left, right in merges]
