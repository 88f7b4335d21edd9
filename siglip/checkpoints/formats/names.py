"""Names and layouts of arrays: big_vision's, which are ours, with those of Hugging Face and of
open_clip.

Our names have the layers one by one. An array differs only by a reshape and a transposition, so
that one line describes both directions, and both are exact to the bit.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from siglip.checkpoints.files.lazy_array import LazyArray

Shape = tuple[int, ...]


class Layout(NamedTuple):
    """theirs = ours.reshape(reshape(ours.shape)).transpose(axes)."""

    reshape: Callable[[Shape], Shape]
    axes: tuple[int, ...]

    def to(self, ours: np.ndarray) -> np.ndarray:
        return ours.reshape(self.reshape(ours.shape)).transpose(self.axes)

    def back(self, theirs: np.ndarray, ours: Shape) -> np.ndarray:
        return theirs.transpose(np.argsort(self.axes)).reshape(ours)

    def shape(self, ours: Shape) -> Shape:
        flat = self.reshape(ours)
        return tuple(flat[axis] for axis in self.axes)


def _as_is(shape: Shape) -> Shape:
    return shape


SAME1 = Layout(_as_is, (0,))
SAME2 = Layout(_as_is, (0, 1))
SAME3 = Layout(_as_is, (0, 1, 2))
DENSE = Layout(_as_is, (1, 0))  # kernel [in, out] -> [out, in]
CONV = Layout(_as_is, (3, 2, 0, 1))  # [h, w, in, out] -> [out, in, h, w]
HEADS_IN = Layout(lambda s: (s[0], s[1] * s[2]), (1, 0))  # [W, H, W/H] -> [W, W]
HEADS_BIAS = Layout(lambda s: (s[0] * s[1],), (0,))
HEADS_OUT = Layout(lambda s: (s[0] * s[1], s[2]), (1, 0))  # [H, W/H, W] -> [W, W]
ROWS = Layout(lambda s: (math.prod(s[:-1]), s[-1]), (0, 1))  # [1, N, W], [g, g, W] -> [N, W]
SCALAR = Layout(lambda s: (), ())  # [1] -> []


class Entry(NamedTuple):
    """One array of theirs: one of ours, or several concatenated along their first axis."""

    theirs: str
    ours: tuple[str, ...]
    layout: Layout


QKV = ("query", "key", "value")


def huggingface(shapes: Mapping[str, Shape], *, vision="vision_model.", text="text_model."):
    """The entries of transformers' SiglipModel and Siglip2Model for a model of these arrays.

    Args:
      shapes: name -> shape of ours.
      vision, text: prefixes of the towers; a tower alone may be saved without.
    """

    def tower(ours: str, theirs: str) -> Iterator[Entry]:
        for i in range(_depth(shapes, ours)):
            a, b = f"{ours}encoderblock_{i}/", f"{theirs}encoder.layers.{i}."
            yield from _norm(f"{a}LayerNorm_0", f"{b}layer_norm1")
            yield from _norm(f"{a}LayerNorm_1", f"{b}layer_norm2")
            attention = f"{a}MultiHeadDotProductAttention_0/"
            for ours_name, theirs_name in zip(QKV, ("q_proj", "k_proj", "v_proj")):
                where = f"{b}self_attn.{theirs_name}"
                yield Entry(f"{where}.weight", (f"{attention}{ours_name}/kernel",), HEADS_IN)
                yield Entry(f"{where}.bias", (f"{attention}{ours_name}/bias",), HEADS_BIAS)
            yield Entry(f"{b}self_attn.out_proj.weight", (f"{attention}out/kernel",), HEADS_OUT)
            yield Entry(f"{b}self_attn.out_proj.bias", (f"{attention}out/bias",), SAME1)
            yield from _mlp(f"{a}MlpBlock_0", f"{b}mlp.fc1", f"{b}mlp.fc2")

    if "img/embedding/kernel" in shapes:
        embeddings = f"{vision}embeddings."
        kernel = CONV if len(shapes["img/embedding/kernel"]) == 4 else DENSE
        yield Entry(f"{embeddings}patch_embedding.weight", ("img/embedding/kernel",), kernel)
        yield Entry(f"{embeddings}patch_embedding.bias", ("img/embedding/bias",), SAME1)
        yield Entry(f"{embeddings}position_embedding.weight", ("img/pos_embedding",), ROWS)
        yield from tower("img/Transformer/", vision)
        yield from _norm("img/Transformer/encoder_norm", f"{vision}post_layernorm")
        ours, theirs = "img/MAPHead_0/", f"{vision}head."
        yield Entry(f"{theirs}probe", (f"{ours}probe",), SAME3)
        attention = f"{ours}MultiHeadDotProductAttention_0/"
        kernels, biases = (tuple(f"{attention}{x}/{y}" for x in QKV) for y in ("kernel", "bias"))
        yield Entry(f"{theirs}attention.in_proj_weight", kernels, HEADS_IN)
        yield Entry(f"{theirs}attention.in_proj_bias", biases, HEADS_BIAS)
        yield Entry(f"{theirs}attention.out_proj.weight", (f"{attention}out/kernel",), HEADS_OUT)
        yield Entry(f"{theirs}attention.out_proj.bias", (f"{attention}out/bias",), SAME1)
        yield from _norm(f"{ours}LayerNorm_0", f"{theirs}layernorm")
        yield from _mlp(f"{ours}MlpBlock_0", f"{theirs}mlp.fc1", f"{theirs}mlp.fc2")
    if "txt/Embed_0/embedding" in shapes:
        embeddings = f"{text}embeddings."
        yield Entry(f"{embeddings}token_embedding.weight", ("txt/Embed_0/embedding",), SAME2)
        yield Entry(f"{embeddings}position_embedding.weight", ("txt/pos_embedding",), ROWS)
        yield from tower("txt/Encoder_0/", text)
        yield from _norm("txt/Encoder_0/encoder_norm", f"{text}final_layer_norm")
        if "txt/head/kernel" in shapes:
            yield Entry(f"{text}head.weight", ("txt/head/kernel",), DENSE)
            yield Entry(f"{text}head.bias", ("txt/head/bias",), SAME1)
    if "t" in shapes:
        yield Entry("logit_scale", ("t",), SAME1)
    if "b" in shapes:
        yield Entry("logit_bias", ("b",), SAME1)


def open_clip(shapes: Mapping[str, Shape]) -> Iterator[Entry]:
    """The entries of open_clip's SigLIP models: a timm image tower, its own text tower."""
    if "img/embedding/kernel" in shapes:
        trunk = "visual.trunk."
        yield Entry(f"{trunk}patch_embed.proj.weight", ("img/embedding/kernel",), CONV)
        yield Entry(f"{trunk}patch_embed.proj.bias", ("img/embedding/bias",), SAME1)
        yield Entry(f"{trunk}pos_embed", ("img/pos_embedding",), SAME3)
        for i in range(_depth(shapes, "img/Transformer/")):
            a, b = f"img/Transformer/encoderblock_{i}/", f"{trunk}blocks.{i}."
            yield from _norm(f"{a}LayerNorm_0", f"{b}norm1")
            yield from _norm(f"{a}LayerNorm_1", f"{b}norm2")
            attention = f"{a}MultiHeadDotProductAttention_0/"
            yield from _fused(attention, f"{b}attn.qkv", QKV)
            yield from _out(attention, f"{b}attn.proj")
            yield from _mlp(f"{a}MlpBlock_0", f"{b}mlp.fc1", f"{b}mlp.fc2")
        yield from _norm("img/Transformer/encoder_norm", f"{trunk}norm")
        ours, theirs = "img/MAPHead_0/", f"{trunk}attn_pool."
        yield Entry(f"{theirs}latent", (f"{ours}probe",), SAME3)
        attention = f"{ours}MultiHeadDotProductAttention_0/"
        yield from _fused(attention, f"{theirs}q", QKV[:1])
        yield from _fused(attention, f"{theirs}kv", QKV[1:])
        yield from _out(attention, f"{theirs}proj")
        yield from _norm(f"{ours}LayerNorm_0", f"{theirs}norm")
        yield from _mlp(f"{ours}MlpBlock_0", f"{theirs}mlp.fc1", f"{theirs}mlp.fc2")
    if "txt/Embed_0/embedding" in shapes:
        yield Entry("text.token_embedding.weight", ("txt/Embed_0/embedding",), SAME2)
        yield Entry("text.positional_embedding", ("txt/pos_embedding",), ROWS)
        for i in range(_depth(shapes, "txt/Encoder_0/")):
            a, b = f"txt/Encoder_0/encoderblock_{i}/", f"text.transformer.resblocks.{i}."
            yield from _norm(f"{a}LayerNorm_0", f"{b}ln_1")
            yield from _norm(f"{a}LayerNorm_1", f"{b}ln_2")
            attention = f"{a}MultiHeadDotProductAttention_0/"
            yield from _fused(attention, f"{b}attn.in_proj", QKV, "_weight", "_bias")
            yield from _out(attention, f"{b}attn.out_proj")
            yield from _mlp(f"{a}MlpBlock_0", f"{b}mlp.c_fc", f"{b}mlp.c_proj")
        yield from _norm("txt/Encoder_0/encoder_norm", "text.ln_final")
        if "txt/head/kernel" in shapes:
            yield Entry("text.text_projection.weight", ("txt/head/kernel",), DENSE)
            yield Entry("text.text_projection.bias", ("txt/head/bias",), SAME1)
    if "t" in shapes:
        yield Entry("logit_scale", ("t",), SCALAR)
    if "b" in shapes:
        yield Entry("logit_bias", ("b",), SCALAR)


def _norm(ours: str, theirs: str) -> Iterator[Entry]:
    yield Entry(f"{theirs}.weight", (f"{ours}/scale",), SAME1)
    yield Entry(f"{theirs}.bias", (f"{ours}/bias",), SAME1)


def _mlp(ours: str, first: str, second: str) -> Iterator[Entry]:
    for dense, theirs in (("Dense_0", first), ("Dense_1", second)):
        yield Entry(f"{theirs}.weight", (f"{ours}/{dense}/kernel",), DENSE)
        yield Entry(f"{theirs}.bias", (f"{ours}/{dense}/bias",), SAME1)


def _fused(ours: str, theirs: str, parts, weight=".weight", bias=".bias") -> Iterator[Entry]:
    yield Entry(f"{theirs}{weight}", tuple(f"{ours}{x}/kernel" for x in parts), HEADS_IN)
    yield Entry(f"{theirs}{bias}", tuple(f"{ours}{x}/bias" for x in parts), HEADS_BIAS)


def _out(ours: str, theirs: str) -> Iterator[Entry]:
    yield Entry(f"{theirs}.weight", (f"{ours}out/kernel",), HEADS_OUT)
    yield Entry(f"{theirs}.bias", (f"{ours}out/bias",), SAME1)


def _depth(shapes: Mapping[str, Shape], encoder: str) -> int:
    last = "/LayerNorm_0/scale"
    return sum(n.startswith(f"{encoder}encoderblock_") and n.endswith(last) for n in shapes)


# Arrays from one naming to the other


def their_shape(entry: Entry, shapes: Mapping[str, Shape]) -> Shape:
    """The shape of an array of theirs, from the shapes of ours."""
    one = entry.layout.shape(shapes[entry.ours[0]])
    return one if len(entry.ours) == 1 else (one[0] * len(entry.ours), *one[1:])


def to_theirs(entry: Entry, ours: Mapping[str, LazyArray]) -> LazyArray:
    """An array of theirs, from ours."""
    parts = [ours[name] for name in entry.ours]

    def read() -> np.ndarray:
        arrays = [entry.layout.to(part.read()) for part in parts]
        # Not ascontiguousarray, which makes a scalar an array of one.
        return np.asarray(arrays[0] if len(arrays) == 1 else np.concatenate(arrays), order="C")

    shape = their_shape(entry, {name: ours[name].shape for name in entry.ours})
    return LazyArray(shape, parts[0].dtype, ", ".join(part.origin for part in parts), read)


def to_ours(
    entry: Entry, theirs: LazyArray, shapes: Mapping[str, Shape]
) -> Iterator[tuple[str, LazyArray]]:
    """(name, array) for each of ours.

    Args:
      theirs: of the shape `their_shape`, or of as many elements (a scalar may be [] or [1]).
      shapes: name -> shape of ours.
    """
    shape = their_shape(entry, shapes)
    rows = shape[0] // len(entry.ours) if shape else 0
    for i, name in enumerate(entry.ours):

        def read(i: int = i, name: str = name) -> np.ndarray:
            array = theirs.read().reshape(shape)
            if len(entry.ours) > 1:
                array = array[i * rows : (i + 1) * rows]
            return np.asarray(entry.layout.back(array, shapes[name]), order="C")

        part = f"[{i * rows}:{(i + 1) * rows}]" if len(entry.ours) > 1 else ""
        yield name, LazyArray(shapes[name], theirs.dtype, theirs.origin + part, read)
