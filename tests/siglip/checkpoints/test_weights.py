"""Models from one format to another and back, to the bit."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest
from tiny_models import TINY, arrays, files, one_line, tiny, without_paths

from siglip import checkpoints
from siglip.checkpoints import CheckpointError, adapt, weights
from siglip.checkpoints.files.lazy_array import LazyArray, of_array
from siglip.presets import PRESETS

WRITTEN = {
    "huggingface": ("huggingface", {}),
    "big_vision": ("big_vision", {}),
    "big_vision-stacked": ("big_vision", {"stacked": True}),
    "open_clip": ("open_clip", {}),
}
NAFLEX = dataclasses.replace(
    TINY, img={"variant": "mu/16", "naflex_grid": 4}, res=None, image="hf-naflex"
)
# The cheap ones; SigLIP 2's token tables are 32 MB each.
RELEASED = ("siglip-b16-224", "siglip-so400m14-224", "siglip2-g-opt16-256")


def target(tmp_path, format, name="made"):
    return tmp_path / (f"{name}.npz" if format == "big_vision" else name)


def there_and_back(given, tmp_path, way):
    format, options = WRITTEN[way]
    path = target(tmp_path, format)
    checkpoints.write(given, path, format, **options)
    again = checkpoints.read(path)
    assert again.format == format
    return again


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("way", WRITTEN)
def test_every_format_gives_back_the_model_to_the_bit(way, dtype, tmp_path):
    given = adapt.cast(tiny(), dtype)
    again = there_and_back(given, tmp_path, way)
    assert arrays(again) == arrays(given)
    assert {str(stored.dtype) for stored in again.arrays.values()} == {dtype}
    assert without_paths(again.spec) == without_paths(given.spec)


@pytest.mark.parametrize("way", WRITTEN)
@pytest.mark.parametrize("name", RELEASED)
def test_small_released_models_come_back_to_the_bit(name, way, tmp_path):
    given = checkpoints.read(f"random:{name}:small")
    again = there_and_back(given, tmp_path, way)
    assert arrays(again) == arrays(given)
    assert without_paths(again.spec) == given.spec


@pytest.mark.parametrize("name", PRESETS)
def test_every_small_model_has_the_inputs_of_the_released_one(name):
    made, preset = checkpoints.read(f"random:{name}:small"), PRESETS[name]
    assert made.arrays["txt/Embed_0/embedding"].shape == (preset.vocab_size, 32)
    assert made.arrays["txt/pos_embedding"].shape == (1, preset.token_len, 32)
    grid = (preset.grid,) * 2 if preset.naflex else (1, preset.grid**2)
    assert made.arrays["img/pos_embedding"].shape == (*grid, 32)
    assert ("txt/head/kernel" in made.arrays) == preset.text_head
    assert (made.spec.pad_id, made.spec.image) == (preset.pad_id, preset.image)


@pytest.mark.parametrize("way", ["huggingface", "big_vision", "big_vision-stacked"])
@pytest.mark.parametrize("changes", ["naflex", "img", "txt"])
def test_naflex_and_towers_alone_come_back_to_the_bit(changes, way, tmp_path):
    given = tiny(**dataclasses.asdict(NAFLEX)) if changes == "naflex" else tiny().only(changes)
    again = there_and_back(given, tmp_path, way)
    assert arrays(again) == arrays(given)
    assert without_paths(again.spec) == without_paths(given.spec)


@pytest.mark.parametrize("way", WRITTEN)
def test_a_model_without_bias_or_text_head_comes_back_without(way, tmp_path):
    given = tiny(bias=False, txt={**TINY.txt, "out_dim": 0})
    again = there_and_back(given, tmp_path, way)
    assert arrays(again) == arrays(given)
    assert without_paths(again.spec) == given.spec


@pytest.mark.parametrize("way", WRITTEN)
def test_the_same_model_gives_the_same_bytes(way, tmp_path):
    format, options = WRITTEN[way]
    made = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        path = target(tmp_path / name, format)
        checkpoints.write(tiny(), path, format, **options)
        made.append(files(path if path.is_dir() else path.parent))
    assert made[0] == made[1] and len(made[0]) >= 2


def test_what_only_this_project_has_goes_to_big_vision_and_nowhere_else(tmp_path):
    img = {**TINY.img, "pool": "gap", "out_dim": 24}
    txt = {**TINY.txt, "bottleneck": 8, "pool": "map", "out_dim": 24}
    given = tiny(img=img, txt=txt)
    for format in ("huggingface", "open_clip"):
        with pytest.raises(CheckpointError) as error:
            checkpoints.write(given, tmp_path / format, format)
        message = one_line(error)
        for what in ("'gap'", "with a head", "'map'", "bottleneck", "big_vision"):
            assert what in message
        assert list(tmp_path.iterdir()) == []
    again = there_and_back(given, tmp_path, "big_vision")
    assert arrays(again) == arrays(given) and again.spec == given.spec


def test_a_target_that_is_there_is_left_alone(tmp_path):
    for format in checkpoints.FORMATS:
        with pytest.raises(CheckpointError, match="is there already"):
            checkpoints.write(tiny(), tmp_path, format)
    with pytest.raises(CheckpointError, match="format 'tf' is none of huggingface, big_vision"):
        checkpoints.write(tiny(), tmp_path / "x", "tf")


# Layers


def layer(name, value, shape=(2,), dtype=np.float32):
    return {name: of_array(np.full(shape, value, dtype), name)}


def test_stacked_layers_are_the_layers_in_the_order_of_their_numbers():
    given = {}
    for i in range(12):  # 10 comes after 9, not after 1
        given |= layer(f"txt/Encoder_0/encoderblock_{i}/x/bias", i)
    stacked = weights.stack({**layer("t", 7), **given})
    assert list(stacked) == ["t", "txt/Encoder_0/encoderblock/x/bias"]
    whole = stacked["txt/Encoder_0/encoderblock/x/bias"]
    np.testing.assert_array_equal(whole.read(), np.repeat(np.arange(12.0)[:, None], 2, 1))
    again = weights.unstack(stacked)
    assert {n: stored.read().tolist() for n, stored in again.items() if n != "t"} == {
        n: stored.read().tolist() for n, stored in given.items()
    }


def test_a_stacked_array_is_read_once_for_all_its_layers_and_let_go():
    reads = []

    def read():
        reads.append(1)
        return np.arange(6.0).reshape(3, 2)

    stored = LazyArray((3, 2), np.dtype(np.float64), "a", read)
    layers = weights.unstack({"e/encoderblock/b": stored})
    for round in (1, 2):
        rows = [layers[f"e/encoderblock_{i}/b"].read().tolist() for i in range(3)]
        assert rows == [[0, 1], [2, 3], [4, 5]] and len(reads) == round


def test_layers_that_do_not_belong_together_are_not_stacked():
    one = layer("e/encoderblock_0/b", 1)
    for other in (
        layer("e/encoderblock_1/b", 1, shape=(3,)),
        layer("e/encoderblock_1/b", 1, dtype=np.float64),
        layer("e/encoderblock_2/b", 1),
    ):
        with pytest.raises(CheckpointError, match=r"cannot be stacked|out of turn"):
            weights.stack(one | other)
    with pytest.raises(CheckpointError, match="has no layer axis"):
        weights.unstack(layer("e/encoderblock/b", 1, shape=()))


def test_a_difference_names_what_is_missing_what_is_new_and_what_has_another_shape():
    in_file = {"a": (1,), "b": (2, 3), **{f"new{i}": (i,) for i in range(8)}}
    in_model = {"b": (3, 2), "a": (1,), "c": (4,)}
    with pytest.raises(CheckpointError) as error:
        weights.compare(in_file, in_model, where="FILE")
    message = one_line(error)
    assert message.startswith("FILE does not fit the model: arrays 1 missing there: c [4]; ")
    assert "8 unknown to the model: new0 [0], new1 [1]" in message and "and 3 more" in message
    assert "1 of another shape: b is [2, 3] there, [3, 2] in the model" in message
    weights.compare(in_model, in_model, where="FILE")


def test_a_tree_nests_the_arrays_as_float32_or_as_they_are_and_stacks_for_scan():
    given = adapt.cast(tiny(), "bfloat16")
    tree = given.tree()
    assert tree["img"]["Transformer"]["encoderblock_2"]["LayerNorm_0"]["scale"].dtype == np.float32
    kept = given.tree(scan=True, dtype=None)
    block = kept["img"]["Transformer"]["encoderblock"]["LayerNorm_0"]["scale"]
    assert block.shape == (3, 32) and block.dtype == ml_dtypes.bfloat16
    one = tree["img"]["Transformer"]["encoderblock_1"]["LayerNorm_0"]["scale"]
    np.testing.assert_array_equal(block[1].astype(np.float32), one)


def test_one_tower_has_its_own_arrays_and_no_temperature():
    alone = tiny().only("txt")
    assert all(name.startswith("txt/") for name in alone.arrays)
    assert alone.spec.img is None and not alone.spec.bias
    alone.check()
    with pytest.raises(CheckpointError, match="holds no tower 'img'"):
        alone.only("img")


# What a path is


def test_nothing_but_the_named_formats_is_read(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"x")
    (tmp_path / "folder").mkdir()
    for path, what in (
        (tmp_path / "model.bin", "neither .npz nor .safetensors"),
        (tmp_path / "folder", "holds neither a run of this project"),
        (tmp_path / "none.npz", "there is no such file"),
        ("siglip-b16-225", "the nearest: siglip-b16-2"),
        ("random:siglip-b16-225", "the nearest: siglip-b16-2"),
    ):
        with pytest.raises(CheckpointError) as error:
            checkpoints.read(path)
        assert what in one_line(error)


def test_a_file_is_read_and_not_another_model_beside_it(tmp_path):
    checkpoints.write(tiny(), tmp_path / "both", "open_clip")
    other = adapt.cast(tiny(), "bfloat16")
    checkpoints.write(other, tmp_path / "hf", "huggingface")
    for file in ("config.json", "model.safetensors"):
        (tmp_path / "both" / file).write_bytes((tmp_path / "hf" / file).read_bytes())
    read = {
        name: checkpoints.read(tmp_path / "both" / name)
        for name in ("open_clip_model.safetensors", "model.safetensors")
    }
    assert arrays(read["open_clip_model.safetensors"]) == arrays(tiny())
    assert arrays(read["model.safetensors"]) == arrays(other)
