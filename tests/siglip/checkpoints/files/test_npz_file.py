"""Archives of arrays: numpy's in, ours out, and archives that lie."""

import concurrent.futures
import io
import os
import pathlib
import pickle
import re
import struct
import sys
import time
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest

from siglip.checkpoints.errors import CheckpointError
from siglip.checkpoints.files import npz_file
from siglip.checkpoints.files.lazy_array import LazyArray, of_array

BF16 = ml_dtypes.bfloat16


def mixture() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {
        f"params/{name}.{np.dtype(dtype).name}": rng.normal(size=shape).astype(dtype)
        for name, shape in {"img/z": (2, 3), "a": (5,), "t": (), "none": (0, 4)}.items()
        for dtype in (np.float16, np.float32, BF16, np.float64)
    }
    for code in "bhilBHIL":
        arrays[code] = rng.integers(0, 100, (3, 3)).astype(code)
    return arrays | {"yes": np.array([True, False, True])}


def assert_same(read: dict[str, LazyArray], arrays: dict[str, np.ndarray]) -> None:
    assert list(read) == list(arrays)
    for name, array in arrays.items():
        native = array.dtype.newbyteorder("=")
        actual = read[name].read()
        assert (read[name].shape, read[name].dtype) == (array.shape, native), name
        assert (actual.shape, actual.dtype) == (array.shape, native), name
        assert actual.flags.aligned, name
        assert actual.tobytes() == array.astype(native).tobytes(), name


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def header(text: str, version: tuple[int, int] = (1, 0)) -> bytes:
    length = struct.pack("<H" if version == (1, 0) else "<I", len(text))
    return b"\x93NUMPY" + bytes(version) + length + text.encode()


def claims(shape: str = "(1,)", descr: str = "'<f4'", fortran: str = "False") -> bytes:
    return header(f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}}}\n")


def archive(
    path: pathlib.Path, members: dict[str, bytes], method: int = zipfile.ZIP_STORED
) -> pathlib.Path:
    with zipfile.ZipFile(path, "w", method) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


def refusal(path: pathlib.Path) -> str:
    """What read says, which must be one line that names the file."""
    with pytest.raises(CheckpointError) as caught:
        npz_file.read(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(path)), message
    return message


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_what_numpy_saved_is_read(tmp_path, save: Callable):
    arrays = mixture() | {
        "fortran": np.asfortranarray(np.arange(24.0).reshape(2, 3, 4)),
        "fortran.bfloat16": np.asfortranarray(np.arange(6).reshape(2, 3).astype(BF16)),
        "big": np.arange(7, dtype=">f4"),
        "big.fortran": np.asfortranarray(np.arange(6, dtype=">i2").reshape(2, 3)),
        "incompressible": np.random.default_rng(0).bytes(3_000_000),
    }
    arrays["incompressible"] = np.frombuffer(arrays["incompressible"], np.uint8)
    arrays["zeros"] = np.zeros(3_000_000, np.uint8)
    save(tmp_path / "x.npz", **arrays)
    read = npz_file.read(tmp_path / "x.npz")
    assert_same(read, arrays)
    assert read["params/t.bfloat16"].origin == "x.npz: params/t.bfloat16"


@pytest.mark.parametrize("descr", ["'|V2'", "'<V2'", "'V2'"])
def test_two_bytes_of_void_are_bfloat16(tmp_path, descr):
    values = np.array([1.0, -2.5, 118.0], BF16)
    path = archive(tmp_path / "x.npz", {"t.npy": claims("(3,)", descr) + values.tobytes()})
    assert_same(npz_file.read(path), {"t": values})


def test_numpy_reads_what_is_written(tmp_path):
    arrays = mixture()
    npz_file.write(tmp_path / "x.npz", ((name, of_array(a)) for name, a in arrays.items()))
    assert_same(npz_file.read(tmp_path / "x.npz"), arrays)
    with np.load(tmp_path / "x.npz", allow_pickle=False) as theirs:
        assert list(theirs) == list(arrays)
        for name, array in arrays.items():
            actual = theirs[name]
            assert actual.dtype == ("V2" if array.dtype == BF16 else array.dtype)
            assert actual.tobytes() == array.tobytes()
    assert zipfile.ZipFile(tmp_path / "x.npz").testzip() is None


def test_bfloat16_is_written_as_numpy_writes_it(tmp_path):
    array = np.arange(5).astype(BF16)
    npz_file.write(tmp_path / "x.npz", [("a", of_array(array))])
    with zipfile.ZipFile(tmp_path / "x.npz") as file:
        assert file.read("a.npy") == npy(array)
        assert b"'<V2'" in file.read("a.npy")


def test_the_same_arrays_give_the_same_bytes_at_any_time_and_in_any_layout(tmp_path, monkeypatch):
    plain = np.arange(24.0).reshape(2, 3, 4)
    npz_file.write(tmp_path / "a.npz", [("a", of_array(plain))])
    monkeypatch.setattr(time, "time", lambda: 2e9)
    monkeypatch.setattr(sys, "platform", "win32")
    for array in (np.asfortranarray(plain), plain.astype(">f8")):
        npz_file.write(tmp_path / "b.npz", [("a", of_array(array))])
        assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_zip64_in_and_out(tmp_path, monkeypatch):
    arrays = mixture()
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
        for name, array in arrays.items():
            with file.open(f"{name}.npy", "w", force_zip64=True) as member:
                member.write(npy(array))
    assert_same(npz_file.read(tmp_path / "a.npz"), arrays)
    # Members of more than 4 GiB, and a directory that begins behind them.
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)
    npz_file.write(tmp_path / "b.npz", ((name, of_array(a)) for name, a in arrays.items()))
    assert b"PK\6\6" in (tmp_path / "b.npz").read_bytes()
    assert_same(npz_file.read(tmp_path / "b.npz"), arrays)


def test_many_threads_read_the_right_arrays(tmp_path):
    arrays = {f"{i}": np.full(1000 + i, i, np.int32) for i in range(40)}
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "x.npz", **arrays)
        read = npz_file.read(tmp_path / "x.npz")
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            names = [f"{i % 40}" for i in range(800)]
            for name, actual in zip(
                names, pool.map(lambda stored: stored.read(), [read[n] for n in names])
            ):
                np.testing.assert_array_equal(actual, arrays[name])


def test_one_array_at_a_time_is_in_memory(tmp_path):
    one = LazyArray((500_000,), np.dtype("f4"), "memory", lambda: np.ones(500_000, np.float32))
    tracemalloc.start()
    try:
        npz_file.write(tmp_path / "x.npz", ((f"{i}", one) for i in range(8)))
        read = npz_file.read(tmp_path / "x.npz")
        assert sum(float(stored.read().sum()) for stored in read.values()) == 4_000_000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 2e6 < peak < 2 * 2e6, f"arrays have 2 MB each, all 16 MB; {peak}"


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.npz"
    npz_file.write(path, [("a", of_array(np.ones(3)))])
    before = path.read_bytes()

    def fail() -> np.ndarray:
        raise CheckpointError("lost on the way")

    good = of_array(np.zeros(3))
    for bad, says in (
        (("b", LazyArray((3,), np.dtype("f8"), "b", fail)), "lost on the way"),
        (
            ("b", LazyArray((3,), np.dtype("f8"), "b", lambda: np.zeros(1))),
            "b was said to be float64",
        ),
        (("a", good), "is given two arrays 'a'"),
        (("b\n", good), "does not print"),
        (("b", of_array(np.array([None]))), "object has no place"),
        (("b", of_array(np.zeros(2, ml_dtypes.float8_e4m3fn))), "float8_e4m3fn has no place"),
        (("b", of_array(np.zeros(2, "V2"))), "has no place"),
    ):
        with pytest.raises(CheckpointError, match=f"^[^\n]*{says}[^\n]*$"):
            npz_file.write(path, [("a", good), bad])
        assert path.read_bytes() == before
        assert os.listdir(tmp_path) == ["x.npz"]
    with pytest.raises(CheckpointError, match=r"^[^\n]*cannot be written: No such file[^\n]*$"):
        npz_file.write(tmp_path / "no" / "x.npz", [("a", good)])


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: pathlib.Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


def test_pickles_are_named_and_never_run(tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "x.npz"
    hostile = pickle.dumps(Touch(marker))
    path.write_bytes(hostile)
    assert "is a pickle, which may run any code and is never read" in refusal(path)
    objects = npy(np.array([Touch(marker)], object))
    archive(path, {"a.npy": objects})
    assert "array 'a' holds Python objects, a pickle" in refusal(path)
    archive(path, {"a.npy": claims("(1,)", "[('x', '|O'), ('y', '<f4')]") + hostile})
    assert "array 'a' holds Python objects, a pickle" in refusal(path)
    archive(path, {"a.npy": hostile})
    assert "array 'a' has a damaged header" in refusal(path)
    archive(path, {"archive/data.pkl": hostile})  # as torch.save writes it
    assert "'archive/data.pkl', which is no array (.npy)" in refusal(path)
    assert not marker.exists()
    np.load(io.BytesIO(objects), allow_pickle=True)
    assert marker.exists()  # it would have run


@pytest.mark.parametrize(
    ("member", "says"),
    [
        (claims("(10**12,)"), "damaged header"),
        (claims("(1000000000000,)"), r"claims to be float32\[1000000000000\], 4000000000000 bytes"),
        (claims("(0,)") + bytes(4), r"claims to be float32\[0\], 0 bytes, but 4 are there"),
        (claims("()"), r"claims to be float32\[\], 4 bytes, but 0 are there"),
        (claims("(4611686018427387904, 4611686018427387904, 4)"), "has an impossible shape"),
        (claims("(9223372036854775808, 0)"), "has an impossible shape"),
        (claims("(-1, -1)") + bytes(4), "has an impossible shape"),
        (claims("(" + "1, " * 33 + ")") + bytes(4), "has an impossible shape"),
        (claims("(1.0,)") + bytes(4), "damaged header"),
        (claims("(1,)", "'|V4'") + bytes(4), "the type '.V4', which is not read"),
        (claims("(1,)", "[('a', '<i2')]") + bytes(2), "the type '.V2', which is not read"),
        (claims("(1,)", "('|u1', (2,))") + bytes(2), "the type '.V2', which is not read"),
        (claims("(1,)", "'<c8'") + bytes(8), "the type '<c8', which is not read"),
        (claims("(1,)", "'<U1'") + bytes(4), "the type '<U1', which is not read"),
        (claims("(1,)", "'<M8[s]'") + bytes(8), "the type '<M8.s.', which is not read"),
        (claims("(1,)", "'no'") + bytes(4), "damaged header"),
        (claims("(1,)", "{}") + bytes(4), "the type '.V0', which is not read"),
        (claims("(1,)", "[[]]") + bytes(4), "damaged header"),
        (claims("(1,)", "'\\d'") + bytes(4), "damaged header"),
        (claims("(1,)", "__import__('os')") + bytes(4), "damaged header"),
        (claims("(1,)", "'<f4'", "1") + bytes(4), "damaged header"),
        (header("{[]: 1}"), "damaged header"),
        (header("(" * 9000), "damaged header"),
        (header("-" * 9000 + "1"), "damaged header"),
        (header("[" * 150 + "]" * 150), "damaged header"),
        (claims()[:-1].ljust(20_000) + bytes(4), "claims to be"),
        (header("{" + " " * 20_000 + "}", (2, 0)), "damaged header"),
        (header("{}", (3, 0)), "version"),
        (header("{}", (9, 9)), "damaged header"),
        (b"\x93NUMPY", "damaged header"),
        (b"", "damaged header"),
    ],
    ids=lambda value: str(value)[-60:],
)
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_what_is_wrong_with_an_array_is_one_line_and_costs_nothing(tmp_path, member, says, method):
    path = archive(tmp_path / "x.npz", {"a/b.npy": member}, method)
    tracemalloc.start()
    try:
        message = refusal(path)
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()
    assert re.search(says, message)
    assert "array 'a/b'" in message


def edited(path: pathlib.Path, field: int, form: str, value: int) -> pathlib.Path:
    """The zip with a field of the directory's first entry changed."""
    content = bytearray(path.read_bytes())
    struct.pack_into(form, content, content.index(b"PK\1\2") + field, value)
    path.write_bytes(content)
    return path


PACKED, SIZE, OFFSET, METHOD, FLAGS, CRC = 20, 24, 42, 10, 8, 16


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize(
    ("field", "form", "value", "says"),
    [
        (SIZE, "<I", 2**32 - 2, r"claims 4294967294 bytes, but \d+ in the file hold"),
        (SIZE, "<I", 1, "claims|damaged header"),
        (PACKED, "<I", 2**32 - 2, r"is truncated: it ends at byte 42949\d+, but the file at"),
        (OFFSET, "<I", 2**32 - 2, "is not where the zip directory says"),
        (OFFSET, "<I", 1, "is not where the zip directory says"),
        (METHOD, "<H", zipfile.ZIP_LZMA, "encrypted or compressed by another method"),
        (FLAGS, "<H", 1, "encrypted or compressed by another method"),
    ],
)
def test_a_directory_that_lies_is_refused(tmp_path, save, field, form, value, says):
    save(tmp_path / "x.npz", a=np.arange(1000))
    assert re.search(says, refusal(edited(tmp_path / "x.npz", field, form, value)))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_wrong_checksum_or_damaged_bytes_are_one_line(tmp_path, save):
    path = tmp_path / "x.npz"
    save(path, a=np.arange(1000))
    good = path.read_bytes()
    stored = npz_file.read(edited(path, CRC, "<I", 1))["a"]
    with pytest.raises(CheckpointError, match=r"^x.npz: a is damaged \(wrong checksum\)[^\n]*$"):
        stored.read()
    middle = bytearray(good)
    middle[len(good) // 2] ^= 255
    path.write_bytes(middle)
    with pytest.raises(CheckpointError, match=r"^x.npz: a is damaged [^\n]*$"):
        npz_file.read(path)["a"].read()


@pytest.mark.parametrize(
    ("flush", "tail", "says"),
    [
        (zlib.Z_FULL_FLUSH, b"\7", "Error -3"),  # no such kind of block
        (zlib.Z_FULL_FLUSH, b"", "wrong checksum"),  # neither an end nor more
        (zlib.Z_FINISH, bytes(100), "wrong checksum"),  # an end too early
    ],
    ids=["damaged", "endless", "short"],
)
def test_bytes_that_cannot_be_unpacked_are_one_line(tmp_path, flush, tail, says):
    path = tmp_path / "x.npz"
    begin = claims("(30_000,)") + bytes(60_000)
    pack = zlib.compressobj(wbits=-15)
    packed = pack.compress(begin) + pack.flush(flush)
    archive(path, {"a.npy": packed + tail})
    edited(path, METHOD, "<H", zipfile.ZIP_DEFLATED)
    edited(path, SIZE, "<I", len(begin) + 60_000)
    stored = npz_file.read(path)["a"]
    with pytest.raises(CheckpointError, match=rf"^x.npz: a is damaged \({says}[^\n]*$"):
        stored.read()


def test_an_array_whose_bytes_go_on_is_refused(tmp_path):
    path = archive(tmp_path / "x.npz", {"a.npy": claims("(1,)") + bytes(8)})
    assert "exactly" in refusal(edited(path, SIZE, "<I", len(claims("(1,)")) + 4))


def test_a_directory_of_names_that_are_no_text_is_refused(tmp_path):
    path = archive(tmp_path / "x.npz", {"é.npy": npy(np.zeros(1))})
    path.write_bytes(path.read_bytes().replace("é".encode(), b"\xff\xff"))
    assert "has a damaged zip directory ('utf-8' codec" in refusal(path)


def test_an_archive_without_its_beginning_is_refused(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, a=np.zeros(100))
    path.write_bytes(path.read_bytes()[50:])
    assert "is not where the zip directory says" in refusal(path)


def test_unpacking_takes_no_second_array(tmp_path):
    path = tmp_path / "x.npz"
    np.savez_compressed(path, a=np.zeros(20_000_000, np.uint8))
    stored = npz_file.read(path)["a"]
    tracemalloc.start()
    try:
        assert not stored.read().any()
        assert tracemalloc.get_traced_memory()[1] < 25e6
    finally:
        tracemalloc.stop()


def test_arrays_in_the_same_place_are_refused(tmp_path):
    """As zip bombs are made: one place in the file, named by many members."""
    path = tmp_path / "x.npz"
    archive(path, {"a.npy": npy(np.zeros(100))})
    content = path.read_bytes()
    begin, end = content.index(b"PK\1\2"), content.index(b"PK\5\6")
    entry = content[begin:end]
    entries = b"".join(entry.replace(b"a.npy", b"%c.npy" % c) for c in b"abcdefgh")
    tail = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 8, 8, len(entries), begin, 0)
    path.write_bytes(content[:begin] + entries + tail)
    with zipfile.ZipFile(path) as file:
        assert len(file.namelist()) == 8
    assert "arrays that overlap" in refusal(path)


def test_names_are_unique_and_print(tmp_path):
    path = tmp_path / "x.npz"
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "w") as file:
        file.writestr("a.npy", npy(np.zeros(1)))
        file.writestr("a.npy", npy(np.ones(1)))
    assert "has two arrays 'a'" in refusal(path)
    archive(path, {"\x1b[2J.npy": npy(np.zeros(1))})
    assert "a name that does not print" in refusal(path)
    # Names are keys, never paths.
    archive(path, {"../a.npy": npy(np.zeros(1)), "/b.npy": npy(np.ones(1)), "folder/": b""})
    assert list(npz_file.read(path)) == ["../a", "/b"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "run `git lfs pull`"),
        (b"<!doctype html>", "is a web page"),
        (npy(np.zeros(100)), "is one .npy array"),
        (bytes(1000), "is truncated or not an .npz archive (no zip directory at its end); copy"),
    ],
    ids=["empty", "lfs", "html", "npy", "zeros"],
)
def test_what_is_no_archive_is_one_line(tmp_path, content, says):
    (tmp_path / "x.npz").write_bytes(content)
    assert says in refusal(tmp_path / "x.npz")


def test_what_is_no_file_is_one_line(tmp_path):
    with pytest.raises(CheckpointError, match=r"^[^\n]*cannot be read: No such file[^\n]*$"):
        npz_file.read(tmp_path / "x.npz")
    assert "is a folder" in refusal(tmp_path)


def test_python_2_headers_are_read_without_a_word(tmp_path):
    path = archive(tmp_path / "x.npz", {"a.npy": claims("(2L,)") + bytes(8)})
    assert_same(npz_file.read(path), {"a": np.zeros(2, np.float32)})


def test_a_file_that_changes_between_header_and_array_is_refused(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, a=np.zeros(3))
    stored = npz_file.read(path)["a"]
    os.utime(path, ns=(0, 0))
    with pytest.raises(CheckpointError, match=r"x\.npz has changed while it was read"):
        stored.read()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damage_anywhere_is_seen_or_harmless(tmp_path, save):
    path = tmp_path / "x.npz"
    arrays = {"a": np.arange(6.0).reshape(2, 3), "b": np.arange(9, dtype=">i2")}
    save(path, **arrays)
    whole = path.read_bytes()
    refused = 0
    for i in range(len(whole)):
        flipped = bytearray(whole)
        flipped[i] ^= 1 << i % 8
        for content in (bytes(flipped), whole[:i]):
            path.write_bytes(content)
            try:
                read = {name: stored.read() for name, stored in npz_file.read(path).items()}
            except CheckpointError as error:
                assert "\n" not in str(error)
                refused += 1
                continue
            # The checksum: what is read is right, though a name may have changed.
            for actual, array in zip(read.values(), arrays.values()):
                np.testing.assert_array_equal(actual, array)
    assert len(whole) < refused < 2 * len(whole)
