"""The table of released models: sizes, names and contracts."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from input_pipeline.transforms.image_ops import PRESETS as IMAGE_PRESETS
from siglip import presets
from siglip.towers.transformer import VARIANTS
from siglip.towers.two_towers import make_model
from siglip.towers.vit import Patches

ALL = list(presets.PRESETS.values())
SQUARE = [p for p in ALL if not p.naflex]


def by_name(found) -> dict:
    return {"argvalues": found, "ids": [p.name for p in found]}


def test_all_released_models_are_there():
    assert len(ALL) == len(presets.PRESETS) == 27
    assert sum(p.name.startswith("siglip-") for p in ALL) == 10
    assert [p.name for p in ALL if p.naflex] == ["siglip2-b16-naflex", "siglip2-so400m16-naflex"]


def _parameters(preset) -> int:
    """The sum of the shapes of the released files."""
    width, depth, mlp, _ = VARIANTS[preset.img.split("/")[0]]
    p = preset.patch_size
    image = p * p * 3 * width + width + preset.grid**2 * width + 2 * width
    image += depth * _block(width, mlp) + width + _block(width, mlp) - 2 * width  # MAP: one norm
    width, depth, mlp, _ = VARIANTS[preset.txt]
    text = (preset.vocab_size + preset.token_len) * width + depth * _block(width, mlp) + 2 * width
    if preset.text_head:
        text += width * preset.out_dim + preset.out_dim
    return image + text + 2


def _block(width: int, mlp: int) -> int:
    return 4 * width + 4 * (width * width + width) + 2 * width * mlp + mlp + width


@pytest.mark.parametrize("preset", **by_name(ALL))
def test_the_number_of_parameters_is_the_sum_of_the_released_shapes(preset):
    assert _parameters(preset) == preset.parameters


@pytest.mark.parametrize("preset", **by_name(ALL))
def test_make_model_builds_the_released_number_of_parameters(preset):
    model = make_model(**preset.model(), scan=True)
    p, n = preset.patch_size, preset.max_patches
    if preset.naflex:
        image = Patches(
            _abstract(1, n, p * p * 3, dtype=jnp.uint8),
            _abstract(1, n, dtype=bool),
            _abstract(1, 2),
        )
    else:
        image = _abstract(1, preset.res, preset.res, 3, dtype=jnp.float32)
    init = jax.eval_shape(model.init, jax.random.key(0), image, _abstract(1, preset.token_len))
    assert sum(leaf.size for leaf in jax.tree.leaves(init["params"])) == preset.parameters


def _abstract(*shape: int, dtype=jnp.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def test_naflex_models_have_the_square_models_sizes_and_their_own_grid():
    for name in ("b16", "so400m16"):
        naflex, square = (presets.PRESETS[f"siglip2-{name}-{x}"] for x in ("naflex", "256"))
        assert naflex.model()["img"] == {**square.model()["img"], "naflex_grid": 16}
        assert naflex.model()["txt"] == square.model()["txt"]
        # A patch embedding that is a matrix has the kernel's numbers.
        assert naflex.parameters == square.parameters
        assert (naflex.max_patches, square.max_patches) == (256, None)


# open_clip 3.3, model_configs/NAME.json: embed_dim, image_size, timm_model_name up to '_siglip',
# then of the text: context_length, vocab_size, width, layers.
B, L, SO = (768, 12), (1024, 24), (1152, 27)
OPEN_CLIP = {
    "ViT-B-16-SigLIP": (768, 224, "vit_base_patch16", 64, 32_000, *B),
    "ViT-B-16-SigLIP-256": (768, 256, "vit_base_patch16", 64, 32_000, *B),
    "ViT-B-16-SigLIP-384": (768, 384, "vit_base_patch16", 64, 32_000, *B),
    "ViT-B-16-SigLIP-512": (768, 512, "vit_base_patch16", 64, 32_000, *B),
    "ViT-B-16-SigLIP-i18n-256": (768, 256, "vit_base_patch16", 64, 250_000, *B),
    "ViT-L-16-SigLIP-256": (1024, 256, "vit_large_patch16", 64, 32_000, *L),
    "ViT-L-16-SigLIP-384": (1024, 384, "vit_large_patch16", 64, 32_000, *L),
    "ViT-SO400M-14-SigLIP": (1152, 224, "vit_so400m_patch14", 16, 32_000, *SO),
    "ViT-SO400M-14-SigLIP-384": (1152, 384, "vit_so400m_patch14", 64, 32_000, *SO),
    "ViT-SO400M-16-SigLIP-i18n-256": (1152, 256, "vit_so400m_patch16", 64, 250_000, *SO),
    "ViT-B-32-SigLIP2-256": (768, 256, "vit_base_patch32", 64, 256_000, *B),
    "ViT-B-16-SigLIP2": (768, 224, "vit_base_patch16", 64, 256_000, *B),
    "ViT-B-16-SigLIP2-256": (768, 256, "vit_base_patch16", 64, 256_000, *B),
    "ViT-B-16-SigLIP2-384": (768, 384, "vit_base_patch16", 64, 256_000, *B),
    "ViT-B-16-SigLIP2-512": (768, 512, "vit_base_patch16", 64, 256_000, *B),
    "ViT-L-16-SigLIP2-256": (1024, 256, "vit_large_patch16", 64, 256_000, *L),
    "ViT-L-16-SigLIP2-384": (1024, 384, "vit_large_patch16", 64, 256_000, *L),
    "ViT-L-16-SigLIP2-512": (1024, 512, "vit_large_patch16", 64, 256_000, *L),
    "ViT-SO400M-14-SigLIP2": (1152, 224, "vit_so400m_patch14", 64, 256_000, *SO),
    "ViT-SO400M-14-SigLIP2-378": (1152, 378, "vit_so400m_patch14", 64, 256_000, *SO),
    "ViT-SO400M-16-SigLIP2-256": (1152, 256, "vit_so400m_patch16", 64, 256_000, *SO),
    "ViT-SO400M-16-SigLIP2-384": (1152, 384, "vit_so400m_patch16", 64, 256_000, *SO),
    "ViT-SO400M-16-SigLIP2-512": (1152, 512, "vit_so400m_patch16", 64, 256_000, *SO),
    "ViT-gopt-16-SigLIP2-256": (1536, 256, "vit_giantopt_patch16", 64, 256_000, *SO),
    "ViT-gopt-16-SigLIP2-384": (1536, 384, "vit_giantopt_patch16", 64, 256_000, *SO),
}
TIMM = {"base": "B", "large": "L", "so400m": "So400m", "giantopt": "g-opt"}


@pytest.mark.parametrize("preset", **by_name(SQUARE))
def test_open_clips_model_of_that_name_has_these_sizes(preset):
    embed_dim, pixels, trunk, token_len, vocab_size, width, layers = OPEN_CLIP[preset.open_clip]
    _, tower, patch = trunk.split("_")
    assert preset.img == f"{TIMM[tower]}/{patch.removeprefix('patch')}"
    assert (preset.out_dim, preset.token_len) == (embed_dim, token_len)
    assert preset.vocab_size == vocab_size
    assert VARIANTS[preset.txt][:2] == (width, layers)
    assert preset.grid == pixels // preset.patch_size
    assert preset.res == (384 if pixels == 378 else pixels)
    # Only one of its configs says "proj_type": "none".
    assert preset.text_head == (preset.open_clip != "ViT-SO400M-16-SigLIP-i18n-256")


def test_each_open_clip_model_is_one_of_ours():
    naflex = {"ViT-B-16-SigLIP2-naflex", "ViT-SO400M-16-SigLIP2-naflex"}
    assert {p.open_clip for p in ALL} == OPEN_CLIP.keys() | naflex
    assert len({p.open_clip for p in ALL}) == len(ALL)


# Hugging Face's converter of SigLIP: repository -> big_vision's file.
HUGGING_FACE = {
    "siglip-base-patch16-224": "webli_en_b16_224_63724782.npz",
    "siglip-base-patch16-256": "webli_en_b16_256_60500360.npz",
    "siglip-base-patch16-384": "webli_en_b16_384_68578854.npz",
    "siglip-base-patch16-512": "webli_en_b16_512_68580893.npz",
    "siglip-large-patch16-256": "webli_en_l16_256_60552751.npz",
    "siglip-large-patch16-384": "webli_en_l16_384_63634585.npz",
    "siglip-base-patch16-256-multilingual": "webli_i18n_b16_256_66117334.npz",
    "siglip-so400m-patch14-224": "webli_en_so400m_224_57633886.npz",
    "siglip-so400m-patch14-384": "webli_en_so400m_384_58765454.npz",
    "siglip-so400m-patch16-256-i18n": "webli_i18n_so400m_16_256_78061115.npz",
    "siglip2-giant-opt-patch16-384": "siglip2_g-opt16_384.npz",
    "siglip2-so400m-patch14-224": "siglip2_so400m14_224.npz",
    "siglip2-base-patch32-256": "siglip2_b32_256.npz",
    "siglip2-base-patch16-naflex": "siglip2_b16_naflex.npz",
}


@pytest.mark.parametrize("repository", HUGGING_FACE)
def test_a_repository_of_the_hub_and_its_original_file_are_one_model(repository):
    assert presets.find(repository) is presets.find(HUGGING_FACE[repository])


@pytest.mark.parametrize("preset", **by_name(ALL))
def test_every_name_finds_its_model(preset):
    file = preset.big_vision.split("/")[-1]
    hub = preset.huggingface
    assert hub.startswith("google/") and file.endswith(".npz")
    others = (hub, hub[len("google/") :], preset.open_clip, preset.big_vision, file, file[:-4])
    for name in (preset.name, *others):
        assert presets.find(name) is preset


def test_names_are_of_one_model_each():
    names = [name for p in ALL for name in set(p.names)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("preset", **by_name(ALL))
def test_the_parts_of_a_models_names_say_the_same(preset):
    *_, variant, res = preset.name.removesuffix("-i18n").split("-")
    patch = preset.img.split("/")[1]
    assert preset.img.lower().replace("/", "").endswith(variant)
    for name in (preset.huggingface, preset.open_clip):
        assert f"patch{patch}" in name or f"-{patch}-" in name
    if not preset.naflex:
        assert preset.res == int(res) and res in preset.huggingface and res in preset.big_vision
    i18n = "i18n" in preset.name
    assert i18n == ("i18n" in preset.big_vision) == ("i18n" in preset.open_clip)
    folder, file = preset.big_vision.removeprefix("gs://big_vision/").split("/")
    second = preset.name.startswith("siglip2-")
    assert folder == ("siglip2" if second else "siglip")
    assert file.startswith("siglip2_" if second else "webli_")
    assert second == ("SigLIP2" in preset.open_clip)


@pytest.mark.parametrize("preset", **by_name(ALL))
def test_texts_and_images_are_as_in_training(preset):
    contract = preset.tokenizer, preset.vocab_size, preset.pad_id, preset.eos_id, preset.image
    if preset.name.startswith("siglip2-"):
        image = "hf-naflex" if preset.naflex else "hf-siglip2"
        assert contract == ("gemma", 256_000, 0, 1, image)
    elif preset.name.endswith("-i18n"):
        assert contract == ("mc4", 250_000, 1, 1, "hf-siglip")
    else:
        assert contract == ("c4_en", 32_000, 1, 1, "hf-siglip")
    assert preset.image in IMAGE_PRESETS
    assert preset.token_len == (16 if preset.name == "siglip-so400m14-224" else 64)


def test_384_pixels_in_patches_of_14_are_27_a_side():
    for name in ("siglip-so400m14-384", "siglip2-so400m14-384"):
        assert (presets.PRESETS[name].res, presets.PRESETS[name].grid) == (384, 27)


def test_an_unknown_name_is_told_the_three_nearest():
    for name, nearest in {
        "siglip2-base-16-256": "siglip2-b16-256, siglip-b16-256, siglip2-",
        "vit-b-16-siglip": "siglip-b16-224, ",  # names are told apart by case
        "google/siglip2-giant-opt-patch16-224": "siglip2-g-opt16-",
        "webli_en_l16_384": "siglip-l16-384, ",
        "MULTILINGUAL": "siglip-b16-256-i18n, ",
    }.items():
        with pytest.raises(ValueError, match=f"named '{name}'; the nearest: {nearest}") as error:
            presets.find(name)
        assert len(str(error.value).split(", ")) == 3
    with pytest.raises(ValueError, match="the nearest"):
        presets.find("")


def test_the_table_has_a_row_for_each_model_with_all_of_its_names():
    header, rule, *rows = presets.table().splitlines()
    columns = header.count("|")
    assert len(rows) == len(ALL) and rule == "|" + " --- |" * (columns - 1)
    for row, preset in zip(rows, ALL):
        assert row.count("|") == columns
        cells = [cell.strip(" `") for cell in row.split("|")]
        names = (preset.name, preset.huggingface, preset.open_clip)
        assert {*names, preset.img, f"{preset.parameters:,}", str(preset.out_dim)} <= set(cells)
        assert f"{preset.vocab_size:,} {preset.tokenizer}" in cells
        assert preset.big_vision.endswith(f"/{cells[-2]}") and cells[-2].endswith(".npz")
        assert ("no head" in row) != preset.text_head and ("any" in cells) == preset.naflex


def test_a_preset_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        presets.PRESETS["siglip-b16-224"].pad_id = 0
