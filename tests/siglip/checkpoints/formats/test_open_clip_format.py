"""Files of open_clip as others write them. Embeddings: see tests/siglip/parity."""

import json

import numpy as np
import pytest
from tiny_models import arrays, one_line, tiny

from siglip import checkpoints
from siglip.checkpoints import CheckpointError, spec
from siglip.checkpoints.files import safetensors_file
from siglip.checkpoints.files.lazy_array import LazyArray, of_array
from siglip.checkpoints.formats import names, open_clip_format
from siglip.presets import PRESETS

GIVEN = tiny()


@pytest.fixture
def folder(tmp_path):
    """As open_clip writes it: without siglip.json."""
    checkpoints.write(GIVEN, tmp_path / "oc", "open_clip")
    (tmp_path / "oc" / spec.FILE).unlink()
    return tmp_path / "oc"


def edit(folder, block, **changes):
    file = folder / open_clip_format.CONFIG
    content = json.loads(file.read_text())
    content[block] |= changes
    file.write_text(json.dumps(content))


def rewrite(folder, change):
    file = folder / open_clip_format.MODEL
    leaves = {n: of_array(x.read()) for n, x in safetensors_file.read(file).items()}
    change(leaves)
    safetensors_file.write(file, leaves, {})


def test_the_arrays_and_the_config_say_what_the_model_is(folder):
    for path in (folder, folder / open_clip_format.MODEL):
        read = checkpoints.read(path)
        assert arrays(read) == arrays(GIVEN)
        made = read.spec
        assert (made.res, made.token_len, made.vocab_size, made.bias) == (32, 16, None, True)
        assert (made.img, made.txt) == (GIVEN.spec.img | WIDE[3], GIVEN.spec.txt | WIDE[2])


# Of depths that no variant has, in the words of spec.variant_of.
WIDE = {n: {"width": 32, "depth": n, "mlp_dim": 128, "num_heads": 2} for n in (2, 3)}


@pytest.fixture(autouse=True)
def known_heads(monkeypatch):
    """timm's config names an image tower; nothing in it says how many heads the tiny one has."""
    more = {f"tiny{n}": (32, n, 128, 2) for n in (2, 3)}
    monkeypatch.setattr(open_clip_format, "VARIANTS", {**open_clip_format.VARIANTS, **more})


@pytest.mark.parametrize("name", [n for n, p in PRESETS.items() if not p.naflex])
def test_a_released_model_is_known_by_its_arrays_and_config(name, tmp_path, monkeypatch):
    made = spec.of_preset(PRESETS[name])
    shapes = made.shapes()

    def unread():
        raise AssertionError("nothing may be read before it is asked for")

    theirs = {
        e.theirs: LazyArray(names.their_shape(e, shapes), np.dtype("f4"), "", unread)
        for e in names.open_clip(shapes)
    }
    monkeypatch.setattr(safetensors_file, "read", lambda file: theirs)
    config, exact = open_clip_format._config_of(made, "vit")
    assert exact
    (tmp_path / open_clip_format.CONFIG).write_text(json.dumps(config))
    (tmp_path / open_clip_format.MODEL).write_bytes(b"")
    read = checkpoints.read(tmp_path)
    assert read.spec == made
    assert {n: stored.shape for n, stored in read.arrays.items()} == shapes


def test_without_the_config_heads_are_those_of_the_variant_or_asked_for(folder, monkeypatch):
    (folder / open_clip_format.CONFIG).unlink()
    assert arrays(checkpoints.read(folder)) == arrays(GIVEN)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="how many heads a tower of") as error:
        checkpoints.read(folder)
    assert "put open_clip_config.json beside" in one_line(error)


def test_scalars_may_have_an_axis(folder):
    def change(leaves):
        for name in ("logit_scale", "logit_bias"):
            assert leaves[name].shape == ()
            leaves[name] = of_array(leaves[name].read().reshape(1))

    rewrite(folder, change)
    assert arrays(checkpoints.read(folder)) == arrays(GIVEN)


@pytest.mark.parametrize(
    ("changes", "image"),
    [
        ({"interpolation": "bicubic"}, "hf-siglip"),
        ({"interpolation": "bilinear"}, "hf-siglip2"),
        (
            {"resize_mode": "shortest", "interpolation": "bicubic"},
            "decode | shorter_side(method='bicubic-pil') | center_crop",
        ),
    ],
    ids=["bicubic", "bilinear", "shortest"],
)
def test_images_are_prepared_as_the_config_says(changes, image, folder):
    edit(folder, "preprocess_cfg", **changes)
    assert checkpoints.read(folder).spec.image == image


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mean": [0.48145466, 0.4578275, 0.40821073]}, "mean [0.48145466"),
        ({"std": [0.26862954, 0.26130258, 0.27577711]}, "std [0.26862954"),
        ({"resize_mode": "longest"}, "images are resized by 'longest'"),
        ({"interpolation": "random"}, "'random' there"),
    ],
    ids=["mean", "std", "mode", "interpolation"],
)
def test_images_that_are_not_siglips_are_refused_in_one_line(changes, message, folder):
    edit(folder, "preprocess_cfg", **changes)
    with pytest.raises(CheckpointError) as error:
        checkpoints.read(folder)
    assert message in one_line(error) and open_clip_format.CONFIG in one_line(error)


def test_the_tokenizer_and_what_is_not_exact_are_written(tmp_path):
    """Without hf_tokenizer_name open_clip takes CLIP's, whatever lies in the folder."""
    notes = checkpoints.write(tiny(image="decode | resize"), tmp_path / "a", "open_clip")
    assert any("not equal to the pixel" in note for note in notes)
    config = json.loads((tmp_path / "a" / open_clip_format.CONFIG).read_text())
    assert config["model_cfg"]["text_cfg"]["hf_tokenizer_name"]
    assert (tmp_path / "a" / "tokenizer_config.json").exists()
    shortest = "decode | shorter_side(method='bilinear-pil') | center_crop"
    notes = checkpoints.write(tiny(image=shortest), tmp_path / "b", "open_clip")
    assert not any("pixel" in note and "images" in note for note in notes)
    (tmp_path / "b" / spec.FILE).unlink()
    assert checkpoints.read(tmp_path / "b").spec.image == shortest


def test_a_tokenizer_beside_it_is_found(folder):
    (folder / "tokenizer.json").unlink()
    assert checkpoints.read(folder).spec.tokenizer is None
    (folder / "tokenizer.json").write_text("{}")
    block = {"name": "huggingface", "path": str(folder / "tokenizer.json")}
    assert checkpoints.read(folder).spec.tokenizer == block


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("visual.trunk.attn_pool.latent", "1 missing there: visual.trunk.attn_pool.latent"),
        ("text.positional_embedding", "'text.positional_embedding' is missing"),
        ("visual.trunk.blocks.", "is missing"),
        ("", "is no SigLIP model of open_clip; its arrays: visual.proj"),
    ],
    ids=["array", "positions", "layers", "all"],
)
def test_other_arrays_are_refused_in_one_line(gone, message, folder):
    def change(leaves):
        for name in [n for n in leaves if n.startswith(gone)]:
            del leaves[name]
        if not gone:
            leaves["visual.proj"] = of_array(np.zeros(3, np.float32))

    rewrite(folder, change)
    with pytest.raises(CheckpointError) as error:
        checkpoints.read(folder)
    assert message in one_line(error)


def test_what_open_clip_has_not_is_refused_in_one_line(tmp_path):
    naflex = tiny(img={"variant": "mu/16", "naflex_grid": 4}, res=None, image="hf-naflex")
    for given in (GIVEN.only("img"), GIVEN.only("txt"), naflex):
        with pytest.raises(CheckpointError, match="as huggingface") as error:
            checkpoints.write(given, tmp_path / "oc", "open_clip")
        one_line(error)
    assert list(tmp_path.iterdir()) == []


def test_released_sizes_have_timms_name_and_others_a_note(tmp_path):
    made = spec.of_preset(PRESETS["siglip-so400m14-384"])
    assert open_clip_format._TIMM[made.img["variant"], made.res] == "vit_so400m_patch14_siglip_384"
    for preset in PRESETS.values():
        assert preset.naflex or (preset.img, preset.res) in open_clip_format._TIMM
    notes = checkpoints.write(GIVEN, tmp_path / "oc", "open_clip")
    assert any("timm has no image tower" in note for note in notes)
    ratio = open_clip_format._config_of(made, "vit")[0]["model_cfg"]["text_cfg"]["mlp_ratio"]
    assert int(1152 * ratio) == 4304
