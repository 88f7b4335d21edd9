"""Which array is which elsewhere, held against the definitions of the layers."""

import dataclasses

import numpy as np
import pytest

from siglip.checkpoints.files.lazy_array import of_array
from siglip.checkpoints.formats import names, random_weights
from siglip.checkpoints.spec import of_preset
from siglip.presets import PRESETS

W, H, D = 6, 2, 3  # width, heads, width of a head
RNG = np.random.default_rng(0)


def noise(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def as_linear(ours, heads_in):
    """torch's Linear.weight [out, in] of a kernel of heads, element by element."""
    made = np.zeros((W, W), np.float32)
    for w in range(W):
        for h in range(H):
            for d in range(D):
                if heads_in:
                    made[h * D + d, w] = ours[w, h, d]
                else:
                    made[w, h * D + d] = ours[h, d, w]
    return made


CASES = {
    "SAME1": (names.SAME1, (5,), lambda x: x),
    "SAME2": (names.SAME2, (5, 4), lambda x: x),
    "SAME3": (names.SAME3, (1, 1, 4), lambda x: x),
    "DENSE": (names.DENSE, (5, 4), lambda x: np.einsum("io->oi", x)),
    "CONV": (names.CONV, (2, 3, 4, 5), lambda x: np.einsum("hwio->oihw", x)),
    "HEADS_IN": (names.HEADS_IN, (W, H, D), lambda x: as_linear(x, True)),
    "HEADS_BIAS": (names.HEADS_BIAS, (H, D), lambda x: np.array([v for row in x for v in row])),
    "HEADS_OUT": (names.HEADS_OUT, (H, D, W), lambda x: as_linear(x, False)),
    "ROWS of a list": (names.ROWS, (1, 5, 4), lambda x: x[0]),
    "ROWS of a grid": (names.ROWS, (2, 3, 4), lambda x: np.stack([v for row in x for v in row])),
    "SCALAR": (names.SCALAR, (1,), lambda x: x[0]),
}


def test_every_layout_is_tried():
    known = {id(v) for v in vars(names).values() if isinstance(v, names.Layout)}
    assert known == {id(layout) for layout, *_ in CASES.values()}


@pytest.mark.parametrize("case", CASES)
def test_a_layout_is_what_its_definition_says_and_goes_back(case):
    layout, shape, definition = CASES[case]
    ours = noise(*shape)
    theirs = layout.to(ours)
    np.testing.assert_array_equal(theirs, definition(ours))
    assert theirs.shape == layout.shape(shape)
    np.testing.assert_array_equal(layout.back(theirs, shape), ours)


def test_a_query_kernel_is_the_weight_of_torchs_linear():
    x, kernel = noise(7, W), noise(W, H, D)
    ours = np.einsum("nw,whd->nhd", x, kernel).reshape(7, W)
    np.testing.assert_allclose(x @ names.HEADS_IN.to(kernel).T, ours, rtol=1e-5, atol=1e-6)


def test_an_output_kernel_is_the_weight_of_torchs_linear():
    x, kernel = noise(7, H, D), noise(H, D, W)
    ours = np.einsum("nhd,hdw->nw", x, kernel)
    there = x.reshape(7, W) @ names.HEADS_OUT.to(kernel).T
    np.testing.assert_allclose(there, ours, rtol=1e-5, atol=1e-6)


def test_a_patch_kernel_gives_the_same_of_a_patch():
    patch, kernel = noise(4, 4, 3), noise(4, 4, 3, 5)
    ours = np.einsum("hwi,hwio->o", patch, kernel)
    weight = names.CONV.to(kernel)  # [out, in, h, w], patches there are [in, h, w]
    there = (weight * patch.transpose(2, 0, 1)).sum(axis=(1, 2, 3))
    np.testing.assert_allclose(there, ours, rtol=1e-5, atol=1e-6)


def model(name):
    """(leaves of random numbers, their shapes) of a small one."""
    made = random_weights.read(f"random:{name}:small")
    made_spec = made.spec
    txt = {**made_spec.txt, "vocab_size": 11}
    shapes = dataclasses.replace(made_spec, txt=txt, token_len=4).shapes()
    return {name: of_array(noise(*shape), name) for name, shape in shapes.items()}, shapes


def table(kind, shapes):
    return list({"huggingface": names.huggingface, "open_clip": names.open_clip}[kind](shapes))


MODELS = [
    ("huggingface", "siglip-b16-224"),
    ("huggingface", "siglip2-b16-naflex"),
    ("open_clip", "siglip-b16-224"),
    ("open_clip", "siglip-so400m16-256-i18n"),
]


@pytest.mark.parametrize(("kind", "name"), MODELS)
def test_every_array_of_ours_has_one_place_there_and_comes_back_to_the_bit(kind, name):
    leaves, shapes = model(name)
    entries = table(kind, shapes)
    placed = [ours for entry in entries for ours in entry.ours]
    assert sorted(placed) == sorted(shapes)
    assert len({entry.theirs for entry in entries}) == len(entries)
    for entry in entries:
        there = names.to_theirs(entry, leaves)
        array = there.read()
        assert array.shape == there.shape == names.their_shape(entry, shapes)
        assert array.flags["C_CONTIGUOUS"]
        for ours, stored in names.to_ours(entry, there, shapes):
            assert stored.shape == shapes[ours]
            assert stored.read().tobytes() == leaves[ours].read().tobytes(), ours


def of(entries, theirs):
    return next(entry for entry in entries if entry.theirs == theirs)


@pytest.mark.parametrize(
    ("kind", "theirs", "block", "parts"),
    [
        ("open_clip", "visual.trunk.blocks.0.attn.qkv", "img/Transformer/encoderblock_0/", "qkv"),
        (
            "open_clip",
            "text.transformer.resblocks.0.attn.in_proj_",
            "txt/Encoder_0/encoderblock_0/",
            "qkv",
        ),
        ("open_clip", "visual.trunk.attn_pool.kv", "img/MAPHead_0/", "kv"),
        ("open_clip", "visual.trunk.attn_pool.q", "img/MAPHead_0/", "q"),
        ("huggingface", "vision_model.head.attention.in_proj_", "img/MAPHead_0/", "qkv"),
    ],
)
def test_fused_projections_lie_in_the_order_query_key_value(kind, theirs, block, parts):
    leaves, shapes = model("siglip-b16-224")
    entries = table(kind, shapes)
    x, long = noise(5, 32), {"q": "query", "k": "key", "v": "value"}
    joint = "" if theirs.endswith("_") else "."
    weight = names.to_theirs(of(entries, f"{theirs}{joint}weight"), leaves).read()
    bias = names.to_theirs(of(entries, f"{theirs}{joint}bias"), leaves).read()
    projections = np.split(x @ weight.T + bias, len(parts), axis=1)
    for part, y in zip(parts, projections):
        where = f"{block}MultiHeadDotProductAttention_0/{long[part]}/"
        kernel, b = leaves[f"{where}kernel"].read(), leaves[f"{where}bias"].read()
        ours = np.einsum("nw,whd->nhd", x, kernel) + b[None]
        np.testing.assert_allclose(y, ours.reshape(5, -1), rtol=1e-4, atol=1e-5)


# One of each kind of tower; their sizes in pixels make no other arrays.
KINDS = {(p.img, p.txt, p.vocab_size, p.text_head, p.naflex): name for name, p in PRESETS.items()}


@pytest.mark.parametrize("name", KINDS.values())
def test_every_released_model_has_a_place_for_each_array(name):
    shapes = of_preset(PRESETS[name]).shapes()
    entries = list(names.huggingface(shapes))
    assert sorted(ours for entry in entries for ours in entry.ours) == sorted(shapes)
    if not PRESETS[name].naflex:
        entries = list(names.open_clip(shapes))
        assert sorted(ours for entry in entries for ours in entry.ours) == sorted(shapes)
