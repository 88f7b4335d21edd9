"""The contract of a model: its towers, and the images and texts that it was trained on.

The most repeated complaint about released SigLIP weights is wrong preprocessing, which costs up to
12 points without an error. So the contract travels with the arrays, in `siglip.json`.
"""

import dataclasses
import functools
import json
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from base import whole_file
from base.words import one_line
from siglip import presets
from siglip.checkpoints.errors import CheckpointError
from siglip.leaf_names import leaves
from siglip.towers.transformer import SIZES, VARIANTS
from siglip.towers.two_towers import TOWERS, TwoTowers, make_model

FILE = "siglip.json"
MIN_VOCAB_SHARE = 0.95  # of the rows of a token table that a fitting tokenizer uses at least


@dataclasses.dataclass(frozen=True)
class Spec:
    """The contract.

    Attributes:
      img, txt: keyword arguments of make_vit and make_text; None without that tower.
      bias: the model has the parameter b.
      res: side of the images in pixels; None for patches (NaFlex) and embeddings.
      token_len: positions of the text tower.
      vocab_size, eos_id, pad_id: of the tokenizer. The token table may have more rows than
        vocab_size, which is None where it is not known.
      image, text: the preprocessing programs, as in config.input.image and config.input.text.
      tokenizer: name and options of one of input_pipeline.TOKENIZERS; None where there is no file.
      preset: name of the released model that has this contract; '' for none.
    """

    img: dict[str, Any] | None
    txt: dict[str, Any] | None
    bias: bool = True
    res: int | None = None
    token_len: int | None = None
    vocab_size: int | None = None
    eos_id: int = 1
    pad_id: int = 1
    image: str = "decode | resize"
    text: str = "lower | tokenize"
    tokenizer: dict[str, Any] | None = None
    preset: str = ""

    def make_model(self, **options: Any) -> TwoTowers:
        """The model. In place of a missing tower it has a tiny one, which must not be called.

        Args:
          options: dtype, scan, remat of two_towers.make_model.
        """
        img = self.img or {"variant": "precomputed", "width": self.embedding_dim}
        txt = self.txt or {"variant": "mu", "vocab_size": 1, "out_dim": self.embedding_dim}
        return make_model(img=img, txt=txt, b_init=-10.0 if self.bias else None, **options)

    @property
    def embedding_dim(self) -> int:
        """Numbers in an embedding."""
        if self.img is not None:
            from siglip.towers.vit import make_vit

            vit = make_vit(**self.img)
            return vit.out_dim or vit.width
        from siglip.towers.text import make_text

        tower = make_text(**self.txt or {})
        return tower.out_dim or tower.width

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The arrays of this model, layers one by one: name -> shape.

        Raises:
          CheckpointError: the towers have impossible settings.
        """
        try:
            return dict(_shapes(json.dumps(dataclasses.asdict(self))))
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointError(
                f"there is no model of img={self.img}, txt={self.txt}: {one_line(error)}"
            ) from None

    def _trace(self) -> dict[str, tuple[int, ...]]:
        image, text = self.inputs()
        init = self.make_model(scan=True).init
        abstract = jax.eval_shape(init, jax.random.key(0), image, text)["params"]
        shapes: dict[str, tuple[int, ...]] = {}
        for name, leaf in leaves(abstract).items():
            before, stacked, after = name.partition("/encoderblock/")
            if stacked:
                for i in range(leaf.shape[0]):
                    shapes[f"{before}/encoderblock_{i}/{after}"] = leaf.shape[1:]
            else:
                shapes[name] = leaf.shape
        absent = [tower for tower in TOWERS if getattr(self, tower) is None]
        return {
            name: shape
            for name, shape in shapes.items()
            if not (name.split("/")[0] in absent or (absent and name in ("t", "b")))
        }

    def inputs(self) -> tuple[Any, np.ndarray]:
        """An image and a text of zeros."""
        from siglip.towers.vit import Patches

        text = np.zeros((1, self.token_len or 1), np.int32)
        if self.img is None or self.img["variant"] == "precomputed":
            return np.zeros((1, self.embedding_dim), np.float32), text
        p = int(self.img["variant"].partition("/")[2])
        if self.img.get("naflex_grid"):
            values, mask = np.zeros((1, 4, p * p * 3), np.uint8), np.ones((1, 4), bool)
            patches: Any = (values, mask, np.full((1, 2), 2, np.int32))
            return Patches(*patches), text
        return np.zeros((1, self.res or p, self.res or p, 3), np.uint8), text


@functools.lru_cache(maxsize=32)  # tracing a model takes half a second, and reading asks twice
def _shapes(fields: str) -> dict[str, tuple[int, ...]]:
    return Spec(**json.loads(fields))._trace()


def of_preset(preset: presets.Preset) -> Spec:
    """The contract of a released model, without its tokenizer's file."""
    model = preset.model()
    return Spec(
        img=model["img"],
        txt=model["txt"],
        res=None if preset.naflex else preset.res,
        token_len=preset.token_len,
        vocab_size=preset.vocab_size,
        eos_id=preset.eos_id,
        pad_id=preset.pad_id,
        image=preset.image,
        text=text_program(preset.eos_id, preset.pad_id),
        preset=preset.name,
    )


def text_program(eos_id: int, pad_id: int) -> str:
    """The program of released models' texts: lower case, EOS that survives truncation, padding."""
    return "lower | tokenize" if pad_id == eos_id else f"lower | tokenize(pad_id={pad_id})"


def infer(shapes: Mapping[str, tuple[int, ...]], *, where: str) -> Spec:
    """The contract of a model by the names (big_vision's, layers one by one) and shapes of its
    arrays.

    If exactly one released model has these arrays, the contract is that model's. Otherwise the
    preprocessing is the nearest to those of all released models that have the same towers.

    Raises:
      CheckpointError: no model of this family has these arrays.
    """
    try:
        img = _infer_img(shapes) if any(name.startswith("img/") for name in shapes) else None
        txt = _infer_txt(shapes) if any(name.startswith("txt/") for name in shapes) else None
    except (KeyError, IndexError, ValueError) as error:
        first = ", ".join(list(shapes)[:4]) or "none"
        raise CheckpointError(
            f"{where} holds no SigLIP model: {error} is not there; its arrays: {first}, ..."
        ) from None
    if img is None and txt is None:
        first = ", ".join(list(shapes)[:4]) or "none"
        raise CheckpointError(f"{where} holds no array img/... or txt/...; its arrays: {first}")
    fits = [p for p in presets.PRESETS.values() if _has_tower(p, img) and _has_text(p, txt)]
    if len(fits) == 1 and img and txt:
        released = of_preset(fits[0])
        return dataclasses.replace(released, txt=txt[0], bias="b" in shapes)
    spec = Spec(img and img[0], txt and txt[0], bias="b" in shapes)
    if img:
        block, grid = img
        spec = dataclasses.replace(spec, **_images(block, grid, [] if txt else fits))
    if txt:
        pad = pad_id_of(txt[0])
        spec = dataclasses.replace(
            spec, token_len=txt[1], pad_id=pad, text=text_program(spec.eos_id, pad)
        )
    return spec


def pad_id_of(txt: Mapping[str, Any]) -> int:
    """The padding id of a released text tower: 0 with Gemma's vocabulary, else EOS, 1.

    SigLIP's tower without a head pads with 1, though its table may have as many rows as Gemma's.
    """
    return 0 if txt["vocab_size"] >= 256_000 and txt.get("out_dim") != 0 else 1


def _images(block: dict[str, Any], grid: int | None, fits: list[presets.Preset]) -> dict:
    """`image` and `res` of a tower: those of the released models that have it, if they agree;
    otherwise the nearest to all of them."""
    patch = int(block["variant"].partition("/")[2])
    if grid is None:
        default = patch == 16
        return {
            "image": "hf-naflex" if default else f"decode | naflex(256, {patch}, 'bilinear-pil')"
        }
    images, sizes = {p.image for p in fits}, {p.res for p in fits}
    return {
        "image": images.pop() if len(images) == 1 else "hf-siglip",
        "res": sizes.pop() if len(sizes) == 1 else grid * patch,
    }


def _has_tower(preset: presets.Preset, img: tuple[dict[str, Any], int | None] | None) -> bool:
    grid = None if preset.naflex else preset.grid
    return img is None or img == (preset.model()["img"], grid)


def _has_text(preset: presets.Preset, txt: tuple[dict[str, Any], int] | None) -> bool:
    if txt is None:
        return True
    block, token_len = txt
    wanted = preset.model()["txt"]
    rows = {wanted["vocab_size"]}
    if not preset.text_head:  # the released table has more rows than the tokenizer: big_vision#126
        rows.add(256_000)
    rest = {**block, "vocab_size": wanted["vocab_size"]}
    return block["vocab_size"] in rows and rest == wanted and token_len == preset.token_len


def _infer_img(shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, Any], int | None]:
    """(keywords of make_vit, side of the grid of positions or None for NaFlex)."""
    kernel, pos = shapes["img/embedding/kernel"], shapes["img/pos_embedding"]
    naflex = len(kernel) == 2
    patch = round((kernel[0] / 3) ** 0.5) if naflex else kernel[0]
    block = _sizes(shapes, "img/Transformer/", kernel[-1], f"/{patch}")
    if naflex:
        block["naflex_grid"] = pos[0]
    if "img/MAPHead_0/probe" not in shapes:
        block["pool"] = "tok" if "img/cls" in shapes else "gap"
    if "img/head/bias" in shapes:
        block["out_dim"] = shapes["img/head/bias"][0]
    return block, None if naflex else round(pos[1] ** 0.5)


def _infer_txt(shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, Any], int]:
    """(keywords of make_text, number of positions)."""
    vocab, embed_dim = shapes["txt/Embed_0/embedding"]
    pos = shapes["txt/pos_embedding"]
    block = _sizes(shapes, "txt/Encoder_0/", pos[-1], "")
    block["vocab_size"] = vocab
    block["out_dim"] = shapes.get("txt/head/bias", (0,))[0]
    if "txt/embed_projection/kernel" in shapes:
        block["bottleneck"] = embed_dim
    if "txt/MAPHead_0/probe" in shapes:
        block["pool"] = "map"
    return block, pos[1]


def _sizes(shapes: Mapping[str, tuple[int, ...]], encoder: str, width: int, patch: str) -> dict:
    """{'variant': 'B/16'}, or another variant with the sizes that differ."""
    prefix = f"{encoder}encoderblock_"
    depth = len({name[len(prefix) :].split("/")[0] for name in shapes if name.startswith(prefix)})
    mlp_dim = shapes[f"{prefix}0/MlpBlock_0/Dense_0/bias"][0]
    heads = shapes[f"{prefix}0/MultiHeadDotProductAttention_0/query/bias"][0]
    return variant_of((width, depth, mlp_dim, heads), patch)


def variant_of(sizes: tuple[int, int, int, int], patch: str) -> dict[str, Any]:
    """{'variant': name + patch}, with the sizes (width, depth, mlp_dim, heads) that differ."""
    for name, known in VARIANTS.items():
        if known == sizes:
            return {"variant": name + patch}
    return {"variant": "mu" + patch, **dict(zip(SIZES, sizes))}


# Files


def save(spec: Spec, path: pathlib.Path) -> None:
    """Writes siglip.json."""
    text = json.dumps({"version": 1, **dataclasses.asdict(spec)}, indent=2)
    whole_file.write_text(path, text + "\n")


def load(path: pathlib.Path) -> Spec:
    """The contract in a siglip.json, with its tokenizer's file in the same folder.

    Raises:
      CheckpointError: it is no such file, or one of a newer version.
    """
    try:
        fields = json.loads(path.read_text())
        version = fields.pop("version")
        if version != 1:
            raise CheckpointError(f"{path} has version {version}, this code reads version 1")
        spec = Spec(**fields)
    except CheckpointError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({one_line(error)}); delete it or convert again"
        ) from None
    tokenizer = dict(spec.tokenizer) if spec.tokenizer else None
    if tokenizer and tokenizer.get("path"):
        # The folder may have been moved since the path was written.
        tokenizer["path"] = str(path.parent / pathlib.Path(tokenizer["path"]).name)
    return dataclasses.replace(spec, tokenizer=tokenizer)


# Texts that fit the contract


def is_mc4(*, rows: int, vocab_size: int) -> bool:
    """Whether a token table and a tokenizer have the sizes of SigLIP's multilingual models, whose
    SentencePiece model ends in 100 ids that no text contains and that have no row."""
    return (rows, vocab_size) == (250_000, 250_100)


def check_contract(
    spec: Spec, *, vocab_size: int, token_len: int, eos_id: int, pad_id: int, where: str
) -> None:
    """Compares texts made this way with those that the checkpoint was trained on.

    Raises:
      CheckpointError: they differ; the message says what it expects.
    """
    expected = spec.vocab_size or (spec.txt or {}).get("vocab_size")
    lowest = MIN_VOCAB_SHARE * (expected or 0)
    if spec.vocab_size is None and expected and lowest <= vocab_size <= expected:
        expected = vocab_size  # the table may have rows that no text uses
    if expected and is_mc4(rows=expected, vocab_size=vocab_size):
        expected = vocab_size
    properties = {
        "vocabulary": (expected, vocab_size, "ids; take its own tokenizer"),
        "text length": (spec.token_len, token_len, "tokens"),
        "EOS id": (spec.eos_id, eos_id, ""),
        "padding id": (spec.pad_id, pad_id, f"(text = {spec.text!r})"),
    }
    wrong = [
        f"{what} {value:,} where it expects {expected:,} {advice}".rstrip()
        for what, (expected, value, advice) in properties.items()
        if expected is not None and value != expected
    ]
    if wrong:
        kind = f" (taken for the released {spec.preset})" if spec.preset else ""
        raise CheckpointError(f"{where}{kind} does not fit these texts: {'; '.join(wrong)}")


def with_tokenizer_beside(spec: Spec, file: pathlib.Path) -> Spec:
    """The contract with the tokenizer's file copied next to `file`: the folder can be moved.

    Raises:
      CheckpointError: the tokenizer's file is missing.
    """
    path = (spec.tokenizer or {}).get("path")
    if not spec.tokenizer or not path:
        return spec
    source = pathlib.Path(path)
    if not source.is_file():
        raise CheckpointError(f"the tokenizer's file {path} is not there; pass --tokenizer FILE")
    prefix = file.name.removesuffix(FILE).rstrip(".")
    name = (
        f"{prefix}.{source.name}" if prefix and not source.name.startswith(prefix) else source.name
    )
    target = file.with_name(name)
    if target.resolve() != source.resolve():
        shutil.copyfile(source, target)
    return dataclasses.replace(spec, tokenizer={**spec.tokenizer, "path": name})
