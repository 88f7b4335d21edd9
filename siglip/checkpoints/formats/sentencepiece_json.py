"""A SentencePiece model of byte-pair merges as a tokenizer.json: Gemma's, which SigLIP 2 has.

transformers' SiglipTokenizer reads SentencePiece models as those of SigLIP are, with a space put
before every text. Gemma's has none, and there would get other ids for every text.
"""

import pathlib
from typing import Any

from base.words import one_line
from siglip.checkpoints.errors import CheckpointError

SPACE = "▁"
PROBES = (
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
    """The parsed file (its fields: sentencepiece_model.proto).

    Raises:
      CheckpointError: it is no SentencePiece model.
    """
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2 as proto

    made: Any = getattr(proto, "ModelProto")()  # noqa: B009  (pyright does not see it)
    try:
        made.ParseFromString(pathlib.Path(path).read_bytes())
    except (DecodeError, OSError) as error:
        told = one_line(error)
        raise CheckpointError(f"{path} is no SentencePiece model ({told})") from None
    return made


def to_tokenizer(path: str, *, lower: bool) -> Any | None:
    """A `tokenizers.Tokenizer` that gives the ids of the model at `path`, of texts in lower case
    where `lower`; None where there is none: it is another kind of model, or texts of PROBES come
    out otherwise."""
    import sentencepiece
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    spec = read_model(path)
    bpe, identity = 2, not spec.normalizer_spec.precompiled_charsmap
    if spec.trainer_spec.model_type != bpe or not identity:
        return None
    pieces = {piece.piece: i for i, piece in enumerate(spec.pieces)}
    unknown = next((p.piece for p in spec.pieces if p.type == p.UNKNOWN), None)
    made = Tokenizer(
        models.BPE(
            vocab=pieces,
            merges=_merges(spec.pieces, pieces),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=spec.trainer_spec.byte_fallback,
        )
    )
    space = normalizers.Replace(" ", SPACE)
    made.normalizer = normalizers.Sequence([normalizers.Lowercase(), space] if lower else [space])
    # Pieces that SentencePiece finds before it merges anything: HTML tags, runs of blanks. They are
    # looked for in the normalized text, where those with capitals cannot be.
    found = [p.piece for p in spec.pieces if p.type == p.USER_DEFINED]
    found = [piece for piece in found if not lower or piece == piece.lower()]
    made.add_tokens([AddedToken(piece, normalized=True, special=False) for piece in found])
    made.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    truth: Any = sentencepiece.SentencePieceProcessor()
    truth.Load(path)

    def same(text: str) -> bool:
        wanted = truth.EncodeAsIds(text.lower() if lower else text)
        return made.encode(text, add_special_tokens=False).ids == wanted

    return made if all(map(same, PROBES)) else None


def _merges(pieces: Any, index: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, the best pieces first, as SentencePiece merges."""
    found = []
    for piece in pieces:
        if piece.type != piece.NORMAL:
            continue
        text = piece.piece
        ways = [(text[:i], text[i:]) for i in range(1, len(text))]
        ways = [(left, right) for left, right in ways if left in index and right in index]
        ways.sort(key=lambda pair: (index[pair[0]], index[pair[1]]))
        found += [(piece.score, *pair) for pair in ways]
    found.sort(key=lambda merge: merge[0], reverse=True)  # stable
    return [(left, right) for _, left, right in found]
