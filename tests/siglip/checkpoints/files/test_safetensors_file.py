"""Safetensors in and out: the library's bytes, and files that are not what they claim."""

import json
import os
import pathlib
import pickle
import re
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from siglip.checkpoints.errors import CheckpointError
from siglip.checkpoints.files import array_file, npz_file, safetensors_file
from siglip.checkpoints.files.lazy_array import LazyArray, of_array

BF16 = ml_dtypes.bfloat16


def mixture() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {
        f"{name}.{np.dtype(dtype).name}": rng.normal(size=shape).astype(dtype)
        for name, shape in {"z": (2, 3), "a": (5,), "scalar": (), "none": (0, 4)}.items()
        for dtype in (np.float16, np.float32, BF16, np.float64)
    }
    for dtype in (np.int64, np.int32, np.int16, np.int8, np.uint8):
        arrays[f"n.{np.dtype(dtype).name}"] = rng.integers(0, 100, (3, 3)).astype(dtype)
    return arrays | {"yes": np.array([True, False, True])}


def lazy(arrays: dict[str, np.ndarray]) -> dict[str, LazyArray]:
    return {name: of_array(array) for name, array in arrays.items()}


def assert_same(read: dict[str, LazyArray], arrays: dict[str, np.ndarray]) -> None:
    assert set(read) == set(arrays)
    for name, array in arrays.items():
        actual = read[name].read()
        assert (read[name].shape, read[name].dtype) == (array.shape, array.dtype), name
        assert (actual.shape, actual.dtype) == (array.shape, array.dtype), name
        assert actual.tobytes() == array.tobytes(), name


def file_of(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(shape: list, begin: int, end: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def refusal(path: pathlib.Path) -> str:
    """What read says, which must be one line that names the file."""
    with pytest.raises(CheckpointError) as caught:
        safetensors_file.read(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(path)), message
    return message


@pytest.mark.parametrize("metadata", [{}, {"format": "pt"}, {"é": 'a "\n\t\x01\x7f'}])
def test_bytes_are_those_of_the_library(tmp_path, metadata):
    arrays = mixture()
    safetensors.numpy.save_file(arrays, tmp_path / "theirs", metadata or None)
    safetensors_file.write(tmp_path / "ours", lazy(arrays), metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_what_the_library_wrote_is_read_and_the_other_way_round(tmp_path):
    arrays = mixture()
    safetensors.numpy.save_file(arrays, tmp_path / "theirs", {"format": "pt", "a": "b"})
    read = safetensors_file.read(tmp_path / "theirs")
    assert_same(read, arrays)
    assert read["z.float32"].origin == "theirs: z.float32"
    safetensors_file.write(tmp_path / "ours", read, {"b": "1", "a": "2"})
    with safetensors.safe_open(tmp_path / "ours", "np") as file:
        assert file.metadata() == {"a": "2", "b": "1"}
        assert set(file.keys()) == set(arrays)
        assert_same({name: of_array(file.get_tensor(name)) for name in arrays}, arrays)


def test_order_of_metadata_and_of_arrays_changes_no_byte(tmp_path):
    arrays = lazy(mixture())
    safetensors_file.write(tmp_path / "a", arrays, {"a": "1", "b": "2"})
    backwards = dict(reversed(arrays.items()))
    safetensors_file.write(tmp_path / "b", backwards, {"b": "2", "a": "1"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "bfloat16"])
def test_any_layout_in_memory_gives_the_same_file(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(array_file, "PIECE", 7)
    plain = np.arange(60).reshape(3, 4, 5).astype(np.dtype(dtype))
    wide = np.zeros((3, 8, 5), plain.dtype)
    wide[:, ::2] = plain
    for i, array in enumerate((plain, np.asfortranarray(plain), wide[:, ::2])):
        safetensors_file.write(tmp_path / f"{i}", lazy({"a": array}), {})
        little = plain.astype(plain.dtype.newbyteorder("<"))
        assert_same(safetensors_file.read(tmp_path / f"{i}"), {"a": little})


def test_one_array_at_a_time_is_in_memory(tmp_path):
    big = {
        f"{i}": LazyArray(
            (500_000,), np.dtype("f4"), "memory", lambda: np.ones(500_000, np.float32)
        )
        for i in range(8)
    }
    tracemalloc.start()
    try:
        safetensors_file.write(tmp_path / "big", big, {})
        read = safetensors_file.read(tmp_path / "big")
        assert sum(float(stored.read().sum()) for stored in read.values()) == 4_000_000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 2e6 < peak < 2 * 2e6, f"arrays have 2 MB each, all 16 MB; {peak}"


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors_file.write(path, lazy({"a": np.ones(3)}), {})
    before = path.read_bytes()

    def fail() -> np.ndarray:
        raise CheckpointError("lost on the way")

    broken = {"a": of_array(np.zeros(3)), "b": LazyArray((3,), np.dtype("f8"), "b", fail)}
    with pytest.raises(CheckpointError, match="lost on the way"):
        safetensors_file.write(path, broken, {})
    with pytest.raises(
        CheckpointError, match=r"b was said to be float64\[3\], but is float64\[1\]"
    ):
        safetensors_file.write(
            path, {"b": LazyArray((3,), np.dtype("f8"), "b", lambda: np.zeros(1))}, {}
        )
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_what_cannot_be_written_is_one_line(tmp_path):
    for arrays, says in (
        ({"a": np.zeros(2, np.complex64)}, "complex64 has no place"),
        ({"a": np.array([None])}, "object has no place"),
        ({"a\n": np.zeros(2)}, "does not print"),
        ({"__metadata__": np.zeros(2)}, "rename it"),
    ):
        with pytest.raises(CheckpointError, match=f"^[^\n]*{says}[^\n]*$"):
            safetensors_file.write(tmp_path / "x", lazy(arrays), {})
    with pytest.raises(CheckpointError, match=r"^[^\n]*x cannot be written: No such file[^\n]*$"):
        safetensors_file.write(tmp_path / "no" / "x", lazy(mixture()), {})
    assert os.listdir(tmp_path) == []


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: pathlib.Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickle_is_named_and_never_run(tmp_path, protocol):
    marker = tmp_path / "marker"
    hostile = pickle.dumps(Touch(marker), protocol)
    (tmp_path / "x.safetensors").write_bytes(hostile)
    assert "is a pickle, which may run any code and is never read" in refusal(
        tmp_path / "x.safetensors"
    )
    assert not marker.exists()
    pickle.loads(hostile)
    assert marker.exists()  # it would have run


def test_a_header_that_begins_like_a_pickle_is_read(tmp_path):
    # 0x280 bytes of header: the file's first bytes are those of a pickle of protocol 2.
    header = {"__metadata__": {"pad": ""}, "a": entry([1], 0, 4)}
    header["__metadata__"]["pad"] = "x" * (0x280 - len(json.dumps(header)))
    path = tmp_path / "x"
    path.write_bytes(file_of(header, b"\0\0\0\0"))
    assert path.read_bytes().startswith(b"\x80\2")
    assert_same(safetensors_file.read(path), {"a": np.zeros(1, np.float32)})


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty; copy it again"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 813000000\n",
            "is a Git LFS pointer, not the weights; run `git lfs pull`",
        ),
        (b"\n<!DOCTYPE html>\n<html>Sign in", "is a web page, not the weights; download it again"),
        (b"<html><body>", "is a web page"),
        (b"PK\3\4" + bytes(60), "is a zip archive: an .npz under a wrong name, or a PyTorch"),
        (b"\x93NUMPY\1\0v\0{'descr'", "is one .npy array"),
        (b"\x10\0", "is no safetensors file; copy it again"),
        (bytes(100), "is no safetensors file"),
        ((10**9).to_bytes(8, "little") + b"{", "is no safetensors file"),
        (file_of({"a": entry([4], 0, 16)})[:30], r"promises \d+ bytes, 30 are there"),
        (file_of({"a": entry([4], 0, 16)}, bytes(15)), r"is truncated: its header promises \d+ "),
        (file_of({"a": entry([4], 0, 16)}, bytes(17)), r"goes on behind its last array"),
        (file_of({"a": entry([10**12], 0, 4 * 10**12)}, bytes(4)), "promises 40000000000"),
        (file_of({"a": entry([10**12], 0, 4)}, bytes(4)), "said to lie at bytes 0 to 4, but 4000"),
        (file_of({"a": entry([2**62, 2**62], 0, 4)}, bytes(4)), "has an impossible shape"),
        (file_of({"a": entry([0, 2**63], 0, 0)}), "has an impossible shape"),
        (file_of({"a": entry([1] * 33, 0, 4)}, bytes(4)), "has an impossible shape"),
        (file_of({"a": entry([-1], 0, 4)}, bytes(4)), "has a damaged entry"),
        (file_of({"a": entry([True], 0, 4)}, bytes(4)), "has a damaged entry"),
        (file_of({"a": entry([1.0], 0, 4)}, bytes(4)), "has a damaged entry"),
        (file_of({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)), "has a damaged entry"),
        (file_of({"a": [1]}, bytes(4)), "has a damaged entry"),
        (file_of({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, bytes(8)), "array 'b' is said"),
        (file_of({"a": entry([1], 0, 4), "b": entry([1], 5, 9)}, bytes(9)), "array 'b' is said"),
        (file_of({"a": entry([1], 4, 8)}, bytes(8)), "array 'a' is said to lie at bytes 4 to 8"),
        (file_of({"a": entry([4], 0, 4, "F8_E4M3")}, bytes(4)), "the type 'F8_E4M3', which is not"),
        (file_of({"a": entry([1], 0, 4, "U32")}, bytes(4)), "the type 'U32', which is not read"),
        (file_of({"\x1b[2J": entry([1], 0, 4)}, bytes(4)), "a name that does not print"),
        (file_of({"__metadata__": {"a": 1}}), "metadata that are not texts"),
        (file_of({"__metadata__": []}), "metadata that are not texts"),
        (file_of(b'{"a": 1, "a": 2}'), "'a' is there twice"),
        (file_of(b'{"a": '), "has a damaged header"),
        (file_of(b'{"a": "\xff"}'), "has a damaged header"),
        (file_of(b'{"a":' + b"[" * 100_000), "has a damaged header"),
        (file_of(b'{"a":' + b"1" * 10_000 + b"}"), "has a damaged header"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_wrong_with_a_file_is_one_line(tmp_path, content, says):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        assert re.search(says, refusal(path))
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()


def test_the_library_is_still_laxer_than_this_reader(tmp_path):
    """Two of the reasons for code of our own; where this fails, the library may replace it."""
    path, one = tmp_path / "x.safetensors", json.dumps(entry([1], 0, 4))
    path.write_bytes(file_of(f'{{"a": {one}, "a": {one}}}'.encode(), bytes(4)))
    with safetensors.safe_open(path, "np") as file:
        assert list(file.keys()) == ["a"]
    assert "'a' is there twice" in refusal(path)
    path.write_bytes(file_of({"a": entry([0, 2**63], 0, 0)}))
    with safetensors.safe_open(path, "np") as file, pytest.raises(ValueError, match="dimension"):
        file.get_tensor("a")
    assert "has an impossible shape" in refusal(path)


def test_what_is_no_file_is_one_line(tmp_path):
    with pytest.raises(CheckpointError, match=r"^[^\n]*cannot be read: No such file[^\n]*$"):
        safetensors_file.read(tmp_path / "x")
    assert "is a folder" in refusal(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "or a device" in refusal(tmp_path / "pipe")  # and does not wait for ever


def test_a_bool_is_0_or_1(tmp_path):
    (tmp_path / "x").write_bytes(file_of({"a": entry([2], 0, 2, "BOOL")}, b"\1\2"))
    with pytest.raises(CheckpointError, match="x: a is damaged"):
        safetensors_file.read(tmp_path / "x")["a"].read()


def test_a_file_that_changes_between_header_and_array_is_refused(tmp_path):
    path = tmp_path / "x"
    safetensors_file.write(path, lazy({"a": np.zeros(3), "b": np.ones(3)}), {})
    read = safetensors_file.read(path)
    safetensors_file.write(path, lazy({"c": np.zeros(3), "d": np.ones(3)}), {})
    os.utime(path, ns=(0, 0))
    with pytest.raises(CheckpointError, match="x has changed while it was read"):
        read["a"].read()
    path.unlink()
    with pytest.raises(CheckpointError, match="x cannot be read: No such file"):
        read["a"].read()


def test_damage_anywhere_is_an_error_of_ours_and_what_the_library_refuses_we_refuse(tmp_path):
    path = tmp_path / "x.safetensors"
    arrays = {"a": np.arange(6.0).reshape(2, 3), "b": np.ones(4, BF16), "c": np.array([True])}
    safetensors_file.write(path, lazy(arrays), {"format": "pt"})
    whole = path.read_bytes()
    refused = 0
    for i in range(len(whole)):
        flipped = bytearray(whole)
        flipped[i] ^= 1 << i % 8
        for content in (bytes(flipped), whole[:i]):
            path.write_bytes(content)
            try:
                for stored in safetensors_file.read(path).values():
                    stored.read()
            except CheckpointError as error:
                assert "\n" not in str(error)
                refused += 1
            else:
                safetensors.deserialize(content)
    assert len(whole) < refused < 2 * len(whole)  # flips inside the arrays go unseen


def sharded(folder: pathlib.Path, **changes: str) -> dict[str, np.ndarray]:
    arrays = {"b": np.arange(3.0), "a": np.ones(2, np.float32), "c": np.zeros((), np.int64)}
    files = {"b": "1-of-2.safetensors", "a": "2-of-2.safetensors", "c": "1-of-2.safetensors"}
    for file in set(files.values()):
        inside = {name: of_array(arrays[name]) for name in arrays if files[name] == file}
        safetensors_file.write(folder / file, inside, {})
    index = {"metadata": {"total_size": 40}, "weight_map": files | changes}
    (folder / safetensors_file.INDEX).write_text(json.dumps(index))
    return arrays


def test_a_folder_of_shards_is_read(tmp_path):
    arrays = sharded(tmp_path)
    assert_same(safetensors_file.read_folder(tmp_path), arrays)
    # A whole file goes first.
    safetensors_file.write(tmp_path / "model.safetensors", lazy({"d": np.zeros(1)}), {})
    assert list(safetensors_file.read_folder(tmp_path)) == ["d"]


def test_links_to_shards_are_followed(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    arrays = sharded(tmp_path / "blobs")
    for file in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(pathlib.Path("..", "blobs", file.name))
    assert_same(safetensors_file.read_folder(tmp_path / "snapshot"), arrays)


def folder_refusal(folder: pathlib.Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        safetensors_file.read_folder(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "file", ["../x.safetensors", "/x.safetensors", "a/../../x", "..\\x", "C:x", "x\0", "a//x", ""]
)
def test_nothing_outside_the_folder_is_read(tmp_path, file):
    inner = tmp_path / "inner"
    inner.mkdir()
    sharded(inner, b=file)
    safetensors_file.write(tmp_path / "x.safetensors", lazy({"b": np.ones(3)}), {})
    assert "would lie outside" in folder_refusal(inner)


def test_what_is_wrong_with_a_folder_is_one_line(tmp_path):
    assert "it is empty" in folder_refusal(tmp_path)
    assert "cannot be read as a folder" in folder_refusal(tmp_path / "none")
    (tmp_path / "notes.txt").write_text("")
    assert "holds neither model.safetensors nor" in folder_refusal(tmp_path)
    assert "'notes.txt'" in folder_refusal(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    message = folder_refusal(tmp_path)
    assert "'pytorch_model.bin', a pickle" in message
    assert "convert it to model.safetensors" in message
    sharded(tmp_path, d="1-of-2.safetensors")
    assert "1-of-2.safetensors has no array 'd'" in folder_refusal(tmp_path)
    sharded(tmp_path, d="3-of-2.safetensors")
    assert "3-of-2.safetensors is missing, but model.safetensors.index.json names it" in (
        folder_refusal(tmp_path)
    )
    for index, says in (
        ("version https://git-lfs.github.com/spec/v1\n", "run `git lfs pull`"),
        ("[]", "no JSON object"),
        ("{}", "has no weight_map"),
        ('{"weight_map": {"a": 1}}', "has no weight_map"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "'a' is there twice"),
    ):
        (tmp_path / safetensors_file.INDEX).write_text(index)
        assert says in folder_refusal(tmp_path)


def test_the_two_formats_know_each_other(tmp_path):
    safetensors_file.write(tmp_path / "a", lazy(mixture()), {})
    npz_file.write(tmp_path / "b", lazy(mixture()).items())
    with pytest.raises(CheckpointError, match="a is a safetensors file under a wrong name"):
        npz_file.read(tmp_path / "a")
    assert "an .npz under a wrong name" in refusal(tmp_path / "b")
