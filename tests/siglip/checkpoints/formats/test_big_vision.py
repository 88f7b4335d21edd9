"""The .npz files that there are: of training, of towers, of half precision."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest
from tiny_models import arrays, files, one_line, tiny

from siglip import checkpoints
from siglip.checkpoints import CheckpointError, spec
from siglip.checkpoints.files import npz_file
from siglip.checkpoints.formats import big_vision
from siglip.checkpoints.weights import stack

GIVEN = tiny()


def numpy_arrays(stacked=()):
    """By name; layers of the towers in `stacked` in one array."""
    leaves = {}
    for tower in ("img", "txt", "t", "b"):
        part = {n: stored for n, stored in GIVEN.arrays.items() if n.split("/")[0] == tower}
        leaves |= stack(part) if tower in stacked else part
    return {name: stored.read() for name, stored in leaves.items()}


def save(path, saved, prefix="params/"):
    """As big_vision does, whose bfloat16 is what numpy makes of it."""
    np.savez(path, **{f"{prefix}{name}": x for name, x in saved.items()})
    return path


@pytest.mark.parametrize("stacked", [(), ("txt",), ("img",), ("img", "txt")], ids="-".join)
@pytest.mark.parametrize("prefix", ["params/", "", "opt/target/"], ids=["params", "none", "opt"])
def test_every_prefix_and_layout_is_the_same_model(prefix, stacked, tmp_path):
    read = checkpoints.read(save(tmp_path / "a.npz", numpy_arrays(stacked), prefix))
    assert arrays(read) == arrays(GIVEN)
    assert read.spec.shapes() == GIVEN.spec.shapes()


def test_optimizer_state_and_counters_are_left_alone(tmp_path):
    saved = {f"params/{n}": x for n, x in numpy_arrays().items()}
    saved |= {f"opt/0/mu/{n}": x for n, x in numpy_arrays().items()}
    saved |= {"opt/count": np.int64(3), "chrono/accum_train_time": np.float64(1)}
    assert arrays(checkpoints.read(save(tmp_path / "a.npz", saved, ""))) == arrays(GIVEN)


def test_two_byte_void_is_bfloat16(tmp_path):
    half = {n: x.astype(ml_dtypes.bfloat16) for n, x in numpy_arrays().items()}
    path = save(tmp_path / "a.npz", {n: x.view("V2") for n, x in half.items()})
    for name, stored in checkpoints.read(path).arrays.items():
        assert stored.read().dtype == ml_dtypes.bfloat16
        assert stored.read().tobytes() == half[name].tobytes()


def test_a_file_without_b_is_a_model_without_a_bias(tmp_path):
    saved = numpy_arrays()
    del saved["b"]
    read = checkpoints.read(save(tmp_path / "a.npz", saved))
    assert not read.spec.bias and "b" not in read.arrays


def test_the_image_tower_alone_is_read(tmp_path):
    saved = {n: x for n, x in numpy_arrays(("img",)).items() if n.startswith("img/")}
    read = checkpoints.read(save(tmp_path / "a.npz", saved))
    assert read.spec.txt is None and arrays(read) == arrays(GIVEN.only("img"))


def test_the_contract_beside_the_file_is_believed_and_without_it_the_shapes(tmp_path):
    checkpoints.write(GIVEN, tmp_path / "a.npz", "big_vision")
    assert checkpoints.read(tmp_path / "a.npz").spec == GIVEN.spec
    (tmp_path / "a.siglip.json").rename(tmp_path / "b.siglip.json")
    saved = checkpoints.read(tmp_path / "a.npz").spec
    assert saved.tokenizer is None and saved.pad_id == 1  # not said by shapes
    assert saved.shapes() == GIVEN.spec.shapes()


def test_what_does_not_fit_the_contract_is_said_array_by_array(tmp_path):
    saved = numpy_arrays()
    del saved["img/MAPHead_0/probe"]
    saved["txt/extra"] = np.zeros(3)
    saved["txt/head/bias"] = np.zeros(5, np.float32)
    save(tmp_path / "a.npz", saved)
    spec.save(GIVEN.spec, tmp_path / "a.siglip.json")
    with pytest.raises(CheckpointError) as error:
        checkpoints.read(tmp_path / "a.npz")
    message = one_line(error)
    assert "1 missing there: img/MAPHead_0/probe [1, 1, 32]" in message
    assert "1 unknown to the model: txt/extra [3]" in message
    assert "txt/head/bias is [5] there, [32] in the model" in message


@pytest.mark.parametrize("saved", [{}, {"w": np.zeros(3)}], ids=["empty", "other"])
def test_another_archive_is_refused_in_one_line(saved, tmp_path):
    with pytest.raises(CheckpointError) as error:
        checkpoints.read(save(tmp_path / "a.npz", saved))
    assert "a.npz holds no array img/... or txt/..." in one_line(error)


def test_stacked_files_have_an_array_for_each_kind_of_layer(tmp_path):
    checkpoints.write(GIVEN, tmp_path / "a.npz", "big_vision", stacked=True)
    with np.load(tmp_path / "a.npz") as there:
        names = set(there.files)
        block = there["params/img/Transformer/encoderblock/LayerNorm_0/scale"]
    assert names == {f"params/{n}" for n in stack(GIVEN.arrays)} and block.shape == (3, 32)


def test_the_tokenizer_lies_beside_the_file(tmp_path):
    (tmp_path / "c4.model").write_bytes(b"pieces")
    block = {"name": "sentencepiece", "path": str(tmp_path / "c4.model")}
    given = dataclasses.replace(GIVEN, spec=dataclasses.replace(GIVEN.spec, tokenizer=block))
    checkpoints.write(given, tmp_path / "new" / "a.npz", "big_vision")
    assert set(files(tmp_path / "new")) == {"a.npz", "a.siglip.json", "a.c4.model"}
    (tmp_path / "new").rename(tmp_path / "moved")
    saved = checkpoints.read(tmp_path / "moved" / "a.npz").spec
    assert saved.tokenizer["path"] == str(tmp_path / "moved" / "a.c4.model")


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt, OSError("full"), CheckpointError("x")], ids=repr
)
def test_an_error_in_writing_leaves_nothing(error, tmp_path, monkeypatch):
    def fail(path, leaves):
        raise error

    (tmp_path / "c4.model").write_bytes(b"pieces")
    block = {"name": "sentencepiece", "path": str(tmp_path / "c4.model")}
    given = dataclasses.replace(GIVEN, spec=dataclasses.replace(GIVEN.spec, tokenizer=block))
    monkeypatch.setattr(npz_file, "write", fail)
    with pytest.raises((KeyboardInterrupt, OSError, CheckpointError)):
        big_vision.write(given, tmp_path / "a.npz")
    assert set(files(tmp_path)) == {"c4.model"}
