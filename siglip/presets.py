"""The released models, by every name they have: what they are, and what they must be given."""

import dataclasses
from typing import Any

from base.words import similar
from siglip.towers.transformer import decode_variant


@dataclasses.dataclass(frozen=True)
class Preset:
    """A released model.

    Attributes:
      name: ours.
      img, txt: variants of the towers.
      res: side of the images in pixels. NaFlex: side of an image that has the grid of positions.
      parameters: of both towers, with t and b.
      big_vision: where the original file is.
      huggingface: repository of the Hub. SiglipModel; for NaFlex Siglip2Model.
      open_clip: its name of the model (weights 'webli').
      vocab_size: rows of the token table.
      tokenizer: 'c4_en' or 'mc4' (SentencePiece models made for T5), or 'gemma'.
      pad_id, eos_id: of texts; those that are too long keep EOS.
      image: preprocessing of images, a name of input_pipeline.transforms.image_ops.PRESETS.
      token_len: positions of the text tower, to which every text is padded.
      text_head: the text tower ends in a Dense layer.
      max_patches: of an image of a NaFlex model, as `image` prepares it; None for other models.
    """

    name: str
    img: str
    txt: str
    res: int
    parameters: int
    big_vision: str
    huggingface: str
    open_clip: str
    vocab_size: int
    tokenizer: str
    pad_id: int
    image: str
    eos_id: int = 1
    token_len: int = 64
    text_head: bool = True
    max_patches: int | None = None

    @property
    def naflex(self) -> bool:
        """Whether it takes images of any aspect ratio, as patches."""
        return self.max_patches is not None

    @property
    def patch_size(self) -> int:
        return int(self.img.partition("/")[2])

    @property
    def grid(self) -> int:
        """Patches per side of its position embeddings.

        So400m/14 at 384 has 27 of them, which cover 378 pixels: an image is resized to 384, and
        the last 6 rows and columns of pixels belong to no patch.
        """
        return self.res // self.patch_size

    @property
    def out_dim(self) -> int:
        """Width of the embeddings."""
        return decode_variant(self.img)[0]["width"]

    @property
    def names(self) -> tuple[str, ...]:
        """All names by which `find` knows it."""
        file = self.big_vision.rpartition("/")[2]
        return (
            self.name,
            self.huggingface,
            self.huggingface.removeprefix("google/"),
            self.open_clip,
            self.big_vision,
            file,
            file.removesuffix(".npz"),
        )

    def model(self) -> dict[str, Any]:
        """The keyword arguments of two_towers.make_model: `img` and `txt`."""
        img: dict[str, Any] = {"variant": self.img}
        if self.naflex:
            img["naflex_grid"] = self.grid
        out_dim = self.out_dim if self.text_head else 0
        txt = {"variant": self.txt, "vocab_size": self.vocab_size, "out_dim": out_dim}
        return {"img": img, "txt": txt}


def _v1(name, img, res, parameters, file, huggingface, open_clip, **options) -> Preset:
    """SigLIP (arXiv:2303.15343)."""
    languages = {"vocab_size": 32_000, "tokenizer": "c4_en"}
    if "i18n" in name:
        languages = {"vocab_size": 250_000, "tokenizer": "mc4"}
    return Preset(
        name=f"siglip-{name}",
        img=img,
        txt=img.partition("/")[0],
        res=res,
        parameters=parameters,
        big_vision=f"gs://big_vision/siglip/webli_{file}.npz",
        huggingface=f"google/siglip-{huggingface}",
        open_clip=open_clip,
        pad_id=1,
        image="hf-siglip",
        **languages,
        **options,
    )


def _v2(name, img, res, parameters, file, huggingface, open_clip, **options) -> Preset:
    """SigLIP 2 (arXiv:2502.14786)."""
    variant = img.partition("/")[0]
    return Preset(
        name=f"siglip2-{name}",
        img=img,
        txt="So400m" if variant == "g-opt" else variant,
        res=res,
        parameters=parameters,
        big_vision=f"gs://big_vision/siglip2/siglip2_{file}.npz",
        huggingface=f"google/siglip2-{huggingface}",
        open_clip=open_clip,
        vocab_size=256_000,
        tokenizer="gemma",
        pad_id=0,
        image="hf-naflex" if "max_patches" in options else "hf-siglip2",
        **options,
    )


# Columns: our name, image tower, res, parameters, then file, Hugging Face and open_clip.
# fmt: off
_ALL = (
    _v1("b16-224", "B/16", 224, 203_155_970,
        "en_b16_224_63724782", "base-patch16-224", "ViT-B-16-SigLIP"),
    _v1("b16-256", "B/16", 256, 203_202_050,
        "en_b16_256_60500360", "base-patch16-256", "ViT-B-16-SigLIP-256"),
    _v1("b16-384", "B/16", 384, 203_447_810,
        "en_b16_384_68578854", "base-patch16-384", "ViT-B-16-SigLIP-384"),
    _v1("b16-512", "B/16", 512, 203_791_874,
        "en_b16_512_68580893", "base-patch16-512", "ViT-B-16-SigLIP-512"),
    _v1("l16-256", "L/16", 256, 652_150_786,
        "en_l16_256_60552751", "large-patch16-256", "ViT-L-16-SigLIP-256"),
    _v1("l16-384", "L/16", 384, 652_478_466,
        "en_l16_384_63634585", "large-patch16-384", "ViT-L-16-SigLIP-384"),
    _v1("so400m14-224", "So400m/14", 224, 877_360_306,
        "en_so400m_224_57633886", "so400m-patch14-224", "ViT-SO400M-14-SigLIP", token_len=16),
    # open_clip has a second name for it, ...-378, with images of 378 pixels.
    _v1("so400m14-384", "So400m/14", 384, 877_960_498,
        "en_so400m_384_58765454", "so400m-patch14-384", "ViT-SO400M-14-SigLIP-384"),
    _v1("b16-256-i18n", "B/16", 256, 370_626_050,
        "i18n_b16_256_66117334", "base-patch16-256-multilingual", "ViT-B-16-SigLIP-i18n-256"),
    # 250,000 tokens: so has its tokenizer, open_clip's config, and Hugging Face's strict conversion
    # of this file. A user's error message (big_vision#126) speaks of 256,000; whoever reads the
    # file takes the number of rows from it. Hugging Face fills in an identity for the head.
    _v1("so400m16-256-i18n", "So400m/16", 256, 1_127_430_706,
        "i18n_so400m_16_256_78061115", "so400m-patch16-256-i18n", "ViT-SO400M-16-SigLIP-i18n-256",
        text_head=False),
    _v2("b32-256", "B/32", 256, 376_856_066,
        "b32_256", "base-patch32-256", "ViT-B-32-SigLIP2-256"),
    _v2("b16-224", "B/16", 224, 375_187_970,
        "b16_224", "base-patch16-224", "ViT-B-16-SigLIP2"),
    _v2("b16-256", "B/16", 256, 375_234_050,
        "b16_256", "base-patch16-256", "ViT-B-16-SigLIP2-256"),
    _v2("b16-384", "B/16", 384, 375_479_810,
        "b16_384", "base-patch16-384", "ViT-B-16-SigLIP2-384"),
    _v2("b16-512", "B/16", 512, 375_823_874,
        "b16_512", "base-patch16-512", "ViT-B-16-SigLIP2-512"),
    _v2("l16-256", "L/16", 256, 881_526_786,
        "l16_256", "large-patch16-256", "ViT-L-16-SigLIP2-256"),
    _v2("l16-384", "L/16", 384, 881_854_466,
        "l16_384", "large-patch16-384", "ViT-L-16-SigLIP2-384"),
    _v2("l16-512", "L/16", 512, 882_313_218,
        "l16_512", "large-patch16-512", "ViT-L-16-SigLIP2-512"),
    _v2("so400m14-224", "So400m/14", 224, 1_135_463_602,
        "so400m14_224", "so400m-patch14-224", "ViT-SO400M-14-SigLIP2"),
    # open_clip resizes images to 378 pixels, which are the same patches of a smaller image.
    _v2("so400m14-384", "So400m/14", 384, 1_136_008_498,
        "so400m14_384", "so400m-patch14-384", "ViT-SO400M-14-SigLIP2-378"),
    _v2("so400m16-256", "So400m/16", 256, 1_135_670_962,
        "so400m16_256", "so400m-patch16-256", "ViT-SO400M-16-SigLIP2-256"),
    _v2("so400m16-384", "So400m/16", 384, 1_136_039_602,
        "so400m16_384", "so400m-patch16-384", "ViT-SO400M-16-SigLIP2-384"),
    _v2("so400m16-512", "So400m/16", 512, 1_136_555_698,
        "so400m16_512", "so400m-patch16-512", "ViT-SO400M-16-SigLIP2-512"),
    _v2("g-opt16-256", "g-opt/16", 256, 1_871_393_906,
        "g-opt16_256", "giant-opt-patch16-256", "ViT-gopt-16-SigLIP2-256"),
    _v2("g-opt16-384", "g-opt/16", 384, 1_871_885_426,
        "g-opt16_384", "giant-opt-patch16-384", "ViT-gopt-16-SigLIP2-384"),
    # open_clip after 3.3 has these two. Trained with 128 to 1024 patches; 256 is what Hugging Face
    # takes where nothing else is asked for.
    _v2("b16-naflex", "B/16", 256, 375_234_050,
        "b16_naflex", "base-patch16-naflex", "ViT-B-16-SigLIP2-naflex", max_patches=256),
    _v2("so400m16-naflex", "So400m/16", 256, 1_135_670_962,
        "so400m16_naflex", "so400m-patch16-naflex", "ViT-SO400M-16-SigLIP2-naflex",
        max_patches=256),
)
# fmt: on

PRESETS: dict[str, Preset] = {preset.name: preset for preset in _ALL}


def find(name: str) -> Preset:
    """A released model by our name, the Hub's (with or without 'google/'), open_clip's, or that of
    big_vision's file (with or without gs:// and .npz).

    Raises:
      ValueError: it is none of them.
    """
    known = {alias: preset for preset in _ALL for alias in preset.names}
    if name in known:
        return known[name]
    aliases = similar(str(name), known, count=len(known), always=True)
    three = list(dict.fromkeys(known[alias].name for alias in aliases))[:3]
    raise ValueError(f"no released model is named {name!r}; the nearest: {', '.join(three)}")


def table() -> str:
    """The released models in Markdown, one a row."""
    columns = (
        "name", "image", "text", "pixels", "patches", "tokens", "vocabulary", "embedding",
        "parameters", "Hugging Face", "open_clip", "big_vision",
    )  # fmt: skip
    rows = [columns, ["---"] * len(columns)]
    for p in _ALL:
        rows.append(
            (
                f"`{p.name}`",
                p.img,
                p.txt if p.text_head else f"{p.txt}, no head",
                "any" if p.naflex else f"{p.res}",
                f"{p.max_patches} at most" if p.naflex else f"{p.grid} x {p.grid}",
                f"{p.token_len}",
                f"{p.vocab_size:,} {p.tokenizer}",
                f"{p.out_dim}",
                f"{p.parameters:,}",
                f"`{p.huggingface}`",
                f"`{p.open_clip}`",
                f"`{p.big_vision.removeprefix('gs://big_vision/')}`",
            )
        )
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
